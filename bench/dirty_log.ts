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
} from "../frontend/mod.ts";
import { LoadGenerator } from "./load.ts";
import { median } from "./measure.ts";
import { startOurs } from "./peers.ts";

/** Requests per second of one kind of load. */
export interface LogRow {
  readonly name: string;
  readonly without: number;
  readonly negotiated: number;
  readonly logging: number;
  /** `logging` by `without`, the median of the rounds. */
  readonly ratio: number;
}

const logShmfd = featureMask(ProtocolFeature.LOG_SHMFD);
const sliceMs = 50;

/** The rows, each of `rounds` runs of `runMs` in turns. */
export async function logRates(
  rounds: number,
  runMs: number,
): Promise<LogRow[]> {
  const peer = await startOurs({ kind: "null", size: 2 ** 30 }, 1);
  const rows: LogRow[] = [];
  try {
    for (const packed of [false, true]) {
      for (const depth of [32, 128]) {
        const open = (protocolFeatures?: bigint) =>
          LoadGenerator.open(peer.socketPath, { packed, protocolFeatures });
        const generators = [
          await open(supportedProtocolFeatures & ~logShmfd),
          await open(),
          await open(),
        ];
        await generators[2].startLog();
        const once = (generator: LoadGenerator) => {
          const rates: number[] = [];
          for (let ms = 0; ms < runMs; ms += sliceMs) {
            const { perSecond } = generator.run({
              operation: "read",
              requestBytes: 4096,
              isRandom: true,
              spins: true,
              depth,
              durationMs: sliceMs,
            });
            rates.push(perSecond);
            generator.takeDirty();
          }
          return median(rates);
        };
        for (const generator of generators) once(generator);
        const results: number[][] = [];
        for (let round = 0; round < rounds; round++) {
          const rates = [0, 0, 0];
          // A different one begins each time.
          for (let i = 0; i < 3; i++) {
            const which = (round + i) % 3;
            rates[which] = once(generators[which]);
          }
          results.push(rates);
        }
        for (const generator of generators) await generator.close();
        const of = (which: number) => median(results.map((r) => r[which]));
        rows.push({
          name: `null disk, ${packed ? "packed" : "split"}, depth ${depth}`,
          without: of(0),
          negotiated: of(1),
          logging: of(2),
          ratio: median(
            results.map(([without, , logging]) => logging / without),
          ),
        });
      }
    }
  } finally {
    await peer.stop();
  }
  return rows;
}
