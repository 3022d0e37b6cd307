/**
 * Frames in bursts, fetched and sent by code that polls: the fastest end, in
 * the manner of DPDK's enqueue and dequeue.
 *
 * @module
 */

import { Vhost2Error } from "../../../ffi/errors.ts";
import type { Frames } from "../frames.ts";
import type { NetEnd, NetLink } from "./end.ts";

/** An end whose user fetches and sends frames; one front-end at a time. */
export interface BurstEnd extends NetEnd {
  /** Whether a front-end is connected. */
  readonly isConnected: boolean;
  /** Queue pairs at most; 0 while no front-end is connected. */
  readonly pairCount: number;
  /** `Offload` bits that the guest takes. */
  readonly guestOffloads: number;
  /**
   * Takes what the guest has sent on a queue pair, at most one burst.
   *
   * @param frames emptied, then filled
   * @returns `frames.count`
   */
  receive(frames: Frames, pair?: number): number;
  /**
   * Gives the guest frames `first` to `first + count` of a burst.
   *
   * @returns how many were taken: fewer when the guest lacks buffers
   */
  send(frames: Frames, pair?: number, first?: number, count?: number): number;
  /**
   * Fulfilled when the guest may have sent something on any queue pair, or a
   * front-end has come or gone. Call it after `receive` has returned 0.
   */
  whenReadable(): Promise<void>;
}

/**
 * An end for code that polls.
 *
 * @param options.offloads `Offload` bits of frames that the code takes and may
 * send; 0 unless given: all frames are complete
 *
 * @example Everything that comes on a card goes back
 * ```ts
 * import { burstEnd, Frames, netDevice } from "vhost2";
 * const end = burstEnd();
 * const nic = netDevice({ end });
 * async function serve(signal: AbortSignal) {
 *   const frames = new Frames();
 *   while (!signal.aborted) {
 *     if (end.receive(frames) === 0) await end.whenReadable();
 *     else end.send(frames);
 *   }
 * }
 * const stop = AbortSignal.abort();
 * await serve(stop);
 * await nic.close();
 * ```
 */
export function burstEnd(options: { offloads?: number } = {}): BurstEnd {
  let link: NetLink | undefined;
  let waiters: (() => void)[] = [];
  const wake = () => {
    const woken = waiters;
    waiters = [];
    for (const resolve of woken) resolve();
  };
  return {
    name: "burst",
    offloads: options.offloads ?? 0,
    get isConnected() {
      return link !== undefined;
    },
    get pairCount() {
      return link?.pairCount ?? 0;
    },
    get guestOffloads() {
      return link?.guestOffloads ?? 0;
    },
    receive(frames, pair = 0) {
      if (link !== undefined) return link.receive(frames, pair);
      frames.clear();
      return 0;
    },
    send(frames, pair = 0, first = 0, count = frames.count - first) {
      return link?.send(frames, pair, first, count) ?? 0;
    },
    whenReadable() {
      const pairs = link?.pairCount ?? 0;
      for (let pair = 0; pair < pairs; pair++) {
        if (!link!.wantWake(pair)) return Promise.resolve();
      }
      return new Promise((resolve) => waiters.push(resolve));
    },
    open(opened) {
      if (link !== undefined) {
        throw new Vhost2Error(
          "IN_USE",
          `Cannot connect ${opened.name}: the burst end has a front-end`,
        );
      }
      link = opened;
      wake();
      return {
        wake,
        close() {
          link = undefined;
          wake();
        },
      };
    },
    close: wake,
  };
}
