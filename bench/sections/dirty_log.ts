/**
 * What the dirty log of a migration costs: the null disk without LOG_SHMFD,
 * with it, and while everything is logged and the log is taken every 50 ms.
 *
 * @module
 */

import {
  featureMask,
  ProtocolFeature,
  supportedProtocolFeatures,
} from "../../frontend/mod.ts";
import { diskOf, reads } from "../comparison.ts";
import { LoadGenerator } from "../generator.ts";
import { inTurns, median, medianOf, medianRatio } from "../measure.ts";
import { startOurs } from "../peers.ts";
import type { Case, Figure, Run, Section } from "../section.ts";

const logShmfd = featureMask(ProtocolFeature.LOG_SHMFD);
const sliceMs = 50;

/** The median rate of slices, between which the log is taken. */
function once(generator: LoadGenerator, depth: number, run: Run): number {
  const rates: number[] = [];
  const durationMs = Math.min(sliceMs, run.runMs);
  for (let ms = 0; ms < run.runMs; ms += sliceMs) {
    const { perSecond } = generator.run({ ...reads, depth, durationMs });
    rates.push(perSecond);
    generator.takeDirty();
  }
  return median(rates);
}

function row(packed: boolean, depth: number): Case {
  return {
    name: `null disk, ${packed ? "packed" : "split"}, depth ${depth}`,
    async measure(run): Promise<Figure[]> {
      const peer = await startOurs({ disk: diskOf("null", run) });
      const generators: LoadGenerator[] = [];
      try {
        for (
          const protocolFeatures of [
            supportedProtocolFeatures & ~logShmfd,
            supportedProtocolFeatures,
            supportedProtocolFeatures,
          ]
        ) {
          const options = { packed, protocolFeatures };
          const path = peer.socketPath();
          generators.push(await LoadGenerator.open(path, options));
        }
        await generators[2].startLog();
        const turns = generators.map((generator) => () =>
          once(generator, depth, run)
        );
        for (const turn of turns) turn();
        const found = await inTurns(turns, run.rounds);
        return [
          { value: medianOf(found, 0), unit: "perSecond" },
          { value: medianOf(found, 1), unit: "perSecond" },
          { value: medianOf(found, 2), unit: "perSecond" },
          { value: medianRatio(found, 2, 0), unit: "ratio" },
        ];
      } finally {
        for (const generator of generators) await generator.close();
        await peer.stop();
      }
    },
  };
}

export const dirtyLog: Section = {
  name: "dirty log",
  about: "The dirty log of a migration, of this library",
  columns: ["no log", "log, off", "logging", "logging by no"],
  cases: [false, true].flatMap((packed) =>
    [32, 128].map((depth) => row(packed, depth))
  ),
};
