/**
 * What guest memory in many regions costs: requests are spread over all of
 * them.
 *
 * @module
 */

import { execFileSync } from "node:child_process";
import { ours, reads, withAll } from "../comparison.ts";
import { inTurns, medianOf, medianRatio } from "../measure.ts";
import { backendCpu, native, pinned } from "../programs.ts";
import type { Case, Figure, Section } from "../section.ts";

const regionCounts = [1, 64, 509] as const;
const last = regionCounts.length - 1;

function inTheCore(segments: number): Case {
  return {
    name: `pop and push in the core alone, ${segments} x 4 KiB`,
    async measure(run): Promise<Figure[]> {
      const program = await native("ring");
      const turns = regionCounts.map((regions) => () => {
        const [command, ...args] = pinned(String(backendCpu), [
          ...program,
          ...[Math.ceil(run.runMs / 4), regions, segments].map(String),
        ]);
        const answer = execFileSync(command, args, { encoding: "utf8" });
        return answer.split(" ").reduce((sum, part) => sum + Number(part), 0);
      });
      const found = await inTurns(turns, run.rounds);
      // It says the least already: others' work only adds.
      return figures(found, "nanoseconds", medianRatio(found, last, 0));
    },
  };
}

function endToEnd(depth: number): Case {
  // 60 KiB each: 128 of them cover the generator's memory.
  const load = { ...reads, requestBytes: 60 << 10, segments: 4, depth };
  return {
    name: `null disk, reads of 4 buffers, depth ${depth}`,
    measure: (run) =>
      withAll(
        run,
        regionCounts.map((regions) => ours("null", {}, { regions })),
        async (all) => {
          const turns = all.map((one) => () =>
            one.run({ ...load, durationMs: run.runMs }).perSecond
          );
          for (const turn of turns) turn();
          const found = await inTurns(turns, run.rounds);
          return figures(found, "perSecond", medianRatio(found, last, 0));
        },
      ),
  };
}

function figures(
  found: number[][],
  unit: "perSecond" | "nanoseconds",
  ratio: number,
): Figure[] {
  return [
    ...regionCounts.map((_, i) => ({ value: medianOf(found, i), unit })),
    { value: ratio, unit: "ratio" },
  ];
}

export const translation: Section = {
  name: "translation",
  about: "Guest memory in 1, 64 and 509 regions; per request, and per second",
  columns: ["1 region", "64 regions", "509 regions", "509 by 1"],
  cases: [...[1, 4].map(inTheCore), ...[32, 128].map(endToEnd)],
};
