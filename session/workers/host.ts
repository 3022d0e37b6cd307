/**
 * The inside of a Worker: it makes the devices that it is told of, starts and
 * stops their queues, and serves them.
 *
 * It imports the device's module once. While none of its queues needs
 * JavaScript it blocks in the core (`ffi/blocking.ts`); messages, like kicks,
 * come through its poll set.
 *
 * @module
 */

import process from "node:process";
import { receiveMessageOnPort, workerData } from "node:worker_threads";
import { blocking } from "../../ffi/blocking.ts";
import { core } from "../../ffi/core.ts";
import { type ErrorMessage, errorToMessage } from "../../ffi/errors.ts";
import { eventLoop, type Watch } from "../../ffi/event_loop.ts";
import { keepAccounts } from "../../ffi/held.ts";
import { importFactory, type ModuleFactory } from "../device_module.ts";
import {
  Control,
  type DeviceMessage,
  type FromWorker,
  type QueueMessage,
  type ToWorker,
  type WorkerSetup,
} from "./messages.ts";
import { ServedDevice, type ServedQueue } from "./served.ts";

/** Where this module is, for the program of a Worker. */
export const hostUrl: string = import.meta.url;

class Host {
  readonly #setup: WorkerSetup;
  readonly #control: Int32Array;
  readonly #factory: ModuleFactory;
  readonly #devices = new Map<number, ServedDevice>();
  readonly #queues = new Map<number, ServedQueue>();
  readonly #wake: Watch;
  /** Ops that have not ended: they wait for JavaScript. */
  #openOps = 0;

  constructor(setup: WorkerSetup, factory: ModuleFactory) {
    this.#setup = setup;
    this.#control = new Int32Array(setup.control);
    this.#factory = factory;
    eventLoop.ref();
    this.#wake = eventLoop.watch(setup.wakeFd, () => this.#receive());
    // A queue of which no Virtqueue is known is processed in a way of its
    // device's own, which may need the event loop at any time.
    blocking.permit = (count) =>
      this.#openOps === 0 && this.#queues.size > 0 &&
      count >= this.#queues.size;
    this.#post({ kind: "ready" });
  }

  #post(message: FromWorker): void {
    this.#setup.port.postMessage(message);
  }

  #receive(): void {
    for (;;) {
      const received = receiveMessageOnPort(this.#setup.port);
      if (received === undefined) return;
      Atomics.add(this.#control, Control.received, 1);
      this.#take(received.message);
    }
  }

  #take(message: ToWorker): void {
    switch (message.kind) {
      case "start":
        return void this.#answer(
          message.call,
          message.device.id,
          () => this.#start(message.device, message.queue),
        );
      case "stop": {
        const queue = this.#queues.get(message.run);
        return void this.#answer(
          message.call,
          queue?.device.id,
          () => this.#stop(queue, message.leavesInFlight),
          queue,
        );
      }
      case "leave":
        return void this.#answer(
          message.call,
          message.device,
          () => this.#leave(message.device),
        ).then(() => this.#devices.delete(message.device));
      case "translated":
        return this.#devices.get(message.device)?.translations.answered(
          message.wait,
          message.error,
        );
      case "kick":
        return this.#queues.get(message.run)?.kick();
      case "end":
        return this.#end();
    }
  }

  /** Runs an op and answers how it ended. */
  async #answer(
    call: number,
    deviceId: number | undefined,
    op: () => void | Promise<void>,
    queue?: ServedQueue,
  ): Promise<void> {
    this.#openOps++;
    let error: ErrorMessage | null = null;
    try {
      await op();
    } catch (thrown) {
      error = errorToMessage(thrown);
    }
    this.#openOps--;
    const device = this.#devices.get(deviceId ?? -1);
    const isDetached = device === undefined || device.detachIfIdle();
    const { availableIndex: base = 0, leftInFlight = 0 } = queue?.queue ?? {};
    const answer = { error, base, leftInFlight, isDetached };
    this.#post({ kind: "answer", call, answer });
  }

  async #start(device: DeviceMessage, queue: QueueMessage): Promise<void> {
    let served = this.#devices.get(device.id);
    if (served === undefined) {
      const { options } = this.#setup;
      served = new ServedDevice(
        device,
        (device) => this.#factory(device, options),
        (message) => this.#post(message),
      );
      this.#devices.set(device.id, served);
    }
    this.#queues.set(queue.run, await served.start(queue));
  }

  async #stop(
    queue: ServedQueue | undefined,
    leavesInFlight: boolean,
  ): Promise<void> {
    if (queue === undefined) throw new Error("there is no such queue");
    await queue.stop(leavesInFlight);
    this.#queues.delete(queue.run);
  }

  #leave(id: number): void {
    const device = this.#devices.get(id);
    for (const queue of device?.end() ?? []) this.#queues.delete(queue.run);
  }

  #end(): void {
    for (const device of this.#devices.values()) device.end();
    this.#devices.clear();
    this.#queues.clear();
    this.#wake.close();
    eventLoop.unref();
    // When what ends with the turn has ended.
    setImmediate(() => this.#post({ kind: "ended" }));
  }
}

/** The program of a Worker. */
export async function serve(): Promise<void> {
  const setup = workerData as WorkerSetup;
  const control = new Int32Array(setup.control);
  const die = (thrown: unknown) => {
    const error = errorToMessage(thrown);
    // It is ended from outside: an exit from inside loses messages.
    setup.port.postMessage({ kind: "died", error } satisfies FromWorker);
  };
  process.on("uncaughtException", die);
  process.on("unhandledRejection", die);
  Atomics.store(control, Control.thread, core.threadId());
  keepAccounts(setup.accounts);
  try {
    new Host(setup, await importFactory(setup.module, setup.name));
  } catch (error) {
    die(error);
  }
}
