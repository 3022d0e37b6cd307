/**
 * One device whose queues are served in Workers: the ops that the session
 * calls. Those of the queues are relayed to the Worker that has the queue, and
 * complete when it answers; all others are the device's own, in this thread.
 *
 * @module
 */

import {
  errorFromMessage,
  errorToMessage,
  Vhost2Error,
} from "../../ffi/errors.ts";
import type { GuestMemory } from "../../ffi/guest_memory.ts";
import { findHeld, Held } from "../../ffi/held.ts";
import type { Device } from "../device.ts";
import { overlay } from "../overlay.ts";
import type { Queue } from "../queue.ts";
import type { TargetOps } from "../target_ops.ts";
import type { Answer, DeviceMessage, FromWorker } from "./messages.ts";
import { QueueRun } from "./run.ts";
import type { Question, WorkerThread } from "./thread.ts";

let nextId = 1;

/** The device on this side. */
export class DeviceRelay {
  readonly id: number = nextId++;
  /** The ops for the session. */
  readonly ops: TargetOps;
  readonly #device: Device;
  readonly #threadFor: (queue: Queue) => Promise<WorkerThread>;
  readonly #ended: () => void;
  #isDestroyed = false;
  readonly #runs = new Map<Queue, QueueRun>();
  /** Workers that have an instance of the device. */
  readonly #instances = new Set<WorkerThread>();
  readonly #features = new BigUint64Array(new SharedArrayBuffer(8));
  #memory: GuestMemory | undefined;

  /**
   * @param ops those of the instance in this thread
   * @param threadFor a Worker for a queue of the device, which serves
   * @param ended called when no Worker has an instance any more
   */
  constructor(
    device: Device,
    ops: TargetOps,
    threadFor: (queue: Queue) => Promise<WorkerThread>,
    ended: () => void,
  ) {
    this.#device = device;
    this.#threadFor = threadFor;
    this.#ended = ended;
    const relayed: TargetOps = {
      queueStart: (queue) => this.#start(queue),
      queueStop: (queue) => this.#stop(queue),
      queueKick: (queue) => this.#kick(queue),
      deviceFeaturesChanged: (device, features) => {
        Atomics.store(this.#features, 0, features);
        return ops.deviceFeaturesChanged?.(device, features);
      },
      deviceDestroy: async (device) => {
        await this.#leave();
        await ops.deviceDestroy?.(device);
        this.#isDestroyed = true;
        this.#endIfDone();
      },
    };
    this.ops = overlay(ops, relayed);
  }

  async #ask(thread: WorkerThread, question: Question): Promise<Answer> {
    const answer = await thread.ask(question);
    if (answer.isDetached) this.#memory?.holders.delete(thread);
    if (answer.error !== null) throw errorFromMessage(answer.error);
    return answer;
  }

