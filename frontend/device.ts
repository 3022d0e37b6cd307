/**
 * A vhost-user device as a front-end uses it: the handshake in QEMU's order,
 * guest memory, and a virtqueue driver for each queue.
 *
 * @module
 */

import { core } from "../ffi/core.ts";
import { Vhost2Error } from "../ffi/errors.ts";
import { gpa, ringAddress } from "../protocol/address.ts";
import {
  featureMask,
  hasFeature,
  ProtocolFeature as Protocol,
  VirtioFeature,
} from "../protocol/features.ts";
import type { BackendMessage } from "../protocol/backend_request.ts";
import { BackendRequest } from "../protocol/backend_request.ts";
import { VRING_FLAG_LOG, type VringAddress } from "../protocol/payloads.ts";
import type { Descriptors } from "../transports/transport.ts";
import { FrontendConnection, type InflightWithFile } from "./connection.ts";
import { DirtyLog } from "./dirty_log.ts";
import { HostNotifiers } from "./host_notifiers.ts";
import {
  GuestRam,
  type RamRegion,
  type RamRegionOptions,
} from "../driver/guest_ram.ts";
import { PackedDriver } from "../driver/packed_driver.ts";
import type {
  QueueDriver,
  QueueDriverOptions,
} from "../driver/queue_driver.ts";
import { SplitDriver } from "../driver/split_driver.ts";
import { Iommu, type IommuOptions } from "./iommu.ts";

/** Bits of the device status (VIRTIO 1.3 section 2.1). */
export const DeviceStatus = {
  ACKNOWLEDGE: 1,
  DRIVER: 2,
  DRIVER_OK: 4,
  FEATURES_OK: 8,
} as const;

/** Protocol features that this front-end knows how to use. */
export const supportedProtocolFeatures: bigint = featureMask(
  Protocol.MQ,
  Protocol.LOG_SHMFD,
  Protocol.REPLY_ACK,
  Protocol.BACKEND_REQ,
  Protocol.CONFIG,
  Protocol.RESET_DEVICE,
  Protocol.CONFIGURE_MEM_SLOTS,
  Protocol.STATUS,
);

/** What `recovers` adds to them. */
const inflightFeatures = featureMask(
  Protocol.INFLIGHT_SHMFD,
  Protocol.GET_VRING_BASE_INFLIGHT,
  Protocol.GET_VRING_BASE_SKIP_DRAIN,
);

/** What `takesHostNotifiers` adds to them. */
const notifierFeatures = featureMask(
  Protocol.BACKEND_REQ,
  Protocol.BACKEND_SEND_FD,
  Protocol.HOST_NOTIFIER,
);

/** Virtio features of the transport and the ring that it knows. */
export const supportedFeatures: bigint = featureMask(
  VirtioFeature.RING_INDIRECT_DESC,
  VirtioFeature.RING_EVENT_IDX,
  VirtioFeature.IN_ORDER,
  VirtioFeature.PROTOCOL_FEATURES,
  VirtioFeature.VERSION_1,
);

/** How a device is opened. */
export interface VhostUserDeviceOptions {
  /** Path of the back-end's socket. */
  readonly path?: string;
  /** A connected socket, instead of a path; the device owns it then. */
  readonly fd?: number;
  /**
   * Features wanted, those of the device type included; of them, those that
   * are offered are acked. {@linkcode supportedFeatures} unless given.
   * RING_PACKED is a matter of `packed`, ACCESS_PLATFORM of `iommu`, whatever is
   * said here.
   */
  readonly features?: bigint;
  /** The same for {@linkcode supportedProtocolFeatures}. */
  readonly protocolFeatures?: bigint;
  /** 1 unless given. */
  readonly queueCount?: number;
  /** Descriptors per queue; 128 unless given. */
  readonly queueSize?: number;
  /** Bytes of guest memory, in one region; 64 MiB unless given. */
  readonly ramSize?: number;
  /** The regions of guest memory, instead of its size. */
  readonly regions?: readonly RamRegionOptions[];
  /** Guest memory that exists and stays the caller's. */
  readonly ram?: GuestRam;
  /** Asks for acks wherever it can, not only where QEMU does. */
  readonly acksAll?: boolean;
  /**
   * An IOMMU between the device and the memory: ACCESS_PLATFORM, which the
   * device must offer. `true` makes one.
   */
  readonly iommu?: boolean | IommuOptions;
  /** Starts and enables all queues; true unless given. */
  readonly start?: boolean;
  /** Whether the drivers watch their calls; true unless given. */
  readonly usesCalls?: boolean;
  /**
   * Has the back-end track requests in an inflight region, so that `reconnect`
   * loses none of them; the device must offer INFLIGHT_SHMFD.
   */
  readonly recovers?: boolean;
  /**
   * Takes host notifiers: where the back-end gives one, the queue is kicked by
   * a register of its device.
   */
  readonly takesHostNotifiers?: boolean;
}

