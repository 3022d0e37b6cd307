/**
 * A vhost-user device as a front-end uses it: the handshake in QEMU's order,
 * guest memory, and a virtqueue driver for each queue.
 *
 * @module
 */

import { core } from "../ffi/core.ts";
import { Vhost2Error } from "../ffi/errors.ts";
import {
  featureMask,
  hasFeature,
  ProtocolFeature as Protocol,
  VirtioFeature,
} from "../protocol/features.ts";
import type { BackendMessage } from "../protocol/backend_request.ts";
import { BackendRequest } from "../protocol/backend_request.ts";
import type { VringAddress } from "../protocol/payloads.ts";
import {
  FrontendConnection,
  type InflightWithFile,
  type RequestOptions,
} from "./connection.ts";
import {
  type Acks,
  DeviceQueues,
  type StartQueueOptions,
  type StopQueueOptions,
} from "./device_queues.ts";
import { DirtyLog } from "./dirty_log.ts";
import { HostNotifiers } from "./host_notifiers.ts";
import type { Descriptors } from "../transports/transport.ts";
import { GuestRam, type RamRegion } from "../driver/guest_ram.ts";
import { PackedDriver } from "../driver/packed_driver.ts";
import type {
  QueueDriver,
  QueueDriverOptions,
} from "../driver/queue_driver.ts";
import { SplitDriver } from "../driver/split_driver.ts";
import { Iommu } from "./iommu.ts";
import {
  negotiate,
  type Negotiated,
  type RingFormatOptions,
  type VhostUserDeviceOptions,
} from "./negotiation.ts";

/** Bits of the device status (VIRTIO 1.3 section 2.1). */
export const DeviceStatus = {
  ACKNOWLEDGE: 1,
  DRIVER: 2,
  DRIVER_OK: 4,
  FEATURES_OK: 8,
} as const;

/** What is logged. */
export interface LogOptions {
  /** Buffers (LOG_ALL); true unless given. */
  readonly buffers?: boolean;
  /** What the device writes into the rings (VHOST_VRING_F_LOG); likewise. */
  readonly rings?: boolean;
  /** Bytes of the log's file in front of it; 0 unless given. */
  readonly offset?: number;
}

/** An open device; its rings are split unless it was opened otherwise. */
export class VhostUserDevice<Driver extends QueueDriver = SplitDriver> {
  readonly ram: GuestRam;
  /** Negotiated virtio features. */
  readonly features: bigint;
  /** Negotiated protocol features. */
  readonly protocolFeatures: bigint;
  /** What GET_QUEUE_NUM said; 1 without MQ. */
  readonly maxQueueCount: number;
  readonly #queues: DeviceQueues<Driver>;
  /** Where it was opened with one. */
  readonly iommu: Iommu | undefined;
  /** The back-end says that configuration space has changed. */
  onConfigChange: (() => void) | undefined;
  /** Where it `takesHostNotifiers`: those that the back-end has given. */
  readonly hostNotifiers: HostNotifiers = new HostNotifiers();
  /** The back-end has given, or taken away, that of a queue. */
  onHostNotifier: ((index: number) => void) | undefined;
  #connection: FrontendConnection;
  #inflight: InflightWithFile | null = null;
  readonly #options: VhostUserDeviceOptions & RingFormatOptions;
  readonly #ownsRam: boolean;
  readonly #acks: Acks;
  #log: DirtyLog | undefined;
  #logsBuffers = false;
  /** What the back-end has by ADD_MEM_REG. */
  readonly #sentRegions = new Set<RamRegion>();

