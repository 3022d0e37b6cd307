/**
 * A queue while a Worker has it, in the registering thread: the descriptors
 * that the Worker uses, and what changes while the queue runs.
 *
 * @module
 */

import { layouts } from "../../ffi/abi.gen.ts";
import { core } from "../../ffi/core.ts";
import { check } from "../../ffi/errors.ts";
import type { Queue } from "../queue.ts";
import { CallRoute, type QueueMessage, RunState } from "./messages.ts";
import type { WorkerThread } from "./thread.ts";

let nextId = 1;

/** One run of a queue, from its start to its stop. */
export class QueueRun {
  readonly id: number = nextId++;
  readonly queue: Queue;
  readonly thread: WorkerThread;
  /** The Worker has stopped, or died: it touches nothing any more. */
  isOver = false;
  readonly #state = new SharedArrayBuffer(RunState.byteSize);
  readonly #route = new Int32Array(this.#state, RunState.callRoute, 1);
  readonly #log = new BigInt64Array(this.#state, RunState.logAddress, 1);
  // Numbers of their own: the session may close its own at any time.
  readonly #kickFd: number | null;
  readonly #callFd: number;
  #isClosed = false;

  constructor(queue: Queue, thread: WorkerThread) {
    this.queue = queue;
    this.thread = thread;
    const { kickFd } = queue.wires;
    const action = `Cannot hand queue ${queue.index} to a Worker`;
    this.#kickFd = kickFd === null
      ? null
      : check(core.descriptorDuplicate(kickFd), action);
    // Names whatever eventfd the call is, one after the other.
    this.#callFd = core.eventfdCreate();
    if (this.#callFd < 0) {
      if (this.#kickFd !== null) core.descriptorClose(this.#kickFd);
      check(this.#callFd, action);
    }
    this.#update();
    queue.onChanged = () => this.#update();
  }

  #update(): void {
    if (this.#isClosed) return;
    Atomics.store(this.#log, 0, this.queue.logAddress ?? -1n);
    const call = this.queue.wires.call();
    let route: number = CallRoute.none;
    if (call === "session") route = CallRoute.session;
    if (typeof call === "number") {
      check(
        core.descriptorReplace(call, this.#callFd),
        `Cannot tell a Worker of the call of queue ${this.queue.index}`,
      );
      route = CallRoute.event;
    }
    Atomics.store(this.#route, 0, route);
  }

  /** For the Worker. */
  get message(): QueueMessage {
    const { queue } = this;
    return {
      run: this.id,
      index: queue.index,
      size: queue.size,
      features: queue.features,
      addresses: queue.addresses,
      base: queue.availableIndex,
      isEnabled: queue.isEnabled,
      isPolled: queue.isPolled,
      isLogged: queue.isLogged,
      inflight: queue.inflight,
      isAnew: queue.isAnew,
      pollMicroseconds: queue.pollMicroseconds,
      kickFd: this.#kickFd,
      callFd: this.#callFd,
      state: this.#state,
    };
  }

  /** Where a ring stopped that its Worker can no longer tell about. */
  takePosition(ring: number): void {
    const { RingState: field } = layouts;
    const state = new DataView(new ArrayBuffer(field.byteSize));
    if (core.ringState(ring, state) < 0) return;
    this.queue.availableIndex = state.getUint32(field.lastAvailable, true);
    // Where they are recorded, the next run begins with them.
    this.queue.leftInFlight = state.getUint32(field.inFlight, true) +
      state.getUint32(field.toResubmit, true);
  }

  /** The Worker has let go. */
  close(): void {
    this.isOver = true;
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.queue.onChanged = undefined;
    if (this.#kickFd !== null) core.descriptorClose(this.#kickFd);
    core.descriptorClose(this.#callFd);
  }
}
