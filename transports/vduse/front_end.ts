/**
 * The front-end that a VDUSE device has: it asks the session what its device
 * is, and does as the kernel's driver says, by the messages that any vhost-user
 * front-end sends.
 *
 * What the kernel says is handled in its order, one thing at a time, and each
 * message is answered when it has been done: the driver waits for that.
 *
 * @module
 */

import { Vhost2Error } from "../../ffi/errors.ts";
import { ringAddress } from "../../protocol/address.ts";
import {
  describeFeatures,
  featureMask,
  hasFeature,
  ProtocolFeature,
  VirtioFeature,
} from "../../protocol/features.ts";
import { FrontendRequest } from "../../protocol/frontend_request.ts";
import { AddressSpace, usedIndexAt } from "./address_space.ts";
import type { VduseConnection } from "./connection.ts";
import { type DeviceType, offeredToDriver } from "./device_type.ts";
import {
  BrokenVduseDevice,
  type VduseDescription,
  type VduseDevice,
  type VduseQueueInfo,
  type VduseRequest,
} from "./kernel.ts";
import type { RecoveryLog, Run } from "./recovery_log.ts";

/** Bits of a device's status (virtio 1.3, section 2.1). */
const Status = { driverOk: 4, featuresOk: 8 } as const;

/**
 * What a driver has to accept. Not ACCESS_PLATFORM: a machine without an IOMMU
 * is not offered it by QEMU, which maps the guest's memory at its own addresses.
 */
const needed = featureMask(VirtioFeature.VERSION_1);

/**
 * A queue that is not ready at DRIVER_OK is looked at again: nothing tells.
 * Soon at first, as a driver may just be making it ready.
 */
const minLookMs = 1;
const maxLookMs = 250;

/**
 * Whether a queue runs. Asked where it stopped, it stays stopped until the
 * driver makes it ready anew.
 */
type QueueState = "waiting" | "started" | "asked";

export interface FrontEndOptions {
  readonly type: DeviceType;
  readonly queueCount: number;
  readonly queueSize: number;
  /** Packed rings are wanted. */
  readonly hasPacked: boolean;
  /** Told what failed; the front-end goes on. */
  failed(error: Vhost2Error): void;
}

export class VduseFrontEnd {
  readonly #connection: VduseConnection;
  readonly #options: FrontEndOptions;
  readonly #addresses: AddressSpace;
  #description: VduseDescription | undefined;
  #isTracked = false;
  #device: VduseDevice | undefined;
  #log: RecoveryLog | undefined;
  #unwatch: (() => void) | undefined;
  #work: Promise<void> = Promise.resolve();
  /** The driver has said DRIVER_OK; its features and the format of its rings. */
  #running: { readonly features: bigint; readonly run: Run } | undefined;
  #queues: QueueState[] = [];
  #look: ReturnType<typeof setTimeout> | undefined;
  #lookMs = minLookMs;
  #hasEnded = false;
  /** The kernel waits for a reset: what ran before it is of no interest. */
  #isResetDue = false;
  /** Called once when the device answers no more. */
  onBroken: ((reason: string) => void) | undefined;

  constructor(connection: VduseConnection, options: FrontEndOptions) {
    this.#connection = connection;
    this.#options = options;
    this.#addresses = new AddressSpace(connection);
  }

  /** A driver has said DRIVER_OK, and no reset since. */
  get isRunning(): boolean {
    return this.#running !== undefined;
  }

  /** Asks the session what is to be created. */
  async introduce(): Promise<VduseDescription> {
    const { type, queueSize } = this.#options;
    const connection = this.#connection;
    const offered = await connection.ask(FrontendRequest.GET_FEATURES, null);
    const protocol = await connection.ask(
      FrontendRequest.GET_PROTOCOL_FEATURES,
      null,
    );
    await connection.ask(FrontendRequest.SET_PROTOCOL_FEATURES, protocol);
    await connection.ask(FrontendRequest.SET_BACKEND_REQ_FD, null);
    this.#isTracked = hasFeature(protocol, ProtocolFeature.INFLIGHT_SHMFD);
    this.#description = {
      deviceId: type.id,
      features: offeredToDriver(
        type,
        offered,
        // Nothing but the log tells after a crash where a packed ring was.
        this.#options.hasPacked && this.#isTracked,
      ),
      queueCount: Math.min(this.#options.queueCount, type.maxQueues),
      queueSize,
      config: await this.#readConfig(),
    };
    return this.#description;
  }

