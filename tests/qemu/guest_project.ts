/** This project, and Deno, in the file system of a guest. */

import { execFileSync } from "node:child_process";
import { readdirSync, readFileSync, realpathSync } from "node:fs";
import { join } from "node:path";
import { projectFolder } from "./cache.ts";

/** What of the project the guest needs. */
const sources = [
  ...["cli", "devices", "driver", "ffi", "frontend", "pci", "protocol"],
  ...["session", "transports", "virtqueue"],
];
const single = [
  ...["deno.json", "mod.ts"],
  "zig-out/lib/libvhost2-x86_64.so",
];

type Files = Map<string, { bytes: Uint8Array; mode?: number }>;

/**
 * Deno with its libraries in /bin, and the project in /project.
 *
 * @param tests files of tests/
 */
export function projectFiles(...tests: string[]): Files {
  const files: Files = new Map();
  const project = projectFolder();
  const deno = realpathSync(join(project, "node_modules/deno/deno"));
  files.set("bin/deno", { bytes: readFileSync(deno), mode: 0o755 });
  const libraries = execFileSync("ldd", [deno], { encoding: "utf8" });
  for (const [path] of libraries.matchAll(/\/\S+/g)) {
    files.set(path.slice(1), { bytes: readFileSync(path), mode: 0o755 });
  }
  for (const folder of sources) {
    const names = readdirSync(join(project, folder), {
      recursive: true,
      encoding: "utf8",
    });
    for (const name of names) {
      if (!name.endsWith(".ts") || name.startsWith("embedded")) continue;
      addFile(files, project, join(folder, name));
    }
  }
  for (const name of single) addFile(files, project, name);
  for (const name of tests) addFile(files, project, `tests/${name}`);
  return files;
}

function addFile(files: Files, project: string, name: string): void {
  files.set(`project/${name}`, { bytes: readFileSync(join(project, name)) });
}
