/**
 * Packed rings beside split ones: the same back-end, the same driver, in turns.
 *
 * @module
 */

import type { Load, LoadFigures } from "./load.ts";
import { LoadGenerator } from "./load.ts";
import { compare } from "./measure.ts";
import { startOurs } from "./peers.ts";

/** One row: requests per second with a packed and with a split ring. */
export interface FormatRates {
  readonly name: string;
  readonly packed: number;
  readonly split: number;
  readonly ratio: number;
}

const read = {
  operation: "read",
  requestBytes: 4096,
  isRandom: true,
  spins: true,
} as const;

/** A null disk, with indirect tables and with descriptors in the ring. */
export async function formatRates(
  rounds: number,
  durationMs: number,
): Promise<FormatRates[]> {
  const peer = await startOurs({ kind: "null", size: 2 ** 30 }, 1);
  const rows: FormatRates[] = [];
  try {
    for (const indirect of [true, false]) {
      // Three descriptors each: 128 requests of them need 384.
      const options = { indirect, queueSize: indirect ? 256 : 512 };
      const split = await LoadGenerator.open(peer.socketPath, options);
      const packed = await LoadGenerator.open(peer.socketPath, {
        ...options,
        packed: true,
      });
      for (const depth of [1, 32, 128]) {
        const load: Load = { ...read, depth, durationMs };
        const rate = (generator: LoadGenerator) => () =>
          rateOf(generator.run(load));
        rate(packed)();
        rate(split)();
        const { a, b, ratio } = compare(rate(packed), rate(split), rounds);
        const how = indirect ? "indirect" : "direct";
        rows.push({
          name: `null disk, 4 KiB reads, ${how}, depth ${depth}`,
          packed: a,
          split: b,
          ratio,
        });
      }
      await split.close();
      await packed.close();
    }
  } finally {
    await peer.stop();
  }
  return rows;
}

function rateOf({ errors, perSecond }: LoadFigures): number {
  if (errors > 0) throw new Error(`${errors} I/O errors`);
  return perSecond;
}
