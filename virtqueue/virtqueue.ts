/**
 * Processing of a started queue: requests out of the ring in batches,
 * completions back in batches, notifications both ways.
 *
 * @module
 */

import { blocking } from "../ffi/blocking.ts";
import { core } from "../ffi/core.ts";
import { Errno } from "../ffi/errors.ts";
import { Held, noteHeld, noteReleased } from "../ffi/held.ts";
import { ringMisses } from "../ffi/iotlb.ts";
import { type Batch, sharedBatch } from "./batch.ts";
import {
  activate,
  callLater,
  deactivate,
  isActive,
  type Turn,
} from "./poller.ts";
import { Request } from "./request.ts";
import {
  brokenReason,
  createRing,
  lastAvailable,
  type RingOptions,
  toResubmit,
} from "./ring.ts";
import type { StartedQueue } from "./started_queue.ts";

/** How a queue is to be processed. */
export interface VirtqueueOptions
  extends Pick<RingOptions, "headerBytes" | "trailerBytes"> {
  /**
   * Called when `count` requests are in `virtqueue.batch`. What it needs
   * beyond its return it must copy. It may answer how many bytes it has moved,
   * so that a turn of the event loop ends in time.
   */
  process(count: number): number | void;
  /**
   * Asked before each batch: true while whoever works on earlier requests has
   * enough of them. The rest stays in the ring until some have completed.
   */
  isCongested?(): boolean;
  /**
   * Called when the queue is stopping and a request has not completed in
   * `stopTimeoutMs`: every request still open is to be completed now, with an
   * error. What is not is forgotten.
   */
  expire?(): void;
  /**
   * Called in place of the wait for open requests when the queue stops and they
   * may stay recorded in the inflight region, to be given to the queue's next
   * run, in this process or another. Cancels what can be cancelled (`signal` is
   * aborted already) and resolves when nothing is done for any open request any
   * more, neither in guest memory nor to what the device stores: a write that
   * came later would undo newer ones. What has been completed by then is
   * completed. Without it all requests are waited for.
   */
  suspend?(): Promise<void>;
  /**
   * Whether all requests in flight end by events of descriptors, as file I/O
   * does: a Worker may then block until they come. Unless given, requests in
   * flight are taken to wait for JavaScript: a timer, a promise, a fetch.
   */
  endsByEvents?(): boolean;
  /** Requests per batch, at most; 64 unless given. */
  readonly maxBatch?: number;
  /**
   * Microseconds to look for more after the last work; the target's, or 50,
   * unless given.
   */
  readonly pollMicroseconds?: number;
  /** Milliseconds that a stop waits for open requests; 30000 unless given. */
  readonly stopTimeoutMs?: number;
}

/**
 * How often an empty ring is looked at again after work, before others get
 * their turn: about a microsecond, in which a driver that answers at once is met
 * without the cost of going round.
 */
const looksPerTurn = 50;

/** One turn of a queue ends after so many requests or bytes. */
const requestsPerTurn = 256;
const bytesPerTurn = 8 << 20;

/** Between two looks at a polled queue without work, in milliseconds. */
const idlePollMs = 1;
/** The same while a polled queue waits for a translation. */
const missPollMs = 100;

/**
 * A started queue being processed. Make one in `queueStart`, pass `kick()` the
 * kicks, and return `stop()` from `queueStop`. A restart makes a new one, so a
 * completion that comes too late meets the old one and does nothing.
 */
export class Virtqueue implements Turn {
  readonly queue: StartedQueue;
  readonly batch: Batch;
  readonly #options: VirtqueueOptions;
  readonly #ring: number;
  readonly #end = new AbortController();
  readonly #pollMicroseconds: number;
  readonly #stopBlocking: () => void;
  /** Pairs of head and bytes written, not published yet. */
  readonly #completions: Uint32Array<ArrayBuffer>;
  #staged = 0;
  #inFlight = 0;
  #isOpen = true;
  #isStopping = false;
  #isBroken = false;
  /** Broken by the device's own fault. */
  #hasFailed = false;
  #isInTurn = false;
  /** Work waits in the ring until requests have completed. */
  #isHeld = false;
  /**
   * The ring, or its next request, waits for the IOTLB: nothing is done until
   * a kick, which comes with the translation. Completions are kept.
   */
  #isMissing = false;
  #isFlushScheduled = false;
  #drained: (() => void) | undefined;
  #pollTimer: ReturnType<typeof setTimeout> | undefined;