  get #message(): DeviceMessage {
    return {
      id: this.id,
      name: this.#device.name,
      memory: this.#memory!.shared,
      features: this.#features.buffer as SharedArrayBuffer,
      shared: this.#device.shared,
    };
  }

  async #start(queue: Queue): Promise<void> {
    this.#memory = queue.memory;
    const thread = await this.#threadFor(queue);
    const run = new QueueRun(queue, thread);
    this.#runs.set(queue, run);
    this.#instances.add(thread);
    this.#memory.holders.add(thread);
    try {
      await this.#ask(thread, {
        kind: "start",
        device: this.#message,
        queue: run.message,
      });
    } catch (error) {
      run.close();
      this.#runs.delete(queue);
      throw error;
    }
    // It died after it had started the queue: there is nobody to serve it.
    if (run.isOver) {
      this.#runs.delete(queue);
      throw new Vhost2Error("CLOSED", "Cannot go on: its Worker has ended");
    }
  }

  async #stop(queue: Queue): Promise<void> {
    const run = this.#runs.get(queue);
    if (run === undefined) return;
    if (!run.isOver) {
      try {
        const { leavesInFlight } = queue;
        const answer = await this.#ask(run.thread, {
          kind: "stop",
          run: run.id,
          leavesInFlight,
        });
        queue.availableIndex = answer.base;
        queue.leftInFlight = answer.leftInFlight;
      } catch (error) {
        // A queue whose Worker has died has stopped.
        if (!run.isOver) throw error;
      }
    }
    run.close();
    this.#runs.delete(queue);
  }

  #kick(queue: Queue): void {
    const run = this.#runs.get(queue);
    if (run !== undefined && !run.isOver) {
      run.thread.post({ kind: "kick", run: run.id });
    }
  }

  /** The device's instances end, and whatever of its queues they still have. */
  async #leave(): Promise<void> {
    for (const thread of [...this.#instances]) {
      try {
        await this.#ask(thread, { kind: "leave", device: this.id });
        this.#instances.delete(thread);
      } catch (error) {
        // Lost: it has died, or is stuck and keeps what it has until it dies.
        if (!thread.isOver) throw error;
      }
    }
    for (const [queue, run] of [...this.#runs]) {
      if (this.#instances.has(run.thread)) continue;
      run.close();
      this.#runs.delete(queue);
    }
  }

  #endIfDone(): void {
    if (this.#isDestroyed && this.#instances.size === 0) this.#ended();
  }

  /** A Worker says something; true when it was for this device. */
  take(message: FromWorker, thread: WorkerThread): boolean {
    if ("device" in message) {
      if (message.device !== this.id) return false;
      if (message.kind === "configChanged") this.#device.configChanged();
      else if (message.kind === "translate") this.#translate(message, thread);
      else this.#report(errorFromMessage(message.error));
      return true;
    }
    if (!("run" in message)) return false;
    for (const { id, queue } of this.#runs.values()) {
      if (id !== message.run) continue;
      if (message.kind === "call") queue.call();
      else if (message.kind === "missed") queue.missed(message.misses);
      else {
        const { reason, cause } = message;
        queue.fail(reason, cause && errorFromMessage(cause));
      }
      return true;
    }
    return false;
  }

  /** Awaits it here, where the front-end is asked, and answers how it ended. */
  #translate(
    { wait, run: id, iova, access }: Extract<FromWorker, { kind: "translate" }>,
    thread: WorkerThread,
  ): void {
    const answer = (error: unknown) =>
      thread.post({
        kind: "translated",
        device: this.id,
        wait,
        error: error === null ? null : errorToMessage(error),
      });
    const run = [...this.#runs.values()].find((run) => run.id === id);
    if (id !== null && run === undefined) {
      return answer(
        new Vhost2Error(
          "CLOSED",
          `Cannot await a translation of ${this.#device.name}: its queue has stopped`,
        ),
      );
    }
    this.#device.translateAsync(iova, 1, access, run?.queue)
      .then(() => answer(null), answer);
  }

  #report(error: Error): void {
    this.#device.report(
      error instanceof Vhost2Error
        ? error
        : new Vhost2Error("OP", error.message, { cause: error }),
    );
  }

  /**
   * A Worker serves no more. Its queues are broken.
   *
   * @returns whether it had any
   */
  threadLost(thread: WorkerThread, cause: Error): boolean {
    let hadQueues = false;
    for (const run of this.#runs.values()) {
      if (run.thread !== thread || run.isOver) continue;
      hadQueues = true;
      run.queue.fail(`its Worker has ended: ${cause.message}`, cause);
    }
    return hadQueues;
  }

  /**
   * A Worker that was lost touches nothing any more: its queues have stopped,
   * which the session learns when it stops them.
   */
  threadDied(thread: WorkerThread, accounts: SharedArrayBuffer): void {
    this.#instances.delete(thread);
    this.#memory?.holders.delete(thread);
    for (const run of this.#runs.values()) {
      if (run.thread !== thread || run.isOver) continue;
      const ring = findHeld(accounts, Held.ring, run.id);
      if (ring !== undefined) run.takePosition(ring);
      run.close();
    }
    this.#endIfDone();
  }
}
