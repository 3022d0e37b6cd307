/**
 * The queues of an open device: a driver for each, where it goes on, and the
 * messages that start and stop it.
 *
 * @module
 */

import { gpa, ringAddress } from "../protocol/address.ts";
import {
  hasFeature,
  ProtocolFeature as Protocol,
  VirtioFeature,
} from "../protocol/features.ts";
import { VRING_FLAG_LOG, type VringAddress } from "../protocol/payloads.ts";
import type { GuestRam } from "../driver/guest_ram.ts";
import type { QueueDriver } from "../driver/queue_driver.ts";
import { SplitDriver } from "../driver/split_driver.ts";
import type { FrontendConnection, RequestOptions } from "./connection.ts";
import type { Iommu } from "./iommu.ts";

/** How one queue is started. */
export interface StartQueueOptions {
  /** Where to go on; where the last stop ended unless given. */
  readonly base?: number;
  /** Also enables it, where PROTOCOL_FEATURES is acked; true unless given. */
  readonly enable?: boolean;
  /** No kick descriptor: the back-end is to poll; false unless given. */
  readonly polled?: boolean;
}

/** How one queue is stopped. */
export interface StopQueueOptions {
  /**
   * Stops at once by GET_VRING_BASE_SKIP_DRAIN: what is in flight stays so, and
   * is resubmitted when the queue is started again.
   */
  readonly skipDrain?: boolean;
}

/** What the queues need to know of their device. */
export interface QueuesDevice {
  readonly connection: FrontendConnection;
  readonly features: bigint;
  readonly protocolFeatures: bigint;
  readonly ram: GuestRam;
  readonly iommu: Iommu | undefined;
}

/** On which messages acks are asked for. */
export interface Acks {
  /** Those where QEMU does. */
  readonly usual: RequestOptions;
  /** All others. */
  readonly other: RequestOptions;
}

export class DeviceQueues<Driver extends QueueDriver> {
  readonly #device: QueuesDevice;
  readonly #acks: Acks;
  readonly #makeDriver: (index: number, queueSize: number) => Driver;
  readonly #drivers: Driver[] = [];
  readonly #bases: number[] = [];
  readonly #started = new Set<number>();
  /** Addresses carry VHOST_VRING_F_LOG. */
  isLogged = false;

  constructor(
    device: QueuesDevice,
    acks: Acks,
    makeDriver: (index: number, queueSize: number) => Driver,
  ) {
    this.#device = device;
    this.#acks = acks;
    this.#makeDriver = makeDriver;
  }

  /** By queue index. */
  get drivers(): readonly Driver[] {
    return this.#drivers;
  }

  /** Those that were started and not stopped since. */
  get started(): ReadonlySet<number> {
    return this.#started;
  }

  add(queueSize: number): void {
    const driver = this.#makeDriver(this.#drivers.length, queueSize);
    this.#drivers.push(driver);
    this.#bases.push(driver.firstBase);
  }

  /** The ring's parts as SET_VRING_ADDR carries them. */
  address(index: number): VringAddress {
    const { iommu, protocolFeatures, ram } = this.#device;
    const { deviceAddresses, ring } = this.#drivers[index];
    const isDirect = iommu !== undefined ||
      hasFeature(protocolFeatures, Protocol.GPA_ADDRESSES);
    const address = (value: bigint) =>
      ringAddress(isDirect ? value : ram.toUva(value));
    return {
      index,
      flags: this.isLogged ? VRING_FLAG_LOG : 0,
      descriptor: address(deviceAddresses.descriptor),
      used: address(deviceAddresses.used),
      available: address(deviceAddresses.available),
      // As QEMU does: there even when nothing is logged.
      log: gpa(ring.addresses.used),
    };
  }

  /** NUM, BASE, ADDR, CALL, KICK, ENABLE; then a kick, as the standard asks. */
  async start(index: number, options: StartQueueOptions = {}): Promise<void> {
    const { connection } = this.#device;
    const driver = this.#drivers[index];
    const base = options.base ?? this.#bases[index];
    const ack = this.#acks.other;
    await connection.setVringNum(index, driver.queueSize, ack);
    await connection.setVringBase(index, base, ack);
    await connection.setVringAddr(this.address(index), ack);
    // Before the kick, which starts the queue: a call for what was left in the
    // ring must not be lost.
    await connection.setVringCall(index, driver.callFd, ack);
    const isPolled = options.polled ?? false;
    await connection.setVringKick(index, isPolled ? null : driver.kickFd, ack);
    this.#started.add(index);
    if (options.enable ?? true) await this.enable(index, true);
    if (!isPolled) driver.kick();
  }

  /** Starts, with another back-end, each queue that had been started. */
  async startAgain(): Promise<void> {
    for (const index of [...this.#started]) {
      const driver = this.#drivers[index];
      // As QEMU does. It is right without a region where the back-end completes
      // in order; a packed ring's base is known to nobody but the region.
      const base = driver instanceof SplitDriver
        ? driver.usedIndex
        : this.#bases[index];
      await this.start(index, { base });
    }
  }

  async enable(index: number, isEnabled: boolean): Promise<void> {
    const { connection, features } = this.#device;
    if (!hasFeature(features, VirtioFeature.PROTOCOL_FEATURES)) return;
    await connection.setVringEnable(index, isEnabled, this.#acks.usual);
  }

  async stop(index: number, options: StopQueueOptions = {}): Promise<number> {
    const { connection } = this.#device;
    await this.enable(index, false);
    const base = options.skipDrain
      ? await connection.skipDrain(index)
      : await connection.getVringBase(index);
    this.#started.delete(index);
    this.#bases[index] = base;
    // What was completed last may have come without a call.
    this.#drivers[index].poll();
    return base;
  }

  async stopAll(): Promise<void> {
    for (const index of [...this.#started]) await this.stop(index);
  }

  /** Stops one queue and puts a new driver in the place of its own. */
  async replace(index: number, queueSize?: number): Promise<Driver> {
    if (this.#started.has(index)) await this.stop(index);
    const old = this.#drivers[index];
    const driver = this.#makeDriver(index, queueSize ?? old.queueSize);
    this.#drivers[index] = driver;
    this.#bases[index] = driver.firstBase;
    old.close();
    return driver;
  }

  /** As a driver finds them that begins anew. All must be stopped. */
  reset(): void {
    this.#drivers.forEach((driver, index) => {
      driver.reset();
      this.#bases[index] = driver.firstBase;
    });
  }

  close(): void {
    for (const driver of this.#drivers) driver.close();
  }
}
