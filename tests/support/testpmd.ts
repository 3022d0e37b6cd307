/**
 * Where DPDK's testpmd is, a peer in tests and benches: installed, or unpacked
 * into the cache by the set-up.
 *
 * @module
 */

import { accessSync, constants, existsSync } from "node:fs";
import { delimiter, dirname, join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";

function find(): string | null {
  const name = "dpdk-testpmd";
  const folders = (process.env.PATH ?? "").split(delimiter);
  for (const folder of folders) {
    if (folder !== "" && existsSync(join(folder, name))) return name;
  }
  // From here upwards: the tests may run from a copy inside the project.
  let folder = dirname(fileURLToPath(import.meta.url));
  for (; folder !== dirname(folder); folder = dirname(folder)) {
    const path = join(folder, ".cache", "dpdk", name);
    try {
      accessSync(path, constants.X_OK);
      return path;
    } catch {
      // Further up.
    }
  }
  return null;
}

/** The program, or null. */
export const testpmdProgram: string | null = find();

/** Why a test is skipped, and what would run it. */
export const testpmdMissing =
  "DPDK's testpmd is missing: run node tools/setup.mjs guest, or apt-get install dpdk-dev";
