/**
 * What a request costs on the processor, whoever waits for it: time of all of
 * the back-end's threads, by requests. The driver sleeps, as guests do, so that
 * the calls are in it.
 *
 * @module
 */

import {
  ours,
  reads,
  type Start,
  storageDaemon,
  withAll,
} from "../comparison.ts";
import { inTurns, medianOf } from "../measure.ts";
import { storageDaemonMissing } from "../peers.ts";
import { processorTime } from "../processes.ts";
import type { Case, Section } from "../section.ts";
import { depths } from "./disks.ts";

const starts: Record<string, Start> = {
  "event loop": ours("null"),
  "Worker sleeps": ours("null", {
    service: { workers: 1, pollMicroseconds: 0 },
  }),
  "Worker spins": ours("null", {
    service: { workers: 1, pollMicroseconds: 200 },
  }),
  "storage daemon": storageDaemon("null"),
};

function row(depth: number): Case {
  return {
    name: `null disk, 4 KiB reads, depth ${depth}`,
    measure: (run) =>
      withAll(run, Object.values(starts), async (all) => {
        const turns = all.map((one) => () => {
          const before = processorTime(one.pid!);
          const { requests } = one.run({
            ...reads,
            spins: false,
            depth,
            durationMs: run.runMs,
          });
          return (processorTime(one.pid!) - before) / requests;
        });
        for (const turn of turns) turn();
        const found = await inTurns(turns, run.rounds);
        return all.map((_, i) => ({
          value: medianOf(found, i),
          unit: "nanoseconds",
        }));
      }),
  };
}

export const processor: Section = {
  name: "processor",
  about: "Processor time per request, of all of the back-end's threads",
  columns: Object.keys(starts),
  missing: storageDaemonMissing,
  cases: depths.map(row),
};
