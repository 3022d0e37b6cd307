/**
 * The transmit and receive queues of one pair, over the core's bursts: a call
 * of the core pops, copies and gives back, so that nothing is in flight
 * between two of them and a queue stops at once.
 *
 * @module
 */

import { constants, layouts } from "../../ffi/abi.gen.ts";
import { core } from "../../ffi/core.ts";
import { Errno } from "../../ffi/errors.ts";
import type { Queue } from "../../session/queue.ts";
import {
  activate,
  deactivate,
  isActive,
  type Turn,
} from "../../virtqueue/poller.ts";
import {
  brokenReason,
  createRing,
  lastAvailable,
} from "../../virtqueue/ring.ts";
import { type Frames, sharedFrames } from "./frames.ts";
import { droppedCounter } from "./statistics.ts";

/** What the core leaves in the first words of the scratch area. */
const progress = {
  frames: layouts.NetProgress.frames / 4,
  chains: layouts.NetProgress.chains / 4,
  call: layouts.NetProgress.call / 4,
};
const recordWords = layouts.Request.byteSize / 4 + 4;
/** The longest chain (1024 descriptors) with every one of them cut in two. */
const segmentWords = 2048 * layouts.Segment.byteSize / 4;

/** The isolate's: used up inside each call. */
const scratch = new Uint32Array(
  layouts.NetProgress.byteSize / 4 +
    constants.netBurstMaximum * layouts.Completion.byteSize / 4 +
    constants.netBurstMaximum * recordWords + segmentWords,
);

/** A started queue whose ring only bursts use. */
class FrameRing {
  readonly queue: Queue;
  protected readonly ring: number;
  protected isOpen = true;
  protected isBroken = false;

  protected constructor(queue: Queue, headerBytes: number) {
    this.queue = queue;
    this.ring = createRing(queue, { headerBytes, isResumed: true });
    core.ringDisarm(this.ring);
  }

  get isUsable(): boolean {
    return this.isOpen && !this.isBroken;
  }

  /** After a burst; whether the ring is still whole. */
  protected settle(result: number): boolean {
    if (scratch[progress.call] !== 0) this.queue.call();
    if (result >= 0) return true;
    this.break(result);
    return false;
  }

  protected break(errno: number): void {
    if (this.isBroken) return;
    this.isBroken = true;
    // A fault of the memory is the session's to report, for all its queues.
    if (errno === -Errno.EFAULT) return;
    this.queue.fail(brokenReason(this.ring, errno));
  }

  /** Asks for a kick; false when there is something to take already. */
  protected arm(): boolean {
    const result = core.ringArm(this.ring);
    if (result < 0) this.break(result);
    if (result <= 0) return true;
    core.ringDisarm(this.ring);
    return false;
  }

  /** Lets go of the ring, and keeps where it stopped. */
  protected release(): void {
    if (!this.isOpen) return;
    this.isOpen = false;
    this.queue.availableIndex = lastAvailable(this.ring) ??
      this.queue.availableIndex;
    core.ringDestroy(this.ring);
  }
}

/** Who gets the frames of a transmit queue. */
export interface TransmitClient {
  /** Null: it fetches them, and wants to be woken. */
  readonly receive: ((frames: Frames) => void) | null;
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
/** Between two looks at a polled queue without work, in milliseconds. */
const idlePollMs = 1;

/** The queue by which a guest sends. */
export class TransmitQueue extends FrameRing implements Turn {
  readonly pollMicroseconds: number;
  readonly #client: TransmitClient;
  readonly #flags: number;
  readonly #counts: Float64Array<ArrayBuffer>;
  /** Frames wait in the ring until the end takes some. */
  #isHeld = false;
  #isInTurn = false;
  #isWakeWanted = false;
  #pollTimer: ReturnType<typeof setTimeout> | undefined;

