/** A device that writes down which ops were called, and can hold or fail them. */

import assert from "node:assert/strict";
import type { CustomReply, Device, Queue, TargetOps } from "../../mod.ts";
import { Signal } from "../support/wait.ts";
import { deferred } from "./deferred.ts";

/** The asynchronous ops, which the sequencer calls one at a time. */
export type AsyncOp =
  | "deviceCreate"
  | "deviceInit"
  | "deviceFeaturesChanged"
  | "queueStart"
  | "queueStop"
  | "deviceDestroy"
  | "customMessage"
  | "getSharedObject";

/** An op that is being held. */
export class Hold {
  readonly #end = deferred<void>();

  /** For the recording: settles when the op may. */
  get ended(): Promise<void> {
    return this.#end.promise;
  }

  /** The op completes. */
  release(): void {
    this.#end.resolve();
  }

  /** The op completes with a failure. */
  fail(reason: string): void {
    this.#end.reject(new Error(reason));
  }
}

/** All ops of all devices of one target, in order. */
export class Recording {
  /** `queueStart 0`, `deviceInit`; one for each begin of an op. */
  readonly begun: string[] = [];
  /** The same when it has completed, failed or not. */
  readonly ended: string[] = [];
  /** Each device that was made. */
  readonly devices: Device[] = [];
  /** The queue of the last start, by index. */
  readonly queues = new Map<number, Queue>();
  /** Kicks by queue index. */
  readonly kicks = new Map<number, number>();
  readonly signal: Signal = new Signal();
  readonly #holds = new Map<string, Hold[]>();
  readonly #failures = new Map<string, number>();
  readonly #running = new Map<Device, string>();
  readonly #overlaps: string[] = [];

  /** The next call of `op` (`queueStop 1`) waits for what is returned. */
  hold(op: string): Hold {
    const hold = new Hold();
    hold.ended.catch(() => {});
    this.#holds.set(op, [...this.#holds.get(op) ?? [], hold]);
    return hold;
  }

  /** The next `count` calls of `op` fail. */
  fail(op: string, count = 1): void {
    this.#failures.set(op, count);
  }

  /** How often `op` was called. */
  count(op: string): number {
    return this.begun.filter((name) => name === op).length;
  }

  /** Fulfilled when `op` has been called `count` times. */
  async called(op: string, count = 1): Promise<void> {
    await this.signal.until(
      () => this.count(op) >= count,
      `${op} ${count} times; called: ${this.begun.join(", ")}`,
    );
  }

  /** Fulfilled when `op` has completed `count` times. */
  async completed(op: string, count = 1): Promise<void> {
    await this.signal.until(
      () => this.ended.filter((name) => name === op).length >= count,
      `end of ${op} ${count} times; ended: ${this.ended.join(", ")}`,
    );
  }

  /** No op began while another one of its device was under way. */
  assertOneAtATime(): void {
    assert.deepEqual(this.#overlaps, []);
  }

  /** For a device: an op begins; what `body` does belongs to it. */
  async op(
    device: Device,
    name: string,
    body?: () => unknown,
  ): Promise<void> {
    const other = this.#running.get(device);
    if (other !== undefined) this.#overlaps.push(`${name} during ${other}`);
    this.#running.set(device, name);
    this.begun.push(name);
    this.signal.notify();
    try {
      await this.#holds.get(name)?.shift()?.ended;
      const failures = this.#failures.get(name) ?? 0;
      if (failures > 0) {
        this.#failures.set(name, failures - 1);
        throw new Error(`${name} was told to fail`);
      }
      await body?.();
    } finally {
      this.#running.delete(device);
      this.ended.push(name);
      this.signal.notify();
    }
  }

  /**
   * The recorded ops of one device; `inner` is called inside them, as the
   * device that does the work.
   */
  ops(device: Device, inner: TargetOps): TargetOps {
    this.devices.push(device);
    const { getConfig, setConfig, customMessage, getSharedObject } = inner;
    const { transferState } = inner;
    return {
      deviceCreate: () =>
        this.op(device, "deviceCreate", () => inner.deviceCreate?.(device)),
      deviceInit: () =>
        this.op(device, "deviceInit", () => inner.deviceInit?.(device)),
      deviceFeaturesChanged: (_, features) =>
        this.op(
          device,
          "deviceFeaturesChanged",
          () => inner.deviceFeaturesChanged?.(device, features),
        ),
      queueStart: (queue) =>
        this.op(device, `queueStart ${queue.index}`, async () => {
          await inner.queueStart?.(queue);
          this.queues.set(queue.index, queue);
        }),
      queueStop: (queue) =>
        this.op(
          device,
          `queueStop ${queue.index}`,
          () => inner.queueStop?.(queue),
        ),
      deviceDestroy: () =>
        this.op(device, "deviceDestroy", () => inner.deviceDestroy?.(device)),
      queueKick: (queue) => {
        this.kicks.set(queue.index, (this.kicks.get(queue.index) ?? 0) + 1);
        inner.queueKick?.(queue);
        this.signal.notify();
      },
      ...(getConfig && { getConfig }),
      ...(setConfig && { setConfig }),
      ...(getSharedObject && { getSharedObject }),
      ...(transferState && { transferState }),
      ...(customMessage && {
        customMessage: async (_, message) => {
          let reply: CustomReply = undefined;
          await this.op(device, "customMessage", async () => {
            reply = await customMessage(device, message);
          });
          return reply;
        },
      } satisfies TargetOps),
    };
  }
}
