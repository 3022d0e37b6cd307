/**
 * Devices and queues as a Worker has them: the same `Device` and `Queue` that
 * a device sees on the event loop, over what the registering thread has sent.
 *
 * @module
 */

import { core } from "../../ffi/core.ts";
import { errorToMessage, Vhost2Error } from "../../ffi/errors.ts";
import { eventLoop, type Watch } from "../../ffi/event_loop.ts";
import { GuestMemory } from "../../ffi/guest_memory.ts";
import { hasFeature, VirtioFeature } from "../../protocol/features.ts";
import { type Gpa, gpa } from "../../protocol/address.ts";
import type { Access } from "../../ffi/iotlb.ts";
import { Device, type DeviceSession } from "../device.ts";
import { Queue } from "../queue.ts";
import { findRingAreas, type RingAreas } from "../ring_areas.ts";
import type { TargetOps } from "../target_ops.ts";
import { AwaitedTranslations } from "./awaited_translations.ts";
import {
  CallRoute,
  type DeviceMessage,
  type FromWorker,
  type QueueMessage,
  RunState,
} from "./messages.ts";

type Post = (message: FromWorker) => void;

function elsewhere(action: string): Vhost2Error {
  return new Vhost2Error(
    "OPTION",
    `Cannot ${action} in a Worker: the registering thread can`,
  );
}

/** A device whose queues are served here. */
export class ServedDevice implements DeviceSession {
  readonly id: number;
  readonly name: string;
  readonly memory: GuestMemory;
  readonly shared: SharedArrayBuffer;
  readonly servesQueues = true;
  readonly device: Device;
  readonly ops: TargetOps;
  readonly queues = new Set<ServedQueue>();
  readonly translations: AwaitedTranslations;
  readonly #features: BigUint64Array;
  readonly #post: Post;
  readonly #end = new AbortController();

  constructor(
    message: DeviceMessage,
    factory: (device: Device) => TargetOps,
    post: Post,
  ) {
    this.id = message.id;
    this.name = message.name;
    this.memory = new GuestMemory(message.memory);
    this.shared = message.shared;
    this.#features = new BigUint64Array(message.features);
    this.#post = post;
    this.translations = new AwaitedTranslations(this, post);
    this.device = new Device(this);
    this.ops = factory(this.device);
  }

