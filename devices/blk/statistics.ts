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

/** Counters of one isolate, rounded up to cache lines. */
const blockSize = 16;
const blockBytes = blockSize * 8;
/** Isolates that count at the same time; what is more shares the last. */
const blockCount = 32;

/**
 * The counters of one disk. Those of a kind count what succeeded. Each isolate
 * that serves the disk counts on its own; the sum is what is told.
 */
export class BlkStatistics {
  /** For the device: a counter is one element, so that it is never boxed. */
  readonly counts: Float64Array;
  /** What it counts in, for the isolates of Workers. */
  readonly memory: SharedArrayBuffer;
  readonly #all: Float64Array;
  readonly #owned: Int32Array;
  readonly #block: number;

  /** @param memory that of another isolate */
  constructor(memory?: SharedArrayBuffer) {
    const headBytes = blockCount * 4;
    this.memory = memory ??
      new SharedArrayBuffer(headBytes + blockCount * blockBytes);
    this.#owned = new Int32Array(this.memory, 0, blockCount);
    this.#all = new Float64Array(this.memory, headBytes);
    this.#block = this.#take();
    const first = this.#block * blockSize;
    this.counts = this.#all.subarray(first, first + blockSize);
  }

  #take(): number {
    for (let block = 0; block < blockCount - 1; block++) {
      if (Atomics.compareExchange(this.#owned, block, 0, 1) === 0) return block;
    }
    return blockCount - 1;
  }

  /** This isolate counts no more; another one may go on where it was. */
  leave(): void {
    Atomics.store(this.#owned, this.#block, 0);
  }

  /** The counters as they are now. */
  snapshot(): BlkCounts {
    const entries = Object.entries(Counter).map(([name, at]) => {
      let sum = 0;
      for (let block = 0; block < blockCount; block++) {
        sum += this.#all[block * blockSize + at];
      }
      return [name, sum] as const;
    });
    const isRequest = (name: string) => !name.endsWith("Bytes");
    const requests = entries.reduce(
      (sum, [name, count]) => isRequest(name) ? sum + count : sum,
      0,
    );
    return { requests, ...Object.fromEntries(entries) } as unknown as BlkCounts;
  }
}
