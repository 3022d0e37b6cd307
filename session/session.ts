/**
 * One front-end's session: its state, from its beginning to its end, and the
 * loop that takes its messages one by one. The queues are next door
 * (`queues.ts`).
 *
 * Everything here happens in one asynchronous function, `run`: a message is
 * handled to its end, ops included, before the next is taken, so no state can
 * change under an op. What must not wait (kicks, calls) goes past it.
 *
 * @module
 */

import { GuestMemory } from "../ffi/guest_memory.ts";
import type { Access } from "../ffi/iotlb.ts";
import { Vhost2Error } from "../ffi/errors.ts";
import {
  hasFeature,
  ProtocolFeature,
  VirtioFeature,
} from "../protocol/features.ts";
import type { BackendChannel, Connection } from "../transports/transport.ts";
import { BackendRequests } from "./backend_requests.ts";
import { ConfigChanges } from "./config_changes.ts";
import { Device } from "./device.ts";
import { DeviceState } from "./device_state.ts";
import { Dispatcher } from "./dispatcher.ts";
import { InBandNotifications } from "./in_band.ts";
import { InflightTracking } from "./inflight.ts";
import { Inbox } from "./inbox.ts";
import { offeredProtocolFeatures } from "./offered_features.ts";
import { Postcopy } from "./postcopy.ts";
import type { Queue } from "./queue.ts";
import { Queues } from "./queues.ts";
import { Sequencer } from "./sequencer.ts";
import { SharedMemory } from "./shared_memory.ts";
import type { TargetOps } from "./target_ops.ts";
import { Translations } from "./translations.ts";
import { Vring } from "./vring.ts";

/** What a session needs to know of its target. */
export interface SessionOptions {
  /** Whose ops run, for `unregister` inside an op. */
  readonly owner: unknown;
  /** Virtio features offered, the library's own included. */
  readonly features: bigint;
  /** `DeviceOptions.protocolFeatures`. */
  readonly protocolFeatures: bigint;
  /** The type of device, where it has messages of its own. */
  readonly deviceType: string | undefined;
  /** Bytes of each shared memory region by its id; 0 where there is none. */
  readonly sharedMemory: readonly number[];
  /** PAGEFAULT is offered. */
  readonly postcopy: boolean;
  /** Milliseconds for which this isolate may sleep on a page of its guest's. */
  readonly postcopyTimeoutMs: number;
  readonly queueCount: number;
  /** See `DeviceOptions.runsDisabledRings`. */
  readonly runsDisabledRings: boolean;
  readonly device: (device: Device) => TargetOps;
  /** Bytes of `Device.shared`. */
  readonly sharedBytes: number;
  /** Workers wait for the kicks. */
  readonly isServedElsewhere: boolean;
  readonly pollMicroseconds: number | undefined;
  report(error: Vhost2Error, device: Device): void;
  /** Receives one line per message, when wanted. */
  readonly trace: ((line: string) => void) | undefined;
}

/** After this many messages in a row the event loop gets its turn. */
const messagesPerTurn = 32;

export class Session {
  readonly options: SessionOptions;
  readonly connection: Connection;
  readonly memory: GuestMemory = new GuestMemory();
  readonly vrings: readonly Vring[];
  /** How often ADD_MEM_REG came again for a region that is there. */
  readonly repeatedRegions: Map<string, number> = new Map();
  readonly device: Device;
  readonly sequencer: Sequencer;
  readonly #end = new AbortController();
  /** Fulfilled by `close`. */
  readonly #closed: Promise<void>;
  readonly #close: () => void;
  #shared: SharedArrayBuffer | undefined;
  readonly #dispatcher = new Dispatcher(this);
  readonly #inbox: Inbox;
  readonly inBand: InBandNotifications = new InBandNotifications(this);
  readonly queues: Queues = new Queues(this);
  readonly #configChanges = new ConfigChanges(this);
  readonly requests: BackendRequests = new BackendRequests(this);
  readonly sharedMemory: SharedMemory;
  readonly deviceState: DeviceState = new DeviceState(this);
  readonly postcopy: Postcopy;
  readonly inflight: InflightTracking = new InflightTracking(this);
  /** IOVAs, where the driver uses them. */
  readonly translations: Translations = new Translations(this);
  ops: TargetOps = {};
  /** Negotiated virtio features; null until SET_FEATURES. */
  ackedFeatures: bigint | null = null;
  ackedProtocolFeatures = 0n;
  status = 0;
  backendChannel: BackendChannel | null = null;
  /** `deviceFeaturesChanged` is owed. */
  isFeaturesChangeOwed = false;

