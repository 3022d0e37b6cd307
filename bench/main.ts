/**
 * `deno task bench [FILTER]`: tables of figures, each row measured in the same
 * run and in turns with what it is compared with.
 *
 *   deno task bench            everything: about an hour
 *   deno task bench "depth 32" rows whose "section: name" has that in it
 *   deno task bench --list     what rows there are
 *   deno task bench --rounds 2 --turn-ms 50
 *                              shorter: 5 pairs of turns of 1000 ms unless given
 *   deno task bench flame      flame graphs of the hot paths, into docs/
 *
 * The load generator runs here, on processor 0; the back-ends on processor 1,
 * or, for the rows "one processor", on 0 too.
 *
 * @module
 */

import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { parseArgs } from "node:util";
import { drawFlames } from "./flame/draw.ts";
import { frontendCpu } from "./programs.ts";
import { chosen, type Run } from "./section.ts";
import { sections } from "./sections/mod.ts";
import { heading, row } from "./table.ts";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    list: { type: "boolean", default: false },
    rounds: { type: "string", default: "5" },
    "turn-ms": { type: "string", default: "1000" },
  },
});
const filter = positionals.join(" ");

function wholeNumber(name: "rounds" | "turn-ms"): number {
  const value = Number(values[name]);
  if (Number.isInteger(value) && value > 0) return value;
  console.error(
    `Cannot use --${name}: ${values[name]} (a whole number from 1)`,
  );
  process.exit(2);
}

function list(): void {
  for (const section of sections) {
    for (const { name } of chosen(section, filter)) {
      console.log(`${section.name}: ${name}`);
    }
  }
}

async function measureAll(run: Run): Promise<boolean> {
  let hasFailed = false;
  for (const section of sections) {
    const cases = chosen(section, filter);
    if (cases.length === 0) continue;
    console.log(heading(section));
    const missing = section.missing?.() ?? null;
    if (missing !== null) {
      console.log(`Cannot measure this: ${missing}`);
      continue;
    }
    for (const one of cases) {
      try {
        console.log(row(one, await one.measure(run)));
      } catch (error) {
        hasFailed = true;
        console.log(`${one.name}: ${error}`);
      }
    }
  }
  return hasFailed;
}

/** Runs `body` with what a run needs; its files are gone afterwards. */
async function withRun<T>(body: (run: Run) => Promise<T>): Promise<T> {
  const folder = mkdtempSync(join(tmpdir(), "vhost2-bench-"));
  try {
    return await body({
      rounds: wholeNumber("rounds"),
      runMs: wholeNumber("turn-ms"),
      heapRequests: 10_000_000,
      diskBytes: 256 << 20,
      file: cachedFile(folder, 256),
    });
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

/** Written when first asked for: then its pages are in the cache. */
function cachedFile(folder: string, megabytes: number): () => string {
  const path = join(folder, "disk.img");
  let isThere = false;
  return () => {
    if (!isThere) {
      const size = ["bs=1M", `count=${megabytes}`];
      spawnSync("dd", ["if=/dev/zero", `of=${path}`, ...size]);
      isThere = true;
    }
    return path;
  };
}

if (values.list) {
  list();
} else if (filter === "flame") {
  await drawFlames();
} else {
  spawnSync("taskset", ["-a", "-c", "-p", `${frontendCpu}`, `${process.pid}`]);
  if (await withRun(measureAll)) process.exitCode = 1;
}
