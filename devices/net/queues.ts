/**
 * The transmit and receive queues of one pair, over the core's bursts: a call
 * of the core pops, copies and gives back, so that nothing is in flight
 * between two of them and a queue stops at once.
 *
 * @module
 */

import { constants, layouts } from "../../ffi/abi.gen.ts";
import { blocking } from "../../ffi/blocking.ts";
import { core } from "../../ffi/core.ts";
import { Errno } from "../../ffi/errors.ts";
import { Held, noteHeld, noteReleased } from "../../ffi/held.ts";
import { ringMisses } from "../../ffi/iotlb.ts";
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
import { Frames, sharedFrames } from "./frames.ts";
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

/** Between two looks at a polled queue without work, in milliseconds. */
const idlePollMs = 1;
/** The same while a polled queue waits for a translation. */
const missPollMs = 100;

/**
 * What is sent by a disabled ring is lost; but a ring that has just been set up
 * is disabled too, for the moment until the front-end enables it. So nothing is
 * thrown away before a ring has been disabled for so long, in milliseconds.
 */
const enableMs = 100;

/** A started queue whose ring only bursts use. */
class FrameRing {
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
