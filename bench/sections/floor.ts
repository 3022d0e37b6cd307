/**
 * What no back-end on this machine can do without, and the pieces that this one
 * is made of.
 *
 * @module
 */

import { execFileSync } from "node:child_process";
import { core } from "../../ffi/core.ts";
import { backendCpu, frontendCpu, native, pinned } from "../programs.ts";
import type { Case, Run, Section } from "../section.ts";

/** As native/floor.zig names them. */
const nativePieces = [
  "copy of 4 KiB in the cache, libc's memcpy",
  "copy of 4 KiB in the cache, the core's",
  "copy of 4 KiB of 256 MiB, libc's memcpy",
  "copy of 4 KiB of 256 MiB, the core's",
  ...frontendCpu === backendCpu
    ? []
    : ["a cache line to the other processor and back"],
  "an eventfd written and read",
  "the shortest system call",
];

const measured = new WeakMap<Run, Promise<Map<string, number>>>();

/** All of them, by one call of the program in each run of the bench. */
function nativeFloor(run: Run): Promise<Map<string, number>> {
  let found = measured.get(run);
  if (found === undefined) {
    found = (async () => {
      const program = await native("floor");
      // It needs both: the bench itself has one.
      const cpus = `${frontendCpu},${backendCpu}`;
      const [command, ...args] = pinned(cpus, [
        ...program,
        String(run.runMs),
      ]);
      const text = execFileSync(command, args, { encoding: "utf8" });
      return new Map(
        text.trim().split("\n").map((line) => {
          const space = line.indexOf(" ");
          return [line.slice(space + 1), Number(line.slice(0, space))];
        }),
      );
    })();
    measured.set(run, found);
  }
  return found;
}

function nativePiece(name: string): Case {
  return {
    name,
    async measure(run) {
      const value = (await nativeFloor(run)).get(name);
      if (value === undefined) throw new Error(`Not measured here: ${name}`);
      return [{ value, unit: "nanoseconds" }];
    },
  };
}

/** The least of ten stretches: others' work only adds. */
function leastOf(action: () => void, milliseconds: number): number {
  const calls = 1000;
  let least = Infinity;
  for (let stretch = 0; stretch < 10; stretch++) {
    const began = performance.now();
    let count = 0;
    let now = began;
    while (now - began < milliseconds / 10) {
      for (let i = 0; i < calls; i++) action();
      count += calls;
      now = performance.now();
    }
    least = Math.min(least, (now - began) * 1e6 / count);
  }
  return least;
}

const typeScriptPieces: Case[] = [
  {
    name: "a call of the core from TypeScript (that does nothing)",
    measure: (run) =>
      Promise.resolve([{
        value: leastOf(() => core.coreHash(), run.runMs),
        unit: "nanoseconds",
      }]),
  },
  {
    name: "a call for an eventfd from TypeScript, and taken",
    measure(run) {
      const fd = core.eventfdCreate();
      const value = leastOf(() => {
        core.eventfdSignal(fd);
        core.eventfdTake(fd);
      }, run.runMs);
      core.descriptorClose(fd);
      return Promise.resolve([{ value, unit: "nanoseconds" }]);
    },
  },
];

export const floor: Section = {
  name: "floor",
  about: "The floor of this machine",
  columns: ["least"],
  cases: [...nativePieces.map(nativePiece), ...typeScriptPieces],
};
