// A copy of the project that Node 20 can run: each .ts file becomes .js beside
// it, and everything else that files reach by relative path is a link back.
import { mkdir, readdir, rm, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import process from "node:process";
import { capture } from "./step.mjs";
import { BIN, ROOT } from "./setup.mjs";

/** Folders with TypeScript in them; other entries of the top are links. */
const LEFT_OUT = new Set([".git", "dist", "node_modules"]);

/**
 * Fills `target`, a folder inside the project (so that packages are found),
 * and returns the paths of the .js files in it, relative to it.
 *
 * @param {string} target
 * @returns {Promise<string[]>}
 */
export async function transpile(target) {
  await rm(target, { recursive: true, force: true });
  await mkdir(target, { recursive: true });
  /** @type {string[]} */
  const sources = [];
  await mirror("", target, sources);
  const config = join(target, "tsconfig.json");
  await writeFile(
    config,
    JSON.stringify({
      compilerOptions: {
        // Node 20 has no `using`: lowered.
        target: "es2022",
        module: "nodenext",
        rewriteRelativeImportExtensions: true,
        sourceMap: true,
        inlineSources: true,
        // `deno check` is where types are checked.
        noCheck: true,
        types: [],
        rootDir: ROOT,
        outDir: target,
      },
      files: sources.map((name) => join(ROOT, name)),
    }),
  );
  await capture([process.execPath, join(BIN, "tsc"), "-p", config], {
    cwd: ROOT,
  });
  return sources.map((name) => name.replace(/\.ts$/, ".js"));
}

/**
 * @param {string} folder relative to the project
 * @param {string} target
 * @param {string[]} sources gets the .ts files
 */
async function mirror(folder, target, sources) {
  for (
    const entry of await readdir(join(ROOT, folder), { withFileTypes: true })
  ) {
    const name = join(folder, entry.name);
    if (folder === "" && LEFT_OUT.has(entry.name)) continue;
    const walked = entry.isDirectory() && !entry.name.startsWith(".") &&
      entry.name !== "zig-out";
    if (walked) {
      await mkdir(join(target, name));
      await mirror(name, target, sources);
      continue;
    }
    if (name.endsWith(".ts") && !name.endsWith(".d.ts")) sources.push(name);
    // Sources too: there are tests that read them.
    await symlink(join(ROOT, name), join(target, name));
  }
}