  /**
   * @param headerBytes of the guest's header
   * @param flags what the guest may leave undone, as `net_receive` takes it
   * @throws Vhost2Error SYSTEM when the ring cannot be used as it is
   */
  constructor(queue: Queue, options: {
    readonly headerBytes: number;
    readonly flags: number;
    readonly counts: Float64Array<ArrayBuffer>;
    readonly pollMicroseconds: number | undefined;
    readonly client: TransmitClient;
  }) {
    super(queue, options.headerBytes);
    this.#flags = options.flags;
    this.#counts = options.counts;
    this.#client = options.client;
    this.pollMicroseconds = options.pollMicroseconds ?? 50;
    if (this.#client.receive !== null) activate(this);
  }

  /** The driver kicked, or the end takes frames again. */
  kick(): void {
    if (!this.isUsable || this.#isHeld) return;
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
    if (!this.isUsable) return 0;
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
    if (this.queue.isPolled) {
      clearTimeout(this.#pollTimer);
      this.#pollTimer = setTimeout(() => this.kick(), idlePollMs);
      return true;
    }
    if (this.arm()) return true;
    this.#isWakeWanted = false;
    return false;
  }

  /** For the poller: a bounded number of chains and bytes. */
  turn(): boolean {
    const { receive } = this.#client;
    if (this.#isInTurn || receive === null) return false;
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
    if (this.#isHeld) return true;
    if (this.queue.isPolled) {
      clearTimeout(this.#pollTimer);
      this.#pollTimer = setTimeout(() => activate(this), idlePollMs);
      return true;
    }
    return this.arm();
  }

  /** Takes no more. */
  stop(): void {
    clearTimeout(this.#pollTimer);
    deactivate(this);
    this.release();
  }
}

/** The queue by which a guest receives. */
export class ReceiveQueue extends FrameRing {
  readonly #flags: number;
  readonly #counts: Float64Array<ArrayBuffer>;
  readonly #ready: () => void;
  #isReadyWanted = false;
  #wasEnabled: boolean;
  #pollTimer: ReturnType<typeof setTimeout> | undefined;

  /**
   * @param flags as `net_send` takes them
   * @param ready buffers came, after some were lacking
   * @throws Vhost2Error SYSTEM when the ring cannot be used as it is
   */
  constructor(queue: Queue, options: {
    readonly flags: number;
    readonly counts: Float64Array<ArrayBuffer>;
    readonly ready: () => void;
  }) {
    super(queue, 0);
    this.#flags = options.flags;
    this.#counts = options.counts;
    this.#ready = options.ready;
    this.#wasEnabled = queue.isEnabled;
  }

  /** A disabled ring gets no frames. */
  override get isUsable(): boolean {
    return super.isUsable && this.queue.isEnabled;
  }

  /** The driver kicked: it gave buffers. */
  kick(): void {
    const isChanged = this.#wasEnabled !== this.queue.isEnabled;
    this.#wasEnabled = this.queue.isEnabled;
    if (!this.isUsable || !(this.#isReadyWanted || isChanged)) return;
    this.#isReadyWanted = false;
    core.ringDisarm(this.ring);
    this.#ready();
  }

  /** Puts frames into the driver's buffers; returns how many are done with. */
  send(frames: Frames, first: number, count: number): number {
    let done = 0;
    let isStuck = false;
    while (this.isUsable && done < count) {
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
      if (!this.settle(result)) break;
      const sent = scratch[progress.frames];
      done += sent;
      if (done === count) break;
      if (sent > 0) isStuck = false;
      this.#isReadyWanted = true;
      // Buffers that come while we ask for a kick bring none. Those that are
      // there and do not suffice for the next frame do not ask for one either.
      if (isStuck || this.queue.isPolled) {
        this.#lookLater();
        break;
      }
      if (this.arm()) break;
      isStuck = true;
    }
    return done;
  }

  #lookLater(): void {
    clearTimeout(this.#pollTimer);
    this.#pollTimer = setTimeout(() => this.kick(), idlePollMs);
  }

  /** Takes no more. */
  stop(): void {
    clearTimeout(this.#pollTimer);
    this.release();
  }
}
