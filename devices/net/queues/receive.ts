/**
 * The queue by which a guest receives.
 *
 * @module
 */

import { core } from "../../../ffi/core.ts";
import type { Queue } from "../../../session/queue.ts";
import { Frames } from "../frames.ts";
import { droppedCounter } from "../statistics.ts";
import {
  FrameRing,
  idlePollMs,
  missPollMs,
  progress,
  scratch,
} from "./frame_ring.ts";

/** Who sends by a receive queue. */
export interface ReceiveClient {
  /** See `NetEnd.endsByEvents`. */
  readonly endsByEvents: boolean;
  /** The queue takes frames: from the start, or again after some were lacking. */
  ready(): void;
  /** It takes none any more, until the next `ready`. */
  unready(): void;
}

/** The queue by which a guest receives. */
export class ReceiveQueue extends FrameRing {
  readonly #flags: number;
  readonly #counts: Float64Array;
  readonly #client: ReceiveClient;
  #isReadyWanted = false;
  #wasEnabled = false;
  /**
   * Frames that came before it was known where the buffers for them are; the
   * first `#taken` are done with.
   */
  readonly #waiting: Frames | null;
  #taken = 0;

  /**
   * It is ready after the first kick, which follows each start.
   *
   * @param flags as `net_send` takes them
   * @throws Vhost2Error SYSTEM when the ring cannot be used as it is
   */
  constructor(queue: Queue, options: {
    readonly flags: number;
    readonly counts: Float64Array;
    readonly client: ReceiveClient;
  }) {
    super(queue, 0, options.client.endsByEvents);
    this.#flags = options.flags;
    this.#counts = options.counts;
    this.#client = options.client;
    this.#waiting = this.isTranslated ? new Frames() : null;
  }

  /** A disabled ring gets no frames. */
  override get isUsable(): boolean {
    return super.isUsable && this.queue.isEnabled;
  }

  /**
   * The driver kicked: it gave buffers. Or the queue was enabled or disabled,
   * or a translation has come.
   */
  kick(): void {
    this.isMissing = false;
    const { isUsable } = this;
    if (isUsable !== this.#wasEnabled) {
      this.#wasEnabled = isUsable;
      if (!isUsable) return this.#client.unready();
      this.#isReadyWanted = true;
    }
    if (!isUsable) return;
    if (this.#waiting !== null) {
      this.#putWaiting(this.#waiting);
      if (!this.isMissing) this.#lookAhead();
    }
    if (!this.#isReadyWanted) return;
    this.#isReadyWanted = false;
    core.ringDisarm(this.ring);
    this.#client.ready();
  }

  /**
   * Asks where the buffers are that the driver has given, before there are
   * frames for them.
   */
  #lookAhead(): void {
    const look = () => core.netLookAhead(this.ring, scratch, scratch.length);
    let result = look();
    // Where there are none a kick tells of the first; what comes behind others
    // is found with the next frame.
    if (result === 0 && core.ringArm(this.ring) > 0) result = look();
    this.settleMisses(result);
    if (result < 0) this.break(result);
  }

  /** Puts frames into the driver's buffers; returns how many are done with. */
  send(frames: Frames, first: number, count: number): number {
    const waiting = this.#waiting;
    if (waiting === null) return this.#put(frames, first, count);
    if (!this.isUsable) return 0;
    this.#putWaiting(waiting);
    let done = waiting.count > 0 ? 0 : this.#put(frames, first, count);
    if (!this.isMissing) this.#lookAhead();
    // There are buffers: only where is not known yet.
    while (this.isMissing && done < count) {
      if (!waiting.addFrom(frames, first + done)) break;
      done++;
    }
    if (done < count) this.#isReadyWanted = true;
    if (this.isMissing && this.queue.isPolled) {
      this.later(missPollMs, () => this.kick());
    }
    return done;
  }

  /** What waits goes first. */
  #putWaiting(waiting: Frames): void {
    const left = waiting.count - this.#taken;
    if (left > 0) this.#taken += this.#put(waiting, this.#taken, left);
    if (this.#taken === waiting.count) this.#forgetWaiting(waiting);
  }

  #forgetWaiting(waiting: Frames): void {
    this.#counts[droppedCounter] += waiting.count - this.#taken;
    this.#taken = 0;
    waiting.clear();
  }

  #put(frames: Frames, first: number, count: number): number {
    let done = 0;
    let isStuck = false;
    while (this.isUsable && !this.isMissing && done < count) {
      const result = core.netSend(
        this.ring,
        scratch,
        scratch.length,
        frames.words,
        first + done,
        count - done,
        frames.bytes,
        frames.bytes.length,
        this.#flags,
        this.#counts,
      );
      const isWhole = this.settle(result);
      const sent = scratch[progress.frames];
      done += sent;
      if (!isWhole || done === count) break;
      if (sent > 0) isStuck = false;
      this.#isReadyWanted = true;
      // Buffers that come while we ask for a kick bring none. Those that are
      // there and do not suffice for the next frame do not ask for one either.
      if (isStuck || this.queue.isPolled) {
        this.later(idlePollMs, () => this.kick());
        break;
      }
      if (this.arm()) break;
      isStuck = true;
    }
    return done;
  }

  /** Takes no more. */
  stop(): void {
    if (this.#waiting !== null) this.#forgetWaiting(this.#waiting);
    const wasReady = this.#wasEnabled;
    this.#wasEnabled = false;
    this.release();
    if (wasReady) this.#client.unready();
  }
}