  /**
   * @param queue a started queue
   * @param options what to do with its requests
   * @throws Vhost2Error SYSTEM when the ring cannot be used as it is
   */
  constructor(queue: StartedQueue, options: VirtqueueOptions) {
    this.queue = queue;
    this.#options = options;
    this.batch = sharedBatch(options.maxBatch ?? 64, options.headerBytes ?? 0);
    this.#ring = createRing(queue, options);
    noteHeld(Held.ring, this.#ring, queue.runId);
    this.#completions = new Uint32Array(queue.size * 2);
    this.#pollMicroseconds = options.pollMicroseconds ??
      queue.pollMicroseconds ?? 50;
    this.#stopBlocking = blocking.add(() => this.#needsJavaScript);
    core.ringDisarm(this.#ring);
    activate(this);
  }

  /**
   * For the poller. While requests are with somebody else, the processor is
   * more use to him (a kernel thread that writes the file, say).
   */
  get pollMicroseconds(): number {
    return this.#inFlight > 0 ? 0 : this.#pollMicroseconds;
  }

  /** Whether the isolate's event loop is needed to go on. */
  get #needsJavaScript(): boolean {
    if (this.#isStopping || this.#isFlushScheduled) return true;
    if (this.#pollTimer !== undefined) return true;
    return this.#inFlight > 0 && !this.#options.endsByEvents?.();
  }

  /** Requests popped and not completed. */
  get inFlight(): number {
    return this.#inFlight;
  }

  /** Where the queue would go on behind what has been popped. */
  get position(): number {
    return lastAvailable(this.#ring) ?? this.queue.availableIndex;
  }

  /** Aborted when a stopping queue waits no longer for its open requests. */
  get signal(): AbortSignal {
    return this.#end.signal;
  }

  /** False once the queue has stopped: completions do nothing then. */
  get isOpen(): boolean {
    return this.#isOpen;
  }

  /** The driver kicked: the ring is looked at in this turn. */
  kick(): void {
    if (!this.#isOpen || this.#isStopping || this.#isBroken) return;
    this.#isMissing = false;
    if (this.#isHeld) return;
    if (isActive(this) || this.#isInTurn) return;
    core.ringDisarm(this.#ring);
    activate(this);
    this.turn();
  }

  /** For the poller: a bounded number of requests and bytes. */
  turn(): boolean {
    if (this.#isInTurn || this.#isMissing) return false;
    this.#isInTurn = true;
    this.#isHeld = false;
    // Never more than the queue holds: what it made available is done then.
    const most = Math.min(requestsPerTurn, this.queue.size);
    let requests = 0;
    let bytes = 0;
    let looks = 0;
    try {
      while (
        requests < most && bytes < bytesPerTurn &&
        !this.#isStopping && !this.#isBroken && !this.#isMissing
      ) {
        if (this.#options.isCongested?.()) {
          this.#isHeld = true;
          break;
        }
        const count = this.popBatch();
        if (count > 0) {
          requests += count;
          looks = looksPerTurn;
          bytes += this.#options.process(count) ?? 0;
          if (this.#staged > 0) this.flush();
        } else if (--looks < 0) break;
      }
    } catch (error) {
      // A bug of the device's must not take the other queues' turns away.
      this.#fail(`its device failed: ${error}`, error);
    } finally {
      this.#isInTurn = false;
      if (this.#staged > 0) this.flush();
    }
    return requests > 0;
  }

  /** For the poller: kicks are wanted again; false when there is work. */
  rest(): boolean {
    if (this.#isStopping || this.#isBroken) return true;
    if (this.#isMissing) {
      if (this.queue.isPolled) this.#lookLater(missPollMs);
      return true;
    }
    // Held: the next completion makes it active again, no kick is needed.
    if (this.#isHeld && this.#inFlight > 0) return true;
    if (this.#isHeld || this.queue.isPolled) {
      // Congested by others' requests, or no kick will come. Looking without
      // a pause would give a core away to whoever asks for it.
      this.#lookLater(idlePollMs);
      return true;
    }
    const result = core.ringArm(this.#ring);
    if (result === -Errno.EAGAIN) this.#miss();
    else if (result < 0) this.#break(result);
    if (result <= 0) return true;
    core.ringDisarm(this.#ring);
    return false;
  }

  #lookLater(delayMs: number): void {
    clearTimeout(this.#pollTimer);
    this.#pollTimer = setTimeout(() => {
      this.#pollTimer = undefined;
      this.#isMissing = false;
      activate(this);
    }, delayMs);
  }

  /**
   * Pops into `batch`; the number of requests there. Zero also when the ring
   * is broken, which is reported once.
   */
  popBatch(): number {
    const { batch } = this;
    const count = core.ringPop(
      this.#ring,
      batch.words,
      batch.words.length,
      batch.maxRequests,
    );
    if (count > 0) {
      this.#inFlight += count;
      this.queue.memory.refresh();
      return count;
    }
    if (count === -Errno.EAGAIN) this.#miss();
    else if (count < 0) this.#break(count);
    return 0;
  }

  /**
   * Pops requests as objects, for code that is not in a hurry: views of
   * guest memory, and `complete` at any later time.
   */
  requests(count: number): Request[] {
    const requests: Request[] = [];
    for (let i = 0; i < count; i++) requests.push(new Request(this, i));
    return requests;
  }

  /**
   * Returns a request to the driver.
   *
   * @param head the request's head
   * @param written bytes written into its writable segments and trailer
   * @returns false when the queue has stopped since: nothing was touched
   */
  complete(head: number, written: number): boolean {
    if (!this.#isOpen) return false;
    if (this.#staged === this.queue.size) this.flush();
    if (this.#staged === this.queue.size) {
      // All that the ring can hold is kept already: this cannot be in flight.
      this.#fail("its device completed a request that was not in flight");
      return false;
    }
    const at = this.#staged++ * 2;
    this.#completions[at] = head;
    this.#completions[at + 1] = written;
    if (!this.#isInTurn && !this.#isFlushScheduled) {
      this.#isFlushScheduled = true;
      callLater(this.#flushLater);
    }
    return true;
  }

  readonly #flushLater = (): void => {
    this.#isFlushScheduled = false;
    this.flush();
  };

  /** Publishes all completions, and calls the driver if it wants that. */
  flush(): void {
    const count = this.#staged;
    if (count === 0 || !this.#isOpen) return;
    this.#staged = 0;
    const result = core.ringPush(this.#ring, this.#completions, count);
    if (result === -Errno.EAGAIN) {
      // Kept until the ring is mapped again; a stop does not wait for that.
      this.#staged = count;
      this.#miss();
      if (this.#inFlight <= count) this.#drained?.();
      return;
    }
    this.#inFlight -= count;
    if (result > 0) this.queue.call();
    else if (result === -Errno.EINVAL) {
      // What is in flight is not known any more: a stop must not wait for it.
      this.#inFlight = 0;
      this.#fail("its device completed a request that was not in flight");
    } else if (result < 0) this.#break(result);
    if (this.#inFlight <= 0) this.#drained?.();
    if (this.#isHeld && !this.#isInTurn && !this.#isStopping) activate(this);
  }

  #miss(): void {
    this.#isMissing = true;
    if (!this.#isStopping) this.queue.missed(ringMisses(this.#ring));
  }

  #fail(reason: string, cause?: unknown): void {
    if (this.#isBroken) return;
    this.#isBroken = true;
    this.#hasFailed = true;
    this.queue.fail(reason, cause);
  }

  #break(errno: number): void {
    if (this.#isBroken) return;
    this.#isBroken = true;
    // A fault of the memory is the session's to report, for all its queues.
    if (errno === -Errno.EFAULT) return;
    this.queue.fail(brokenReason(this.#ring, errno));
  }

  /**
   * Pops no more and resolves when every request has completed, or, after
   * `stopTimeoutMs`, been made to.
   */
  async stop(): Promise<void> {
    if (!this.#isOpen) return;
    this.#isStopping = true;
    clearTimeout(this.#pollTimer);
    deactivate(this);
    this.flush();
    const { suspend } = this.#options;
    if (
      this.queue.leavesInFlight && suspend !== undefined && !this.#hasFailed
    ) {
      if (this.#inFlight > this.#staged) await this.#suspend(suspend);
    } else {
      // What an earlier run had taken is in flight too.
      await this.#resubmitAll();
      if (this.#inFlight > this.#staged) await this.#drain();
    }
    this.#end.abort();
    this.flush();
    this.#isOpen = false;
    this.queue.availableIndex = lastAvailable(this.#ring) ??
      this.queue.availableIndex;
    this.queue.leftInFlight = this.#inFlight + this.#toResubmit;
    this.#stopBlocking();
    noteReleased(Held.ring, this.#ring);
    core.ringDestroy(this.#ring);
  }

  async #resubmitAll(): Promise<void> {
    // Those that wait for the IOTLB stay in the region: no stop waits for it.
    this.#isMissing = false;
    while (!this.#isBroken && !this.#isMissing && this.#toResubmit > 0) {
      if (this.#options.isCongested?.()) {
        await new Promise((resolve) => setTimeout(resolve, idlePollMs));
        continue;
      }
      try {
        const count = this.popBatch();
        if (count > 0) this.#options.process(count);
      } catch (error) {
        this.#fail(`its device failed: ${error}`, error);
      }
      this.flush();
    }
  }

  get #toResubmit(): number {
    return this.queue.inflight === null ? 0 : toResubmit(this.#ring);
  }

  async #suspend(suspend: () => Promise<void>): Promise<void> {
    this.#end.abort();
    if (await this.#inTime(suspend())) this.flush();
    else this.#expire();
  }

  async #drain(): Promise<void> {
    // Nobody may know any more of what a device that failed has popped.
    const drained = new Promise<void>((resolve) => this.#drained = resolve);
    if (await this.#inTime(drained, this.#hasFailed ? 0 : undefined)) return;
    this.#end.abort();
    // The abort's listeners run first; what they complete is completed.
    await Promise.resolve();
    this.#expire();
  }

  /** Whether `done` came before a stop waits no longer. */
  async #inTime(
    done: Promise<void>,
    timeoutMs: number = this.#options.stopTimeoutMs ?? 30_000,
  ): Promise<boolean> {
    let timer: ReturnType<typeof setTimeout> | undefined;
    const late = new Promise<boolean>((resolve) => {
      timer = setTimeout(() => resolve(false), timeoutMs);
    });
    try {
      return await Promise.race([done.then(() => true), late]);
    } finally {
      clearTimeout(timer);
    }
  }

  #expire(): void {
    this.#options.expire?.();
    this.flush();
  }
}
