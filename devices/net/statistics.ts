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

function named(counts: Float64Array): NetCounts {
  return Object.fromEntries(
    Object.entries(offsets).map(([name, offset]) => [name, counts[offset / 8]]),
  ) as unknown as NetCounts;
}

/** The counters of one device, all its front-ends together. */
export class NetStatistics {
  /** By queue pair: frames that guests have sent. */
  readonly fromGuest: readonly Float64Array<ArrayBuffer>[];
  /** By queue pair: frames that were put into guests' buffers. */
  readonly toGuest: readonly Float64Array<ArrayBuffer>[];

  /** For the device. */
  constructor(pairCount: number) {
    const make = () =>
      Array.from({ length: pairCount }, () => new Float64Array(byteSize / 8));
    this.fromGuest = make();
    this.toGuest = make();
  }

  /** The counters as they are now, of one queue pair or of all together. */
  snapshot(pair?: number): { fromGuest: NetCounts; toGuest: NetCounts } {
    const of = (list: readonly Float64Array[]) => {
      if (pair !== undefined) return named(list[pair]);
      const sum = new Float64Array(byteSize / 8);
      for (const counts of list) counts.forEach((n, i) => sum[i] += n);
      return named(sum);
    };
    return { fromGuest: of(this.fromGuest), toGuest: of(this.toGuest) };
  }
}