  private constructor(
    connection: FrontendConnection,
    negotiated: Negotiated,
    options: VhostUserDeviceOptions & RingFormatOptions,
    makeDriver: (ram: GuestRam, options: QueueDriverOptions) => Driver,
  ) {
    const queueCount = options.queueCount ?? 1;
    if (queueCount > negotiated.maxQueueCount) {
      throw new Vhost2Error(
        "OPTION",
        `Cannot use ${queueCount} queues: the device has ${negotiated.maxQueueCount}`,
      );
    }
    this.#connection = connection;
    this.#options = options;
    this.features = negotiated.features;
    this.protocolFeatures = negotiated.protocolFeatures;
    this.maxQueueCount = negotiated.maxQueueCount;
    const acks = hasFeature(this.protocolFeatures, Protocol.REPLY_ACK);
    this.#acks = {
      usual: { ack: acks },
      other: { ack: acks && (options.acksAll ?? false) },
    };
    this.#ownsRam = options.ram === undefined;
    this.ram = options.ram ??
      new GuestRam(options.regions ?? [{ size: options.ramSize ?? 64 << 20 }]);
    if (options.iommu) {
      const { iommu } = options;
      this.iommu = new Iommu(this.ram, iommu === true ? {} : iommu);
      this.#connectIommu(connection);
    }
    this.#queues = new DeviceQueues(
      this,
      this.#acks,
      (index, queueSize) => {
        const driver = makeDriver(this.ram, {
          queueSize,
          features: this.features,
          usesCalls: options.usesCalls,
          iommu: this.iommu,
        });
        driver.kickDirectly = () => this.hostNotifiers.kick(index);
        return driver;
      },
    );
    try {
      for (let index = 0; index < queueCount; index++) {
        this.#queues.add(options.queueSize ?? 128);
      }
    } catch (error) {
      this.#free();
      throw error;
    }
    connection.onBackendRequest = (message, descriptors) =>
      this.#backendRequest(message, descriptors);
  }

  /** Connects and negotiates; starts all queues unless told otherwise. */
  static open(
    options: VhostUserDeviceOptions & { readonly packed: true },
  ): Promise<VhostUserDevice<PackedDriver>>;
  static open(
    options: VhostUserDeviceOptions & RingFormatOptions,
  ): Promise<VhostUserDevice<QueueDriver>>;
  static open(options: VhostUserDeviceOptions): Promise<VhostUserDevice>;
  static async open(
    options: VhostUserDeviceOptions & Partial<RingFormatOptions>,
  ): Promise<VhostUserDevice<QueueDriver>> {
    if ((options.path === undefined) === (options.fd === undefined)) {
      throw new Vhost2Error(
        "OPTION",
        "Cannot open a device: give either path or fd",
      );
    }
    const connection = options.path === undefined
      ? FrontendConnection.fromFd(options.fd!)
      : await FrontendConnection.connect(options.path);
    let device: VhostUserDevice<QueueDriver> | undefined;
    try {
      const negotiated = await negotiate(connection, options);
      const isPacked = options.packed ?? false;
      device = new VhostUserDevice<QueueDriver>(
        connection,
        negotiated,
        { ...options, packed: isPacked },
        (ram, of) =>
          isPacked ? new PackedDriver(ram, of) : new SplitDriver(ram, of),
      );
      await device.#prepare();
      if (options.start ?? true) await device.start();
      return device;
    } catch (error) {
      connection.close();
      await connection.closed;
      if (device !== undefined) device.#free();
      throw error;
    }
  }

  /** To the back-end; another one after `reconnect`. */
  get connection(): FrontendConnection {
    return this.#connection;
  }

  /**
   * The region in which the back-end tracks requests, or null; the device's,
   * and valid until it is reset or closed.
   */
  get inflight(): InflightWithFile | null {
    return this.#inflight;
  }

  /** By queue index. */
  get queues(): readonly Driver[] {
    return this.#queues.drivers;
  }

  /** Whether the queue was started and not stopped since. */
  isStarted(index: number): boolean {
    return this.#queues.started.has(index);
  }

  /** Sends features and memory, starts and enables all queues. */
  async start(): Promise<void> {
    await this.activate();
    for (let index = 0; index < this.queues.length; index++) {
      await this.startQueue(index, { enable: false });
    }
    for (let index = 0; index < this.queues.length; index++) {
      await this.enableQueue(index, true);
    }
    await this.setStatusBits(DeviceStatus.DRIVER_OK);
  }

  /** Sends features and memory; then queues can be started singly. */
  async activate(): Promise<void> {
    await this.#sendFeatures(this.#acks.other);
    if (hasFeature(this.protocolFeatures, Protocol.INFLIGHT_SHMFD)) {
      const { length } = this.queues;
      const { queueSize } = this.queues[0];
      this.#inflight ??= await this.connection.getInflightFd(length, queueSize);
      await this.connection.setInflightFd(this.#inflight, this.#acks.other);
    }
    await this.setStatusBits(
      DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.FEATURES_OK,
    );
    await this.sendMemory();
  }

  /**
   * Tells the back-end the regions, by the way that was negotiated: the whole
   * table, or what has come and gone since the last time.
   */
  async sendMemory(): Promise<void> {
    const { regions } = this.ram;
    if (!hasFeature(this.protocolFeatures, Protocol.CONFIGURE_MEM_SLOTS)) {
      await this.connection.setMemTable(regions, this.#acks.usual);
      return;
    }
    for (const region of [...this.#sentRegions]) {
      if (!regions.includes(region)) await this.removeRegion(region);
    }
    for (const region of regions) {
      if (!this.#sentRegions.has(region)) await this.addRegion(region);
    }
  }

  /** ADD_MEM_REG for a region of `ram`. */
  async addRegion(region: RamRegion): Promise<void> {
    await this.connection.addMemRegion(region, this.#acks.usual);
    this.#sentRegions.add(region);
  }

  /** REM_MEM_REG for a region of `ram`, which stays open here. */
  async removeRegion(region: RamRegion): Promise<void> {
    await this.connection.removeMemRegion(region, this.#acks.usual);
    this.#sentRegions.delete(region);
  }

  /**
   * Goes on with another back-end, in the place of one that has gone: the same
   * features, memory and inflight region, and every queue that was started.
   * Requests in flight stay so, and those that the other back-end had not
   * completed are resubmitted by the new one if the device `recovers`;
   * otherwise they are only where it completed in order.
   *
   * @param to where the back-end is; the path given to `open` unless given
   */
  async reconnect(
    to: { readonly path?: string; readonly fd?: number } = {},
  ): Promise<void> {
    this.connection.close();
    await this.connection.closed;
    const fd = to.fd;
    const path = to.path ?? this.#options.path;
    if (fd === undefined && path === undefined) {
      throw new Vhost2Error("OPTION", "Cannot reconnect: give path or fd");
    }
    this.#connection = fd !== undefined
      ? FrontendConnection.fromFd(fd)
      : await FrontendConnection.connect(path!);
    this.#sentRegions.clear();
    this.connection.onBackendRequest = (message, descriptors) =>
      this.#backendRequest(message, descriptors);
    const { features, protocolFeatures } = await negotiate(
      this.connection,
      this.#options,
    );
    if (
      features !== this.features || protocolFeatures !== this.protocolFeatures
    ) {
      throw new Vhost2Error(
        "OPTION",
        "Cannot reconnect: this back-end offers other features",
      );
    }
    this.#connectIommu(this.connection);
    await this.#prepare();
    await this.activate();
    await this.#queues.startAgain();
    if (this.#queues.started.size > 0) {
      await this.setStatusBits(DeviceStatus.DRIVER_OK);
    }
  }

  /** The ring's parts as SET_VRING_ADDR carries them. */
  vringAddress(index: number): VringAddress {
    return this.#queues.address(index);
  }

  #sendFeatures(options: RequestOptions): Promise<void> {
    const logAll = featureMask(VirtioFeature.LOG_ALL);
    return this.connection.setFeatures(
      this.features | (this.#logsBuffers ? logAll : 0n),
      options,
    );
  }

  /**
   * Has the device log what it writes, as at the begin of a migration; queues
   * go on. A new log takes the place, and the bits, of the one before, which is
   * closed.
   * Needs LOG_SHMFD.
   */
  async startLog(options: LogOptions = {}): Promise<DirtyLog> {
    if (!hasFeature(this.protocolFeatures, Protocol.LOG_SHMFD)) {
      throw new Vhost2Error(
        "OPTION",
        "Cannot log what the device writes: LOG_SHMFD is not negotiated",
      );
    }
    const end = this.ram.regions.reduce(
      (most, { gpa, size }) =>
        gpa + BigInt(size) > most ? gpa + BigInt(size) : most,
      0n,
    );
    const log = new DirtyLog({ end, offset: options.offset });
    try {
      await this.connection.setLogBase(log);
    } catch (error) {
      log.close();
      throw error;
    }
    if (this.#log !== undefined) log.takeFrom(this.#log);
    this.#log?.close();
    this.#log = log;
    await this.#setLogging(options.buffers ?? true, options.rings ?? true);
    return log;
  }

  /** The end of it: nothing is logged any more, and the log is closed. */
  async stopLog(): Promise<void> {
    if (this.#log === undefined) return;
    await this.#setLogging(false, false);
    this.#log.close();
    this.#log = undefined;
  }

  /** SET_FEATURES and SET_VRING_ADDR, as QEMU toggles logging. */
  async #setLogging(buffers: boolean, rings: boolean): Promise<void> {
    this.#logsBuffers = buffers;
    this.#queues.isLogged = rings;
    await this.#sendFeatures(this.#acks.usual);
    for (const index of this.#queues.started) {
      await this.connection.setVringAddr(
        this.vringAddress(index),
        this.#acks.usual,
      );
    }
  }

  /** NUM, BASE, ADDR, CALL, KICK, ENABLE; then a kick, as the standard asks. */
  async startQueue(
    index: number,
    options: StartQueueOptions = {},
  ): Promise<void> {
    await this.#queues.start(index, options);
  }

  /** SET_VRING_ENABLE, where PROTOCOL_FEATURES is acked; else nothing. */
  async enableQueue(index: number, isEnabled: boolean): Promise<void> {
    await this.#queues.enable(index, isEnabled);
  }

  /**
   * Disables and stops the queue: the back-end answers when nothing is in
   * flight any more. Returns the base, where the next start goes on.
   */
  async stopQueue(
    index: number,
    options: StopQueueOptions = {},
  ): Promise<number> {
    return await this.#queues.stop(index, options);
  }

  /**
   * Resets one queue while the others run, as a guest does with RING_RESET
   * (virtio 1.3, 2.6.1): stops it and makes a new driver, which is returned
   * and takes the place of the old one in `queues`. Requests in flight reject
   * with CLOSED. The new one is not started.
   */
  async resetQueue(
    index: number,
    options: { readonly queueSize?: number } = {},
  ): Promise<Driver> {
    return await this.#queues.replace(index, options.queueSize);
  }

  /** Stops all started queues. */
  async stop(): Promise<void> {
    await this.#queues.stopAll();
  }

  /** Bytes of configuration space. */
  getConfig(offset: number, size: number): Promise<Uint8Array> {
    return this.connection.getConfig(offset, size);
  }

  /** Writes configuration space, as the driver does. */
  async setConfig(offset: number, data: Uint8Array): Promise<void> {
    await this.connection.setConfig(offset, data, this.#acks.usual);
  }

  /** Sets bits of the device status, where STATUS is negotiated. */
  async setStatusBits(bits: number): Promise<void> {
    if (!hasFeature(this.protocolFeatures, Protocol.STATUS)) return;
    const status = await this.connection.getStatus();
    await this.connection.setStatus(status | bits, this.#acks.other);
  }

  /** A reset by the guest: queues stop, rings and status are as at the start. */
  async reset(): Promise<void> {
    await this.stop();
    if (hasFeature(this.protocolFeatures, Protocol.STATUS)) {
      await this.connection.setStatus(0, this.#acks.other);
    }
    if (hasFeature(this.protocolFeatures, Protocol.RESET_DEVICE)) {
      await this.connection.resetDevice(this.#acks.usual);
    }
    this.#dropInflight();
    this.#queues.reset();
  }

  /**
   * Stops the queues and closes everything. A back-end that has gone is no
   * error; to leave one that does not answer, close `connection` first.
   */
  async close(): Promise<void> {
    try {
      if (this.connection.isOpen) await this.stop();
    } catch (error) {
      if (this.connection.isOpen) throw error;
    } finally {
      this.connection.close();
      await this.connection.closed;
      this.#free();
    }
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  /** The part of the handshake that comes before the guest's driver starts. */
  async #prepare(): Promise<void> {
    const { connection } = this;
    if (hasFeature(this.protocolFeatures, Protocol.BACKEND_REQ)) {
      await connection.setBackendChannel(this.#acks.usual);
    }
    await connection.setOwner(this.#acks.other);
    await connection.getFeatures();
    for (let index = 0; index < this.queues.length; index++) {
      const { callFd } = this.queues[index];
      await connection.setVringCall(index, callFd, this.#acks.other);
    }
  }

  #connectIommu(connection: FrontendConnection): void {
    const isGpa = hasFeature(this.protocolFeatures, Protocol.GPA_ADDRESSES);
    this.iommu?.connect(connection, { isGpa });
  }

  #backendRequest(
    message: BackendMessage,
    descriptors: Descriptors,
  ): bigint | Promise<bigint> {
    if (
      message.id === BackendRequest.BACKEND_VRING_HOST_NOTIFIER_MSG &&
      this.#options.takesHostNotifiers
    ) {
      const { index } = message.payload.vring;
      if (index >= this.queues.length) return 1n;
      this.hostNotifiers.take(message.payload, descriptors);
      this.onHostNotifier?.(index);
      return 0n;
    }
    if (
      message.id === BackendRequest.BACKEND_IOTLB_MSG &&
      this.iommu !== undefined
    ) return this.iommu.answer(message.payload);
    if (message.id !== BackendRequest.BACKEND_CONFIG_CHANGE_MSG) return 1n;
    this.onConfigChange?.();
    return 0n;
  }

  #dropInflight(): void {
    if (this.#inflight !== null) core.descriptorClose(this.#inflight.fd);
    this.#inflight = null;
  }

  #free(): void {
    this.#dropInflight();
    this.#queues.close();
    this.hostNotifiers.close();
    this.#log?.close();
    if (this.#ownsRam) this.ram.close();
  }
}
