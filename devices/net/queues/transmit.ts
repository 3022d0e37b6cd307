/**
 * The queue by which a guest sends.
 *
 * @module
 */

import { core } from "../../../ffi/core.ts";
import type { Queue } from "../../../session/queue.ts";
import {
  activate,
  deactivate,
  isActive,
  type Turn,
} from "../../../virtqueue/poller.ts";
import { type Frames, sharedFrames } from "../frames.ts";
import { droppedCounter } from "../statistics.ts";
import {
  FrameRing,
  idlePollMs,
  missPollMs,
  progress,
  scratch,
} from "./frame_ring.ts";

/**
 * What is sent by a disabled ring is lost; but a ring that has just been set up
 * is disabled too, for the moment until the front-end enables it. So nothing is
 * thrown away before a ring has been disabled for so long, in milliseconds.
 */
const enableMs = 100;

/** Who gets the frames of a transmit queue. */
export interface TransmitClient {
  /** Null: it fetches them, and wants to be woken. */
  readonly receive: ((frames: Frames) => void) | null;
  /** See `NetEnd.endsByEvents`. */
  readonly endsByEvents: boolean;
  isCongested(): boolean;
  wake(): void;
}

/** One turn of a queue ends after so many chains or bytes. */
const chainsPerTurn = 256;
const bytesPerTurn = 8 << 20;
/**
 * How often an empty ring is looked at again after work, before the event loop
 * gets its turn: about a microsecond.
 */
const looksPerTurn = 50;

/** The queue by which a guest sends. */
export class TransmitQueue extends FrameRing implements Turn {
  readonly pollMicroseconds: number;
  readonly #client: TransmitClient;
  readonly #flags: number;
  readonly #counts: Float64Array;
  /** Frames wait in the ring until the end takes some. */
  #isHeld = false;
  #isInTurn = false;
  #isWakeWanted = false;
  /** Disabled for long enough. */
  #isDiscarding = false;

  /**
   * @param headerBytes of the guest's header
   * @param flags what the guest may leave undone, as `net_receive` takes it
   * @throws Vhost2Error SYSTEM when the ring cannot be used as it is
   */
  constructor(queue: Queue, options: {
    readonly headerBytes: number;
    readonly flags: number;
    readonly counts: Float64Array;
    readonly pollMicroseconds: number | undefined;
    readonly client: TransmitClient;
  }) {
    super(queue, options.headerBytes, options.client.endsByEvents);
    this.#flags = options.flags;
    this.#counts = options.counts;
    this.#client = options.client;
    this.pollMicroseconds = options.pollMicroseconds ??
      queue.pollMicroseconds ?? 50;
    if (this.#client.receive !== null) activate(this);
  }

  /** The driver kicked, or the end takes frames again. */
  kick(): void {
    if (!this.isUsable) return;
    this.isMissing = false;
    if (this.#isHeld) return;
    if (this.#client.receive === null) {
      if (!this.#isWakeWanted) return;
      this.#isWakeWanted = false;
      core.ringDisarm(this.ring);
      return this.#client.wake();
    }
    if (isActive(this) || this.#isInTurn) return;
    core.ringDisarm(this.ring);
    activate(this);
    this.turn();
  }

  /** The end takes frames again. */
  resume(): void {
    if (!this.#isHeld || this.#client.isCongested()) return;
    this.#isHeld = false;
    if (this.isUsable && !this.#isInTurn) activate(this);
  }

  /**
   * Takes a burst out of the ring; returns how many chains that were, whatever
   * was in them. How many frames is `frames.count`.
   */
  take(frames: Frames): number {
    frames.clear();
    if (!this.isUsable || this.isMissing || this.#awaitsEnable()) return 0;
    const result = core.netReceive(
      this.ring,
      scratch,
      scratch.length,
      frames.words,
      frames.maxFrames,
      frames.bytes,
      frames.bytes.length,
      this.#flags,
      this.#counts,
    );
    if (!this.settle(result)) return 0;
    frames.count = scratch[progress.frames];
    if (!this.queue.isEnabled) {
      // A disabled ring has no side effects: what is sent is lost.
      this.#counts[droppedCounter] += frames.count;
      frames.count = 0;
    }
    return scratch[progress.chains];
  }

  /** For ends that fetch: asks for `wake`; false when there is work. */
  wantWake(): boolean {
    if (!this.isUsable) return true;
    this.#isWakeWanted = true;
    if (this.#awaitsEnable()) return true;
    if (this.queue.isPolled) {
      this.later(this.#pauseMs, () => this.kick());
      return true;
    }
    // The kick that ends it comes without being asked for.
    if (this.isMissing || this.arm()) return true;
    this.#isWakeWanted = false;
    return false;
  }

  #awaitsEnable(): boolean {
    if (this.queue.isEnabled) this.#isDiscarding = false;
    if (this.queue.isEnabled || this.#isDiscarding) return false;
    if (!this.isTimed) {
      this.later(enableMs, () => {
        this.#isDiscarding = true;
        this.kick();
      });
    }
    return true;
  }

  get #pauseMs(): number {
    return this.isMissing ? missPollMs : idlePollMs;
  }

  /** For the poller: a bounded number of chains and bytes. */
  turn(): boolean {
    const { receive } = this.#client;
    if (this.#isInTurn || this.isMissing || receive === null) return false;
    this.#isInTurn = true;
    const frames = sharedFrames();
    // Never more than the queue holds: what it made available is done then.
    const most = Math.min(chainsPerTurn, this.queue.size);
    let chains = 0;
    let bytes = 0;
    let looks = 0;
    try {
      while (chains < most && bytes < bytesPerTurn && this.isUsable) {
        if (this.#client.isCongested()) {
          this.#isHeld = true;
          break;
        }
        const taken = this.take(frames);
        if (taken > 0) {
          chains += taken;
          looks = looksPerTurn;
          if (frames.count === 0) continue;
          bytes += frames.offset(frames.count - 1);
          receive(frames);
        } else if (--looks < 0) break;
      }
    } catch (error) {
      // A bug of the end's must not take the other queues' turns away.
      this.isBroken = true;
      this.queue.fail(`its end failed: ${error}`);
    } finally {
      this.#isInTurn = false;
    }
    return chains > 0;
  }

  /** For the poller: kicks are wanted again; false when there is work. */
  rest(): boolean {
    if (!this.isUsable) return true;
    // Held: `resume` makes it active again, no kick is needed.
    if (this.#isHeld || this.#awaitsEnable()) return true;
    if (this.queue.isPolled) {
      this.later(this.#pauseMs, () => {
        this.isMissing = false;
        activate(this);
      });
      return true;
    }
    return this.isMissing || this.arm();
  }

  /** Takes no more. */
  stop(): void {
    deactivate(this);
    this.release();
  }
}
