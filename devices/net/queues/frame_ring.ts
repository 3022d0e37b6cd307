/**
 * What both queues of a pair have in common: a ring that only the core's bursts
 * use. A call of the core pops, copies and gives back, so that nothing is in
 * flight between two of them and a queue stops at once.
 *
 * @module
 */

import { constants, layouts } from "../../../ffi/abi.gen.ts";
import { blocking } from "../../../ffi/blocking.ts";
import { core } from "../../../ffi/core.ts";
import { Errno } from "../../../ffi/errors.ts";
import { Held, noteHeld, noteReleased } from "../../../ffi/held.ts";
import { ringMisses } from "../../../ffi/iotlb.ts";
import type { Queue } from "../../../session/queue.ts";
import {
  brokenReason,
  createRing,
  lastAvailable,
} from "../../../virtqueue/ring.ts";

/** What the core leaves in the first words of the scratch area. */
export const progress = {
  frames: layouts.NetProgress.frames / 4,
  chains: layouts.NetProgress.chains / 4,
  call: layouts.NetProgress.call / 4,
};
const recordWords = layouts.Request.byteSize / 4 + 4;
/** The longest chain (1024 descriptors) with every one of them cut in two. */
const segmentWords = 2048 * layouts.Segment.byteSize / 4;

/** The isolate's: used up inside each call. */
export const scratch = new Uint32Array(
  layouts.NetProgress.byteSize / 4 +
    constants.netBurstMaximum * layouts.Completion.byteSize / 4 +
    constants.netBurstMaximum * recordWords + segmentWords,
);

/** Between two looks at a polled queue without work, in milliseconds. */
export const idlePollMs = 1;
/** The same while a polled queue waits for a translation. */
export const missPollMs = 100;

/** A started queue whose ring only bursts use. */
export class FrameRing {
  readonly queue: Queue;
  protected readonly ring: number;
  protected isOpen = true;
  protected isBroken = false;
  /** Its addresses are IOVAs. */
  protected readonly isTranslated: boolean;
  /**
   * The ring, or its next chain, waits for the IOTLB: nothing is done until a
   * kick, which comes with the translation.
   */
  protected isMissing = false;
  readonly #stopBlocking: () => void;
  #timer: ReturnType<typeof setTimeout> | undefined;

  /** @param endsByEvents whether a Worker may block while it is idle */
  protected constructor(
    queue: Queue,
    headerBytes: number,
    endsByEvents: boolean,
  ) {
    this.queue = queue;
    this.isTranslated = queue.addresses.space === "iova";
    this.ring = createRing(queue, { headerBytes, isResumed: true });
    noteHeld(Held.ring, this.ring, queue.runId);
    this.#stopBlocking = blocking.add(() =>
      !endsByEvents || this.#timer !== undefined
    );
    core.ringDisarm(this.ring);
  }

  get isUsable(): boolean {
    return this.isOpen && !this.isBroken;
  }

  /**
   * After a burst; whether the ring is still whole. What `progress` says was
   * done, was done either way.
   */
  protected settle(result: number): boolean {
    if (scratch[progress.call] !== 0) this.queue.call();
    const hasLooked = result < 0 || scratch[progress.chains] > 0;
    if (this.isTranslated && hasLooked) this.settleMisses(result);
    if (result >= 0) return true;
    this.break(result);
    return false;
  }

  /** Asks for what a call of the core has lacked, and for what it saw ahead. */
  protected settleMisses(result: number): void {
    if (result < 0 && result !== -Errno.EAGAIN) return;
    if (result === -Errno.EAGAIN) this.isMissing = true;
    const misses = ringMisses(this.ring);
    if (misses.length > 0) this.queue.missed(misses);
  }

  protected get isTimed(): boolean {
    return this.#timer !== undefined;
  }

  /** `action` is called in a while, unless the queue has stopped. */
  protected later(delayMs: number, action: () => void): void {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      this.#timer = undefined;
      action();
    }, delayMs);
  }

  protected break(errno: number): void {
    if (this.isBroken || errno === -Errno.EAGAIN) return;
    this.isBroken = true;
    // A fault of the memory is the session's to report, for all its queues.
    if (errno === -Errno.EFAULT) return;
    this.queue.fail(brokenReason(this.ring, errno));
  }

  /** Asks for a kick; false when there is something to take already. */
  protected arm(): boolean {
    const result = core.ringArm(this.ring);
    if (this.isTranslated && result < 0) this.settleMisses(result);
    if (result < 0) this.break(result);
    if (result <= 0) return true;
    core.ringDisarm(this.ring);
    return false;
  }

  /** Lets go of the ring, and keeps where it stopped. */
  protected release(): void {
    if (!this.isOpen) return;
    this.isOpen = false;
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#stopBlocking();
    noteReleased(Held.ring, this.ring);
    this.queue.availableIndex = lastAvailable(this.ring) ??
      this.queue.availableIndex;
    core.ringDestroy(this.ring);
  }
}
