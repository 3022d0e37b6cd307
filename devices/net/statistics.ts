/**
 * Counters of a network device, per queue and direction, as DPDK's vhost
 * driver counts; cheap enough to be always on.
 *
 * @module
 */

import { layouts } from "../../ffi/abi.gen.ts";

/** Counters of one direction of one queue pair. */
export interface NetCounts {
  packets: number;
  /** Of frames, without `virtio_net_hdr`. */
  bytes: number;
  multicast: number;
  broadcast: number;
  /** Packets by their bytes. */
  below64: number;
  exactly64: number;
  to127: number;
  to255: number;
  to511: number;
  to1023: number;
  to1518: number;
  above1518: number;
  /** Frames that broke a rule: not delivered. */
  errors: number;
  /** Correct frames not delivered: no buffer, a queue that is disabled. */
  dropped: number;
}

const field = layouts.NetCounts;
const { byteSize, ...offsets } = field;
/** Where `dropped` is in a queue's counters. */
export const droppedCounter: number = field.dropped / 8;

/** Counters of one direction of one queue, rounded up to cache lines. */
const stride = Math.ceil(byteSize / 64) * 8;
/** Isolates that count at the same time; what is more shares the last. */
const blockCount = 32;

/** In memory that Workers can have too: not resizable, whoever made it. */
type Counters = Float64Array<SharedArrayBuffer>;

/**
 * The counters of one device, all its front-ends together. Each isolate that
 * serves the device counts on its own; the sum is what is told.
 */
export class NetStatistics {
  /** By queue pair: frames that guests have sent, as counted here. */
  readonly fromGuest: readonly Counters[];
  /** By queue pair: frames put into guests' buffers, as counted here. */
  readonly toGuest: readonly Counters[];
  /** What it counts in, for the isolates of Workers. */
  readonly memory: SharedArrayBuffer;
  readonly #owned: Int32Array;
  readonly #all: Counters;
  readonly #pairCount: number;
  readonly #block: number;

  /** @param memory that of another isolate */
  constructor(pairCount: number, memory?: SharedArrayBuffer) {
    const headBytes = blockCount * 4;
    const blockSize = 2 * pairCount * stride;
    this.memory = memory ??
      new SharedArrayBuffer(headBytes + blockCount * blockSize * 8);
    this.#owned = new Int32Array(this.memory, 0, blockCount);
    this.#all = new Float64Array(this.memory, headBytes);
    this.#pairCount = pairCount;
    this.#block = this.#take();
    const own = (direction: number) =>
      Array.from(
        { length: pairCount },
        (_, pair) => this.#counters(this.#block, direction, pair),
      );
    this.fromGuest = own(0);
    this.toGuest = own(1);
  }

  #take(): number {
    for (let block = 0; block < blockCount - 1; block++) {
      if (Atomics.compareExchange(this.#owned, block, 0, 1) === 0) return block;
    }
    return blockCount - 1;
  }

  #counters(block: number, direction: number, pair: number): Counters {
    const row = (block * 2 + direction) * this.#pairCount + pair;
    return this.#all.subarray(row * stride, (row + 1) * stride);
  }

  /** This isolate counts no more; another one may go on where it was. */
  leave(): void {
    Atomics.store(this.#owned, this.#block, 0);
  }

  /** The counters as they are now, of one queue pair or of all together. */
  snapshot(pair?: number): { fromGuest: NetCounts; toGuest: NetCounts } {
    return { fromGuest: this.#sum(0, pair), toGuest: this.#sum(1, pair) };
  }

  #sum(direction: number, pair: number | undefined): NetCounts {
    const sum = new Float64Array(stride);
    const pairs = pair === undefined
      ? Array.from({ length: this.#pairCount }, (_, i) => i)
      : [pair];
    for (let block = 0; block < blockCount; block++) {
      for (const one of pairs) {
        this.#counters(block, direction, one).forEach((n, i) => sum[i] += n);
      }
    }
    return Object.fromEntries(
      Object.entries(offsets).map(([name, offset]) => [name, sum[offset / 8]]),
    ) as unknown as NetCounts;
  }
}