  constructor(connection: Connection, options: SessionOptions) {
    this.connection = connection;
    this.options = options;
    this.vrings = Array.from(
      { length: options.queueCount },
      (_, index) => new Vring(index, options.runsDisabledRings),
    );
    let close = () => {};
    this.#closed = new Promise((resolve) => close = resolve);
    this.#close = close;
    this.#inbox = new Inbox({
      connection,
      takeNow: (message) => this.#dispatcher.takeNow(message),
      readsAhead: () => this.translations.isActive,
    });
    this.sharedMemory = new SharedMemory(options.sharedMemory, this.requests);
    this.device = new Device(this);
    this.sequencer = new Sequencer(options.owner, connection.name);
    connection.dataPath?.attach({
      name: connection.name,
      memory: this.memory,
      report: (error) => this.report(error),
      configChanged: () => this.configChanged(),
      close: () => this.close(),
    });
    // An op may be waiting for something that only the front-end could end.
    connection.onHangup = () => this.#end.abort();
    this.postcopy = new Postcopy(this.memory, options.postcopyTimeoutMs);
    this.memory.onFault = (state) => {
      const reason = state === "starved"
        ? `the front-end did not fill a page that this thread waited for (postcopyTimeoutMs: ${options.postcopyTimeoutMs}, or until a signal to end the process)`
        : "the front-end took guest memory away (its file, or the dirty log's, became shorter)";
      this.report(
        new Vhost2Error("MEMORY", `Cannot go on with ${this.name}: ${reason}`),
      );
      this.queues.signalErrors();
      this.connection.close();
    };
  }

  get name(): string {
    return this.connection.name;
  }

  get features(): bigint {
    return this.ackedFeatures ?? 0n;
  }

  /** Whether the rings are packed: RING_PACKED is negotiated. */
  get isPacked(): boolean {
    return hasFeature(this.features, VirtioFeature.RING_PACKED);
  }

  /** Base of a vring for which the front-end has set none. */
  get firstBase(): number {
    return this.isPacked ? 0x8000_8000 : 0;
  }

  /** What the addresses of SET_VRING_ADDR are. */
  get ringSpace(): "gpa" | "uva" | "iova" {
    return this.translations.isActive ? "iova" : this.memorySpace;
  }

  /** How the front-end names places in the memory that it shares. */
  get memorySpace(): "gpa" | "uva" {
    return hasFeature(this.ackedProtocolFeatures, ProtocolFeature.GPA_ADDRESSES)
      ? "gpa"
      : "uva";
  }

  get signal(): AbortSignal {
    return this.#end.signal;
  }

  /** See `Device.servesQueues`. */
  get servesQueues(): boolean {
    return !this.options.isServedElsewhere;
  }

  /** See `Device.shared`. */
  get shared(): SharedArrayBuffer {
    this.#shared ??= new SharedArrayBuffer(this.options.sharedBytes);
    return this.#shared;
  }

  /** All rings are stopped: no writes, no calls, no messages of ours. */
  get isSuspended(): boolean {
    return this.vrings.every((vring) =>
      vring.kick.kind === "none" && vring.queue === null
    );
  }

  get startedQueues(): readonly Queue[] {
    return this.vrings.flatMap((vring) =>
      vring.run.kind === "started" ? [vring.run.queue] : []
    );
  }

  /** Protocol features that can be offered to this front-end. */
  get offeredProtocolFeatures(): bigint {
    return offeredProtocolFeatures({
      ops: this.ops,
      declared: this.options.protocolFeatures,
      hasSharedMemory: this.sharedMemory.config.regionCount > 0,
      hasPostcopy: this.options.postcopy,
    }) & this.connection.protocolFeatures;
  }

  report(error: Vhost2Error): void {
    this.options.report(error, this.device);
  }

  /** Runs until the front-end has gone or the connection was closed. */
  async run(): Promise<void> {
    try {
      if (await this.#create()) {
        try {
          await this.#takeMessages();
        } catch (error) {
          this.report(error as Vhost2Error);
        }
        this.connection.close();
        // What sleeps on a missing page could not be stopped.
        this.postcopy.end(true);
        await this.#destroy();
      }
    } finally {
      this.#release();
    }
  }

  async #create(): Promise<boolean> {
    try {
      await this.sequencer.call("deviceCreate", async () => {
        this.ops = this.options.device(this.device);
        await this.ops.deviceCreate?.(this.device);
      });
      return true;
    } catch (error) {
      this.report(error as Vhost2Error);
      return false;
    }
  }

  async #takeMessages(): Promise<void> {
    for (let count = 1;; count++) {
      const message = await this.#inbox.next();
      if (message === null) return;
      if (message !== undefined) {
        try {
          await this.#dispatcher.dispatch(message);
        } finally {
          message.descriptors.close();
        }
        this.#inbox.readAhead();
      }
      await this.#settle();
      if (count % messagesPerTurn === 0) {
        await new Promise((resolve) => setImmediate(resolve));
      }
    }
  }

  /**
   * For a handler that waits for something other than the front-end: fulfilled
   * when the connection has ended, which only its reader can tell. Never, once
   * another message has come; `close` ends that too.
   */
  async connectionEnded(): Promise<void> {
    this.#inbox.lookAhead();
    await Promise.race([this.#inbox.ended, this.#closed]);
  }

  /** Looks again whether queues can start. */
  wake(): void {
    this.#inbox.wake();
  }

  /** Ends the session: `run` comes to its end. */
  close(): void {
    this.#end.abort();
    this.connection.close();
    this.postcopy.end(true);
    this.#close();
  }

  async #destroy(): Promise<void> {
    this.#end.abort();
    // The front-end may come back: better resubmitted then than failed now.
    await this.queues.stopAll(true);
    await this.sequencer.insist(
      "deviceDestroy",
      () => this.ops.deviceDestroy?.(this.device),
      (error) => this.report(error),
    );
  }

  #release(): void {
    this.#end.abort();
    this.connection.close();
    this.#inbox.close();
    this.translations.close();
    this.backendChannel?.close();
    this.backendChannel = null;
    for (const vring of this.vrings) vring.close();
    this.postcopy.end(true);
    this.inflight.forget();
    this.connection.dataPath?.detach();
    this.memory.close();
  }

  /** Owed ops, then the start of every queue that can run. */
  async #settle(): Promise<void> {
    if (this.isFeaturesChangeOwed) {
      this.isFeaturesChangeOwed = false;
      await this.sequencer.call(
        "deviceFeaturesChanged",
        () => this.ops.deviceFeaturesChanged?.(this.device, this.features),
      );
    }
    if (this.deviceState.isTransferring || this.postcopy.isAckDue) return;
    await this.queues.startReady();
    this.#configChanges.settle();
  }

  /**
   * A front-end that has stopped all queues need not tell any more what its
   * IOMMU does: what we know may be wrong when they start again.
   */
  forgetTranslations(): void {
    if (this.translations.isActive && this.isSuspended) {
      this.translations.clear();
    }
  }

  /** For `Device.translateAsync`. */
  async whenMapped(
    address: bigint,
    access: Access,
    queue: Queue | undefined,
  ): Promise<void> {
    const vring = this.vrings.find((one) => one.queue === queue);
    if (queue !== undefined && vring === undefined || this.signal.aborted) {
      throw new Vhost2Error(
        "CLOSED",
        `Cannot await a translation of ${this.name}: it has stopped`,
      );
    }
    await this.translations.whenMapped(
      address,
      access,
      queue === undefined ? undefined : vring,
    );
  }

  configChanged(): void {
    this.#configChanges.changed();
  }
}
