/**
 * Counters of a disk, cheap enough to be always on.
 *
 * @module
 */

/** Where each counter is in `BlkStatistics.counts`. */
export const Counter = {
  reads: 0,
  readBytes: 1,
  writes: 2,
  writtenBytes: 3,
  flushes: 4,
  discards: 5,
  discardedBytes: 6,
  writeZeroes: 7,
  zeroedBytes: 8,
  getIds: 9,
  ioErrors: 10,
  unsupported: 11,
  malformed: 12,
} as const;

/** What a disk has served so far, all its connections together. */
export interface BlkCounts {
  /** Requests answered, with errors. */
  requests: number;
  reads: number;
  readBytes: number;
  writes: number;
  writtenBytes: number;
  flushes: number;
  discards: number;
  discardedBytes: number;
  writeZeroes: number;
  zeroedBytes: number;
  getIds: number;
  /** Answered with an I/O error. */
  ioErrors: number;
  /** Answered with "unsupported". */
  unsupported: number;
  /** Without a status byte: could not be answered at all. */
  malformed: number;
}

/** The counters of one disk. Those of a kind count what succeeded. */
export class BlkStatistics {
  /** For the device: a counter is one element, so that it is never boxed. */
  readonly counts: Float64Array<ArrayBuffer> = new Float64Array(
    Object.keys(Counter).length,
  );

  /** The counters as they are now. */
  snapshot(): BlkCounts {
    const { counts } = this;
    const entries = Object.entries(Counter).map(([name, at]) =>
      [name, counts[at]] as const
    );
    const isRequest = (name: string) => !name.endsWith("Bytes");
    const requests = entries.reduce(
      (sum, [name, count]) => isRequest(name) ? sum + count : sum,
      0,
    );
    return { requests, ...Object.fromEntries(entries) } as unknown as BlkCounts;
  }
}