  get features(): bigint {
    return Atomics.load(this.#features, 0);
  }

  get startedQueues(): readonly Queue[] {
    return [...this.queues].map(({ queue }) => queue);
  }

  get signal(): AbortSignal {
    return this.#end.signal;
  }

  readonly requests = {
    send: () => Promise.reject(elsewhere("send requests to the front-end")),
    lookUp: () => Promise.reject(elsewhere("ask for a shared object")),
  };
  readonly sharedMemory = {
    map: () => Promise.reject(elsewhere("map shared memory")),
    unmap: () => Promise.reject(elsewhere("unmap shared memory")),
  };

  whenMapped(
    address: bigint,
    access: Access,
    queue: Queue | undefined,
  ): Promise<void> {
    return this.translations.whenMapped(address, access, queue);
  }

  configChanged(): void {
    this.#post({ kind: "configChanged", device: this.id });
  }

  report(thrown: unknown): void {
    const error = errorToMessage(thrown);
    this.#post({ kind: "report", device: this.id, error });
  }

  /** Starts a queue; it is served when this is fulfilled. */
  async start(message: QueueMessage): Promise<ServedQueue> {
    if (this.queues.size === 0) this.memory.attach();
    const served = new ServedQueue(this, message, this.#post);
    this.queues.add(served);
    try {
      served.watch();
      await this.ops.queueStart?.(served.queue);
      served.listen();
    } catch (error) {
      served.end();
      throw error;
    }
    return served;
  }

  /** Empties the views when no queue runs; whether none is left. */
  detachIfIdle(): boolean {
    return this.queues.size === 0 && this.memory.detach();
  }

  /** The device's end; returns what it still had. */
  end(): ServedQueue[] {
    const left = [...this.queues];
    for (const queue of left) queue.end();
    this.translations.close();
    this.#end.abort();
    return left;
  }
}

/** A queue that is served here. */
export class ServedQueue {
  readonly run: number;
  readonly device: ServedDevice;
  readonly queue: Queue;
  readonly #kickFd: number | null;
  #watch: Watch | undefined;
  #isRunning = false;

  constructor(device: ServedDevice, message: QueueMessage, post: Post) {
    const { run, callFd, addresses, size, features } = message;
    const route = new Int32Array(message.state, RunState.callRoute, 1);
    const log = new BigInt64Array(message.state, RunState.logAddress, 1);
    const { memory } = device;
    const isPacked = hasFeature(features, VirtioFeature.RING_PACKED);
    const { space } = addresses;
    const place = { memory, space, addresses, size, isPacked };
    const find = (): RingAreas | null => {
      const found = findRingAreas(place);
      return found !== null && "used" in found ? found : null;
    };
    const first = find();
    // IOVAs come and go: the core looks again before it touches them.
    if (first === null && space !== "iova") {
      throw new Vhost2Error(
        "MEMORY",
        `Cannot start queue ${message.index} of ${device.name}: its ring is not mapped`,
      );
    }
    this.run = run;
    this.device = device;
    this.#kickFd = message.kickFd;
    this.queue = new Queue({
      device: device.device,
      index: message.index,
      size,
      features,
      addresses,
      areas: space === "iova" ? find : () => first,
      missed: (misses) => post({ kind: "missed", run, misses }),
      base: message.base,
      // A change begins a new run.
      isEnabled: () => message.isEnabled,
      isPolled: message.isPolled,
      isLogged: message.isLogged,
      inflight: message.inflight,
      isAnew: message.isAnew,
      memory,
      runId: run,
      pollMicroseconds: message.pollMicroseconds,
      wires: { kickFd: message.kickFd, call: () => callFd },
      logAddress(): Gpa | null {
        const address = Atomics.load(log, 0);
        return address < 0n ? null : gpa(address);
      },
      setHostNotifier: () =>
        Promise.reject(elsewhere("set the host notifier of a queue")),
      call() {
        // Plain: a change meets a call that is just being made either way.
        if (route[0] === CallRoute.event) core.eventfdSignal(callFd);
        else if (route[0] === CallRoute.session) post({ kind: "call", run });
      },
      fail(reason, cause) {
        post({
          kind: "fail",
          run,
          reason,
          cause: cause === undefined ? undefined : errorToMessage(cause),
        });
      },
    });
  }

  /** Waits for kicks; the last thing that can fail of our own. */
  watch(): void {
    if (this.#kickFd === null) return;
    this.#watch = eventLoop.watch(this.#kickFd, () => this.kick());
  }

  /**
   * From now on kicks reach the device. Those before are made good for by the
   * one that follows every start.
   */
  listen(): void {
    this.#isRunning = true;
  }

  kick(): void {
    if (!this.#isRunning || this.queue.isBroken) return;
    try {
      this.device.ops.queueKick?.(this.queue);
    } catch (cause) {
      this.device.report(
        new Vhost2Error(
          "OP",
          `Op queueKick of ${this.device.name} failed: ${cause}`,
          { cause },
        ),
      );
    }
  }

  /** Stops the queue. May be called again if that failed. */
  async stop(leavesInFlight: boolean): Promise<void> {
    this.#isRunning = false;
    this.queue.leavesInFlight = leavesInFlight;
    await this.device.ops.queueStop?.(this.queue);
    this.end();
  }

  /** Lets go of its descriptors; the device is asked no more. */
  end(): void {
    this.#isRunning = false;
    this.#watch?.close();
    this.#watch = undefined;
    this.queue.markStopped();
    this.device.queues.delete(this);
    if (this.device.queues.size === 0) this.device.translations.close();
  }
}