/** Which format the rings have. */
export interface RingFormatOptions {
  /** Packed rings, which the device must offer; split ones unless given. */
  readonly packed: boolean;
}

/** What is logged. */
export interface LogOptions {
  /** Buffers (LOG_ALL); true unless given. */
  readonly buffers?: boolean;
  /** What the device writes into the rings (VHOST_VRING_F_LOG); likewise. */
  readonly rings?: boolean;
  /** Bytes of the log's file in front of it; 0 unless given. */
  readonly offset?: number;
}

/** How one queue is stopped. */
export interface StopQueueOptions {
  /**
   * Stops at once by GET_VRING_BASE_SKIP_DRAIN: what is in flight stays so, and
   * is resubmitted when the queue is started again.
   */
  readonly skipDrain?: boolean;
}

/** How one queue is started. */
export interface StartQueueOptions {
  /** Where to go on; where the last stop ended unless given. */
  readonly base?: number;
  /** Also enables it, where PROTOCOL_FEATURES is acked; true unless given. */
  readonly enable?: boolean;
  /** No kick descriptor: the back-end is to poll; false unless given. */
  readonly polled?: boolean;
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
  readonly #queues: Driver[] = [];
  /** By queue index. */
  readonly queues: readonly Driver[] = this.#queues;
  /** Where it was opened with one. */
  readonly iommu: Iommu | undefined;
  /** The back-end says that configuration space has changed. */
  onConfigChange: (() => void) | undefined;
  /** Where it `takesHostNotifiers`: those that the back-end has given. */
  readonly hostNotifiers: HostNotifiers = new HostNotifiers();
  /** The back-end has given, or taken away, that of a queue. */
  onHostNotifier: ((index: number) => void) | undefined;
  readonly #makeDriver: (index: number, queueSize: number) => Driver;
  #connection: FrontendConnection;
  #inflight: InflightWithFile | null = null;
  readonly #options: VhostUserDeviceOptions & RingFormatOptions;
  readonly #ownsRam: boolean;
  readonly #acksAll: boolean;
  readonly #bases: number[];
  #log: DirtyLog | undefined;
  #logsBuffers = false;
  #logsRings = false;
  readonly #started = new Set<number>();
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
    this.#acksAll = options.acksAll ?? false;
    this.#ownsRam = options.ram === undefined;
    this.ram = options.ram ??
      new GuestRam(options.regions ?? [{ size: options.ramSize ?? 64 << 20 }]);
    if (options.iommu) {
      const { iommu } = options;
      this.iommu = new Iommu(this.ram, iommu === true ? {} : iommu);
      this.#connectIommu(connection);
    }
    this.#makeDriver = (index, queueSize) => {
      const driver = makeDriver(this.ram, {
        queueSize,
        features: this.features,
        usesCalls: options.usesCalls,
        iommu: this.iommu,
      });
      driver.kickDirectly = () => this.hostNotifiers.kick(index);
      return driver;
    };
    try {
      for (let index = 0; index < queueCount; index++) {
        this.#queues.push(this.#makeDriver(index, options.queueSize ?? 128));
      }
    } catch (error) {
      this.#free();
      throw error;
    }
    this.#bases = this.queues.map(({ firstBase }) => firstBase);
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

  /** Whether acks are asked for on messages where QEMU does. */
  get #ack(): { ack: boolean } {
    return { ack: hasFeature(this.protocolFeatures, Protocol.REPLY_ACK) };
  }

  /** The same on messages where QEMU does not. */
  get #ackOfAll(): { ack: boolean } {
    return { ack: this.#acksAll && this.#ack.ack };
  }

  /** Whether the queue was started and not stopped since. */
  isStarted(index: number): boolean {
    return this.#started.has(index);
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
    await this.#sendFeatures(this.#ackOfAll);
    if (hasFeature(this.protocolFeatures, Protocol.INFLIGHT_SHMFD)) {
      const { length } = this.queues;
      const { queueSize } = this.queues[0];
      this.#inflight ??= await this.connection.getInflightFd(length, queueSize);
      await this.connection.setInflightFd(this.#inflight, this.#ackOfAll);
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
      await this.connection.setMemTable(regions, this.#ack);
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
    await this.connection.addMemRegion(region, this.#ack);
    this.#sentRegions.add(region);
  }

  /** REM_MEM_REG for a region of `ram`, which stays open here. */
  async removeRegion(region: RamRegion): Promise<void> {
    await this.connection.removeMemRegion(region, this.#ack);
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
    const started = [...this.#started];
    for (const index of started) {
      const driver = this.queues[index];
      // As QEMU does. It is right without a region where the back-end completes
      // in order; a packed ring's base is known to nobody but the region.
      const base = driver instanceof SplitDriver
        ? driver.usedIndex
        : this.#bases[index];
      await this.startQueue(index, { base });
    }
    if (started.length > 0) await this.setStatusBits(DeviceStatus.DRIVER_OK);
  }

  /** The ring's parts as SET_VRING_ADDR carries them. */
  vringAddress(index: number): VringAddress {
    const { descriptor, available, used } = this.queues[index].deviceAddresses;
    const isDirect = this.iommu !== undefined ||
      hasFeature(this.protocolFeatures, Protocol.GPA_ADDRESSES);
    const address = (value: bigint) =>
      ringAddress(isDirect ? value : this.ram.toUva(value));
    return {
      index,
      flags: this.#logsRings ? VRING_FLAG_LOG : 0,
      descriptor: address(descriptor),
      used: address(used),
      available: address(available),
      // As QEMU does: there even when nothing is logged.
      log: gpa(this.queues[index].ring.addresses.used),
    };
  }

  #sendFeatures(options: { ack: boolean }): Promise<void> {
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
    this.#logsRings = rings;
    await this.#sendFeatures(this.#ack);
    for (const index of this.#started) {
      await this.connection.setVringAddr(this.vringAddress(index), this.#ack);
    }
  }

  /** NUM, BASE, ADDR, CALL, KICK, ENABLE; then a kick, as the standard asks. */
  async startQueue(
    index: number,
    options: StartQueueOptions = {},
  ): Promise<void> {
    const { connection } = this;
    const driver = this.queues[index];
    const base = options.base ?? this.#bases[index];
    const ack = this.#ackOfAll;
    await connection.setVringNum(index, driver.queueSize, ack);
    await connection.setVringBase(index, base, ack);
    await connection.setVringAddr(this.vringAddress(index), ack);
    // Before the kick, which starts the queue: a call for what was left in the
    // ring must not be lost.
    await connection.setVringCall(index, driver.callFd, ack);
    const isPolled = options.polled ?? false;
    await connection.setVringKick(index, isPolled ? null : driver.kickFd, ack);
    this.#started.add(index);
    if (options.enable ?? true) await this.enableQueue(index, true);
    if (!isPolled) driver.kick();
  }

  /** SET_VRING_ENABLE, where PROTOCOL_FEATURES is acked; else nothing. */
  async enableQueue(index: number, isEnabled: boolean): Promise<void> {
    if (!hasFeature(this.features, VirtioFeature.PROTOCOL_FEATURES)) return;
    await this.connection.setVringEnable(index, isEnabled, this.#ack);
  }

  /**
   * Disables and stops the queue: the back-end answers when nothing is in
   * flight any more. Returns the base, where the next start goes on.
   */
  async stopQueue(
    index: number,
    options: StopQueueOptions = {},
  ): Promise<number> {
    const { connection } = this;
    await this.enableQueue(index, false);
    const base = options.skipDrain
      ? await connection.skipDrain(index)
      : await connection.getVringBase(index);
    this.#started.delete(index);
    this.#bases[index] = base;
    // What was completed last may have come without a call.
    this.queues[index].poll();
    return base;
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
    if (this.isStarted(index)) await this.stopQueue(index);
    const old = this.queues[index];
    const driver = this.#makeDriver(index, options.queueSize ?? old.queueSize);
    this.#queues[index] = driver;
    this.#bases[index] = driver.firstBase;
    old.close();
    return driver;
  }

  /** Stops all started queues. */
  async stop(): Promise<void> {
    for (const index of [...this.#started]) await this.stopQueue(index);
  }

  /** Bytes of configuration space. */
  getConfig(offset: number, size: number): Promise<Uint8Array> {
    return this.connection.getConfig(offset, size);
  }

  /** Writes configuration space, as the driver does. */
  async setConfig(offset: number, data: Uint8Array): Promise<void> {
    await this.connection.setConfig(offset, data, this.#ack);
  }

  /** Sets bits of the device status, where STATUS is negotiated. */
  async setStatusBits(bits: number): Promise<void> {
    if (!hasFeature(this.protocolFeatures, Protocol.STATUS)) return;
    const status = await this.connection.getStatus();
    await this.connection.setStatus(status | bits, this.#ackOfAll);
  }

  /** A reset by the guest: queues stop, rings and status are as at the start. */
  async reset(): Promise<void> {
    await this.stop();
    if (hasFeature(this.protocolFeatures, Protocol.STATUS)) {
      await this.connection.setStatus(0, this.#ackOfAll);
    }
    if (hasFeature(this.protocolFeatures, Protocol.RESET_DEVICE)) {
      await this.connection.resetDevice(this.#ack);
    }
    this.#dropInflight();
    this.queues.forEach((driver, index) => {
      driver.reset();
      this.#bases[index] = driver.firstBase;
    });
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
      await connection.setBackendChannel(this.#ack);
    }
    await connection.setOwner(this.#ackOfAll);
    await connection.getFeatures();
    for (let index = 0; index < this.queues.length; index++) {
      const { callFd } = this.queues[index];
      await connection.setVringCall(index, callFd, this.#ackOfAll);
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
    for (const driver of this.queues) driver.close();
    this.hostNotifiers.close();
    this.#log?.close();
    if (this.#ownsRam) this.ram.close();
  }
}

interface Negotiated {
  readonly features: bigint;
  readonly protocolFeatures: bigint;
  readonly maxQueueCount: number;
}

async function negotiate(
  connection: FrontendConnection,
  options: VhostUserDeviceOptions & Partial<RingFormatOptions>,
): Promise<Negotiated> {
  const offered = await connection.getFeatures();
  const packed = featureMask(VirtioFeature.RING_PACKED);
  if (options.packed && (offered & packed) === 0n) {
    throw new Vhost2Error(
      "OPTION",
      "Cannot use packed rings: the device does not offer RING_PACKED",
    );
  }
  const platform = featureMask(VirtioFeature.ACCESS_PLATFORM);
  if (options.iommu && (offered & platform) === 0n) {
    throw new Vhost2Error(
      "OPTION",
      "Cannot use an IOMMU: the device does not offer ACCESS_PLATFORM",
    );
  }
  // The log toggles LOG_ALL.
  const never = packed | platform | featureMask(VirtioFeature.LOG_ALL);
  const features = offered &
    ((options.features ?? supportedFeatures) & ~never |
      (options.packed ? packed : 0n) | (options.iommu ? platform : 0n));
  let protocolFeatures = 0n;
  if (hasFeature(features, VirtioFeature.PROTOCOL_FEATURES)) {
    const added = (options.recovers ? inflightFeatures : 0n) |
      (options.takesHostNotifiers ? notifierFeatures : 0n);
    const offered = await connection.getProtocolFeatures();
    if (options.recovers && !hasFeature(offered, Protocol.INFLIGHT_SHMFD)) {
      throw new Vhost2Error(
        "OPTION",
        "Cannot recover requests: the device does not offer INFLIGHT_SHMFD",
      );
    }
    protocolFeatures = offered &
      ((options.protocolFeatures ?? supportedProtocolFeatures) | added);
    const ack = options.acksAll === true &&
      hasFeature(protocolFeatures, Protocol.REPLY_ACK);
    await connection.setProtocolFeatures(protocolFeatures, { ack });
  }
  if (options.iommu && !hasFeature(protocolFeatures, Protocol.BACKEND_REQ)) {
    throw new Vhost2Error(
      "OPTION",
      "Cannot use an IOMMU: without BACKEND_REQ the device cannot ask for translations",
    );
  }
  const maxQueueCount = hasFeature(protocolFeatures, Protocol.MQ)
    ? await connection.getQueueNum()
    : options.queueCount ?? 1;
  if (hasFeature(protocolFeatures, Protocol.CONFIGURE_MEM_SLOTS)) {
    await connection.getMaxMemSlots();
  }
  return { features, protocolFeatures, maxQueueCount };
}
