/**
 * The programs that the bench starts: this project's own in both runtimes, and
 * the native ones, which are made when they are first asked for.
 *
 * @module
 */

import { spawnSync } from "node:child_process";
import { mkdirSync, mkdtempSync, realpathSync, rmSync } from "node:fs";
import { availableParallelism } from "node:os";
import { dirname, join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { step } from "../tools/step.mjs";
import { transpile } from "../tools/transpile.mjs";

/** Where TypeScript runs. */
export type Runtime = "deno" | "node";

const here = dirname(fileURLToPath(import.meta.url));
/** The checkout; a transpiled copy has links back to it. */
export const root: string = dirname(
  realpathSync(join(here, "..", "package.json")),
);

/** What runs the bench itself. */
export const ownRuntime: Runtime = "Deno" in globalThis ? "deno" : "node";

/** Where the load generator runs, and where the back-ends do. */
export const frontendCpu = 0;
export const backendCpu: number = availableParallelism() > 1 ? 1 : 0;

export function isInstalled(program: string, flag = "--version"): boolean {
  return spawnSync(program, [flag]).status === 0;
}

let copy: Promise<string> | undefined;

/** A copy of the project for Node, made once and gone with this process. */
function copyForNode(): Promise<string> {
  // In such a copy already?
  if (import.meta.url.endsWith(".js")) {
    return Promise.resolve(join(here, ".."));
  }
  return copy ??= (async () => {
    const dist = join(root, "dist");
    mkdirSync(dist, { recursive: true });
    // Inside the project, so that packages are found.
    const folder = mkdtempSync(join(dist, "bench-"));
    process.on("exit", () => rmSync(folder, { recursive: true, force: true }));
    await transpile(folder);
    return folder;
  })();
}

/**
 * The command that runs one of the bench's own programs.
 *
 * @param name its path in bench/, without extension
 * @param flags of V8
 * @param project another copy of this project, for Deno
 */
export async function script(
  name: string,
  runtime: Runtime,
  flags: readonly string[] = [],
  project: string = root,
): Promise<string[]> {
  if (runtime === "node") {
    const node = ownRuntime === "node" ? process.execPath : "node";
    return [node, ...flags, join(await copyForNode(), "bench", `${name}.js`)];
  }
  const deno = ownRuntime === "deno"
    ? process.execPath
    : join(root, "node_modules", "deno", "deno");
  const v8 = flags.length > 0 ? [`--v8-flags=${flags.join(",")}`] : [];
  return [
    deno,
    "run",
    "--allow-all",
    ...v8,
    join(project, "bench", `${name}.ts`),
  ];
}

/** What `zig build` is to make: the program, or the core with its symbols. */
type NativeStep = "bench" | "bench-profiled";
const builds = new Map<NativeStep, Promise<string>>();

/** Builds what is native if it is stale; the folder it goes to. */
export function buildNative(wanted: NativeStep): Promise<string> {
  let build = builds.get(wanted);
  if (build === undefined) {
    build = (async () => {
      await step(
        "Building what is native of the bench",
        "about 1 min the first time",
        [
          join(root, "node_modules", ".bin", "zig"),
          ...["build", wanted, "--release=safe"],
        ],
        { cwd: root },
      );
      return join(root, "zig-out");
    })();
    builds.set(wanted, build);
  }
  return build;
}

/** The command that is a native program: one of those in `bench/native/`. */
export async function native(
  name: "disk" | "floor" | "ring",
): Promise<readonly string[]> {
  return [join(await buildNative("bench"), "bin", "bench-native"), name];
}

/** The same as `taskset -c CPUS COMMAND`. */
export function pinned(cpus: string, command: readonly string[]): string[] {
  return ["taskset", "-c", cpus, ...command];
}