  async #readConfig(): Promise<Uint8Array> {
    const { configSize } = this.#options.type;
    const { data } = await this.#connection.ask(FrontendRequest.GET_CONFIG, {
      offset: 0,
      flags: 0,
      data: new Uint8Array(configSize),
    });
    return data;
  }

  /** Serves the kernel's device, whose log it is, from here on. */
  serve(device: VduseDevice, log: RecoveryLog): void {
    this.#device = device;
    this.#log = log;
    this.#connection.device = device;
    this.#connection.onConfigChange = () =>
      this.#enqueue(async () => {
        device.setConfig(await this.#readConfig());
        device.injectConfig();
      });
    // First, as messages may be about what runs already.
    this.#enqueue(() => this.#resume());
    this.#unwatch = device.watch(() => this.#read());
    this.#read();
  }

  /** Nothing is done for the kernel any more; what it waits for, waits on. */
  end(): void {
    this.#hasEnded = true;
    clearTimeout(this.#look);
    this.#unwatch?.();
    this.#unwatch = undefined;
    this.#connection.onConfigChange = undefined;
  }

  #enqueue(action: () => Promise<void>): void {
    this.#work = this.#work.then(async () => {
      if (this.#hasEnded) return;
      try {
        await action();
      } catch (error) {
        this.#fail(error as Error);
      }
    });
  }

  #fail(error: Error): void {
    if (this.#hasEnded) return;
    if (error instanceof BrokenVduseDevice) {
      const told = this.onBroken;
      this.end();
      return told?.(error.message);
    }
    // The session has ended, which the transport is told.
    if (error instanceof Vhost2Error && error.code === "CLOSED") return;
    this.#options.failed(
      error instanceof Vhost2Error
        ? error
        : new Vhost2Error("SYSTEM", error.message, { cause: error }),
    );
  }

  /** Takes all messages that are there. */
  #read(): void {
    if (this.#hasEnded) return;
    try {
      for (;;) {
        const request = this.#device!.receive();
        if (request === null) return;
        if (request.kind === "setStatus" && request.status === 0) {
          this.#isResetDue = true;
        }
        this.#enqueue(() => this.#handle(request));
      }
    } catch (error) {
      this.#fail(error as Error);
    }
  }

  async #handle(request: VduseRequest): Promise<void> {
    const device = this.#device!;
    const { id } = request;
    let then: (() => Promise<void>) | undefined;
    try {
      switch (request.kind) {
        case "setStatus":
          then = await this.#setStatus(request.status);
          break;
        case "getQueueState": {
          const state = await this.#stateOf(request.queue);
          device.respond({ id, state });
          return;
        }
        case "updateIotlb":
          // Whatever has changed: what there is now is asked for as a whole.
          if (this.#running) await this.#addresses.update(device);
          break;
        case "unknown":
          throw new Vhost2Error(
            "PROTOCOL",
            `Cannot answer message ${request.number} of the kernel: it is not known`,
          );
      }
    } catch (error) {
      // Who serves the device next answers, if nobody does here any more.
      if (this.#connection.isOpen && !(error instanceof BrokenVduseDevice)) {
        device.respond({ id, isFailed: true });
      }
      throw error;
    }
    device.respond({ id });
    await then?.();
  }

  /** What is to be done when the kernel has been answered. */
  async #setStatus(status: number): Promise<(() => Promise<void>) | undefined> {
    if (status === 0) return void await this.#reset();
    if ((status & Status.featuresOk) !== 0) this.#acceptedFeatures();
    const isStart = (status & Status.driverOk) !== 0 &&
      this.#running === undefined;
    if (!isStart) return undefined;
    const features = this.#acceptedFeatures();
    const run = runOf(features);
    this.#addresses.check(this.#device!);
    // Nothing can be in flight: the log of an earlier driver ends here.
    this.#log!.begin(this.#description!, run);
    this.#begin(features, run);
    // Not before the kernel is answered: a driver may hold a lock while it
    // waits (virtio_net the one of all network devices), and what the device
    // does now may need that (a TAP interface does).
    return async () => {
      await this.#start();
      await this.#startQueues();
    };
  }

  #begin(features: bigint, run: Run): void {
    this.#running = { features, run };
    this.#queues = new Array(this.#description!.queueCount).fill("waiting");
    this.#lookMs = minLookMs;
  }

  /** Throws for features that the driver may not use. */
  #acceptedFeatures(): bigint {
    const features = this.#device!.features();
    const wrong = features & ~this.#description!.features | needed & ~features;
    if (wrong === 0n) return features;
    throw new Vhost2Error(
      "PROTOCOL",
      `Cannot go on with the driver of ${this.#connection.name}: it accepts ${
        describeFeatures(features)
      } of ${describeFeatures(this.#description!.features)}`,
    );
  }

  /** Everything but the queues: features, memory, what is in flight. */
  async #start(): Promise<void> {
    const connection = this.#connection;
    const { features, run } = this.#running!;
    // The addresses are translated already: for the session they are plain.
    const plain = features & ~featureMask(VirtioFeature.ACCESS_PLATFORM);
    await connection.ask(
      FrontendRequest.SET_FEATURES,
      plain | featureMask(VirtioFeature.PROTOCOL_FEATURES),
    );
    await this.#addresses.update(this.#device!);
    if (this.#isTracked) {
      const { region, fd } = this.#log!.open(this.#description!, run);
      const fds = [fd];
      await connection.ask(FrontendRequest.SET_INFLIGHT_FD, region, { fds });
    }
  }

  /** Starts what is ready, and looks again later for what is not. */
  async #startQueues(isResumed = false): Promise<void> {
    const { run } = this.#running!;
    for (const [index, state] of this.#queues.entries()) {
      if (state === "started") continue;
      const info = this.#device!.queueInfo(index, run === "packed");
      if (info === null || !info.isReady) this.#queues[index] = "waiting";
      else if (state === "waiting") {
        this.#queues[index] = "started";
        try {
          // The log knows better, where there is one (and split rings only
          // where there is none): the kernel says where the driver began.
          const base = isResumed && !this.#isTracked
            ? usedIndexAt(this.#device!, info.device)
            : info.base;
          await this.#startQueue(index, { ...info, base });
        } catch (error) {
          // It is not tried again until a reset; the others are no worse.
          this.#fail(error as Error);
          if (this.#hasEnded) return;
        }
      }
    }
    if (this.#queues.some((state) => state !== "started")) this.#lookLater();
  }

  #lookLater(): void {
    clearTimeout(this.#look);
    if (this.#hasEnded) return;
    this.#look = setTimeout(
      () =>
        this.#enqueue(async () => {
          if (this.#running !== undefined) await this.#startQueues();
        }),
      this.#lookMs,
    );
    this.#lookMs = Math.min(2 * this.#lookMs, maxLookMs);
  }

  async #startQueue(index: number, info: VduseQueueInfo): Promise<void> {
    const connection = this.#connection;
    await connection.ask(FrontendRequest.SET_VRING_NUM, {
      index,
      num: info.size,
    });
    await connection.ask(FrontendRequest.SET_VRING_BASE, {
      index,
      num: info.base,
    });
    await connection.ask(FrontendRequest.SET_VRING_ADDR, {
      index,
      flags: 0,
      descriptor: ringAddress(info.descriptor),
      available: ringAddress(info.driver),
      used: ringAddress(info.device),
      log: 0n as never,
    });
    const descriptor = { index, hasDescriptor: true, reserved: 0n };
    await connection.ask(FrontendRequest.SET_VRING_CALL, descriptor);
    await connection.ask(FrontendRequest.SET_VRING_KICK, descriptor);
    await connection.ask(FrontendRequest.SET_VRING_ENABLE, { index, num: 1 });
  }

  /** The driver has let go of all queues and all memory. */
  async #reset(): Promise<void> {
    clearTimeout(this.#look);
    this.#running = undefined;
    this.#queues = [];
    await this.#connection.ask(FrontendRequest.RESET_DEVICE, null);
    await this.#addresses.clear();
    // Before the kernel is answered: what it starts next is something else.
    this.#log!.begin(this.#description!, "none");
  }

  /** Where a queue is, which stops it. */
  async #stateOf(index: number) {
    const isPacked = this.#running?.run === "packed";
    const info = this.#device!.queueInfo(index, isPacked);
    if (info === null) {
      throw new Vhost2Error(
        "PROTOCOL",
        `Cannot say where queue ${index} of ${this.#connection.name} is: it has ${
          this.#description!.queueCount
        }`,
      );
    }
    if ((this.#queues[index] ?? "waiting") === "waiting") {
      return { queue: index, base: info.base, isPacked };
    }
    const { num } = await this.#connection.ask(FrontendRequest.GET_VRING_BASE, {
      index,
      num: 0,
    });
    this.#queues[index] = "asked";
    this.#lookLater();
    return { queue: index, base: num, isPacked };
  }

  /** Goes on where a process before this one has ended. */
  async #resume(): Promise<void> {
    // The driver takes a change of configuration that is none; what counts is
    // whether the kernel would pass it on, which needs DRIVER_OK.
    if (this.#isResetDue || !this.#device!.injectConfig()) return;
    const features = this.#acceptedFeatures();
    const run = runOf(features);
    if (this.#log!.read(this.#description!) !== run) {
      throw new Vhost2Error(
        "SYSTEM",
        `Cannot go on with ${this.#connection.name}: ${
          this.#log!.path
        } does not say what was in flight; detach it and attach it again`,
      );
    }
    this.#begin(features, run);
    await this.#start();
    await this.#startQueues(true);
  }
}

function runOf(features: bigint): Run {
  return hasFeature(features, VirtioFeature.RING_PACKED) ? "packed" : "split";
}
