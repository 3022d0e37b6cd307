// Where `node tools/setup.mjs guest` leaves what a guest is made of.
import { createHash } from "node:crypto";
import { existsSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

/** Paths on the host of everything that a guest is made of. */
export interface GuestCache {
  /** The compressed kernel, for QEMU's `-kernel`. */
  kernel: string;
  /** The folder of that kernel's modules. */
  modules: string;
  /** Debian's static busybox, for the guest and for the host. */
  busybox: string;
  /** A static program, built from the file of its name. */
  program: (name: GuestProgram) => string;
}

/**
 * The disk verifier; what moves bytes over TCP; a user of the kernel's
 * vhost_vdpa.
 */
export type GuestProgram = "verify" | "transfer" | "vhost_vdpa";

/** The project's folder: the nearest above with the tools in it. */
export function projectFolder(): string {
  let folder = dirname(fileURLToPath(import.meta.url));
  while (!existsSync(join(folder, "tools", "setup.mjs"))) {
    const parent = dirname(folder);
    if (parent === folder) {
      throw new Error("Cannot find the project's folder: no tools/setup.mjs");
    }
    folder = parent;
  }
  return folder;
}

/** Which kernel: the release's own, or the newest one, which has VDUSE. */
export type KernelName = "release" | "vdpa";
const kernelFolders = { release: "guest", vdpa: "vdpa-guest" } as const;

/** Where its set-up leaves the release of a kernel. */
function manifestOf(kernel: KernelName): string {
  const folder = kernelFolders[kernel];
  return join(projectFolder(), ".cache", folder, "manifest.json");
}

/** Whether that kernel could be fetched. */
export function hasKernel(kernel: KernelName): boolean {
  return existsSync(manifestOf(kernel));
}

/**
 * The guest's parts.
 *
 * @throws {Error} when they are not there, with the command that fetches them
 */
export function guestCache(kernel: KernelName = "release"): GuestCache {
  const project = projectFolder();
  const manifest = manifestOf(kernel);
  if (!existsSync(manifest)) throw missing(manifest);
  const release: string = JSON.parse(readFileSync(manifest, "utf8")).kernel;
  const root = join(project, ".cache", kernelFolders.release, "root");
  const kernelRoot = join(dirname(manifest), "root");
  const program = (name: GuestProgram) => {
    const source = readFileSync(join(project, "tests", "qemu", `${name}.zig`));
    const hash = createHash("sha256").update(source).digest("hex");
    const file = `${name}-${hash.slice(0, 16)}`;
    return firstOf(join(project, ".cache", "guest-tools", file));
  };
  return {
    kernel: firstOf(join(kernelRoot, "boot", `vmlinuz-${release}`)),
    // Newer Debian releases have /usr merged into their packages.
    modules: firstOf(
      join(kernelRoot, "lib", "modules", release),
      join(kernelRoot, "usr", "lib", "modules", release),
    ),
    busybox: firstOf(
      join(root, "bin", "busybox"),
      join(root, "usr", "bin", "busybox"),
    ),
    program,
  };
}

function firstOf(...paths: string[]): string {
  const found = paths.find((path) => existsSync(path));
  if (found === undefined) throw missing(paths[0]);
  return found;
}

function missing(path: string): Error {
  return new Error(
    `Cannot start a guest: ${path} is missing; run: node tools/setup.mjs guest`,
  );
}
