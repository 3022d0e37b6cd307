/**
 * The registers of a modern virtio PCI device (VIRTIO 1.3 section 4.1), and
 * what the standard wants done with them in which order. Whose rings, and
 * whose memory, the device works on is the caller's business.
 *
 * The device is not trusted: what it says is checked, and it may go away at
 * any moment, after which it answers all ones.
 *
 * @module
 */

import { Vhost2Error } from "../ffi/errors.ts";
import {
  describeFeatures,
  featureMask,
  VirtioFeature,
} from "../protocol/features.ts";
import { CommonConfig, type CommonRegister } from "./common_config.ts";
import { NO_VECTOR } from "./interrupts.ts";
import {
  ConfigRegister,
  goneValue,
  hasGone,
  type PciDevice,
  type RegisterWidth,
} from "./pci_device.ts";
import {
  CapabilityType,
  requireCapability,
  type VirtioCapabilities,
  virtioCapabilities,
  type VirtioCapability,
} from "./virtio_capabilities.ts";

/** Who makes virtio devices. */
export const VIRTIO_VENDOR = 0x1af4;
/** PCI device ids: transitional ones, and modern ones from 0x1040 on. */
const firstTransitional = 0x1000;
const firstModern = 0x1040;
const lastModern = 0x107f;

/** Bits of the device status (section 2.1). */
const Status = {
  ACKNOWLEDGE: 1,
  DRIVER: 2,
  DRIVER_OK: 4,
  FEATURES_OK: 8,
  NEEDS_RESET: 0x40,
} as const;

/** A reset that takes longer has failed. */
const resetLimitMs = 5_000;
/** Readings of configuration space that changes all the time. */
const maxConfigReads = 100;
/** Descriptors in a queue (section 2.6). */
const maxQueueSize = 32768;

/** Without it no driver of today works. */
const version1 = featureMask(VirtioFeature.VERSION_1);

/** Whether the device works. */
export type Condition =
  | "ok"
  /** It says that it is broken until it is reset. */
  | "needsReset"
  | "gone";

/** I/O addresses of a ring's parts, by their names in a split ring. */
export interface QueueAddresses {
  readonly descriptor: bigint;
  readonly available: bigint;
  readonly used: bigint;
}

/** A place in a BAR. */
export interface BarPlace {
  readonly bar: number;
  /** Bytes from the start of the BAR. */
  readonly offset: number;
}

/** Descriptors of a ring that has `most` at most; a split ring's are 2^n. */
export function ringSize(most: number, isPacked: boolean): number {
  return isPacked ? most : 2 ** Math.floor(Math.log2(most));
}

export class VirtioRegisters {
  readonly pci: PciDevice;
  /** The virtio device type: 2 is a disk. */
  readonly type: number;
  readonly capabilities: VirtioCapabilities;
  readonly #common: CommonConfig;
  readonly #notify: VirtioCapability;
  readonly #config: VirtioCapability | undefined;
  readonly #isr: VirtioCapability | undefined;

  /**
   * Finds them. Throws PROTOCOL for what is no modern virtio device or does
   * not keep to the rules, CLOSED when it has gone.
   *
   * @param isOpenEnded capabilities whose length is to be ignored
   */
  constructor(pci: PciDevice, isOpenEnded?: (type: number) => boolean) {
    requireVirtio(pci);
    this.pci = pci;
    this.type = virtioType(pci);
    this.capabilities = virtioCapabilities(pci, isOpenEnded);
    const need = (type: number) =>
      requireCapability(pci, this.capabilities, type);
    const first = (type: number) =>
      this.capabilities.usable.find((capability) => capability.type === type);
    this.#common = new CommonConfig(pci, need(CapabilityType.common));
    this.#notify = need(CapabilityType.notify);
    this.#config = first(CapabilityType.device);
    this.#isr = first(CapabilityType.isr);
  }

  /** Whether it works, as it says itself. */
  get condition(): Condition {
    const status = this.#common.read("deviceStatus");
    if (status === goneValue[1] && hasGone(this.pci)) return "gone";
    return (status & Status.NEEDS_RESET) === 0 ? "ok" : "needsReset";
  }

  /**
   * Section 2.4: it has been reset when its status reads 0. Rejects with
   * TIMEOUT when it does not come out of it, CLOSED when it has gone.
   */
  async reset(): Promise<void> {
    this.#common.write("deviceStatus", 0);
    await this.#until(() => {
      const status = this.#common.read("deviceStatus");
      if (status === goneValue[1] && hasGone(this.pci)) throw this.#gone();
      return status === 0;
    }, "it");
  }

  async #until(isDone: () => boolean, what: string): Promise<void> {
    const end = performance.now() + resetLimitMs;
    while (!isDone()) {
      if (performance.now() > end) {
        throw new Vhost2Error(
          "TIMEOUT",
          `Cannot reset PCI device ${this.pci.name}: ${what} has not come out of it in ${resetLimitMs} ms`,
        );
      }
      await new Promise((resolve) => setTimeout(resolve, 1));
    }
  }

  /** All that the device offers; after a reset. Throws without VERSION_1. */
  get offeredFeatures(): bigint {
    const offered = this.#common.offeredFeatures;
    if ((offered & version1) !== 0n) return offered;
    throw new Vhost2Error(
      "PROTOCOL",
      `Cannot use PCI device ${this.pci.name}: it does not offer VERSION_1 (offered: ${
        describeFeatures(offered)
      })`,
    );
  }

  /** A driver is here, which may look at what the device offers. */
  acknowledge(): void {
    this.#common.write("deviceStatus", Status.ACKNOWLEDGE);
    this.#common.write("deviceStatus", Status.ACKNOWLEDGE | Status.DRIVER);
  }

  /** Acks features; then queues are set up. Throws where it refuses them. */
  agree(features: bigint): void {
    this.#common.ackedFeatures = features;
    const agreed = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK;
    this.#common.write("deviceStatus", agreed);
    const status = this.#common.read("deviceStatus");
    if (status === goneValue[1]) throw this.#gone();
    if ((status & Status.FEATURES_OK) !== 0) return;
    throw new Vhost2Error(
      "PROTOCOL",
      `Cannot use PCI device ${this.pci.name}: it does not take the features ${
        describeFeatures(features)
      }`,
    );
  }

  /** All queues are set up: the device works from here on (DRIVER_OK). */
  start(): void {
    const status = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK;
    this.#common.write("deviceStatus", status | Status.DRIVER_OK);
  }

  /** Queues that the device has. */
  get queueCount(): number {
    return this.#common.read("queueCount");
  }

  /** Descriptors at most. Throws PROTOCOL for a queue that is not there. */
  largestQueue(index: number): number {
    this.#common.write("queueSelect", index);
    const largest = this.#common.read("queueSize");
    if (
      index < this.queueCount && largest > 0 && largest <= maxQueueSize
    ) return largest;
    throw new Vhost2Error(
      "PROTOCOL",
      `Cannot use queue ${index} of PCI device ${this.pci.name}: it has none of that number`,
    );
  }

  /**
   * Sets a queue up and enables it. False: it has no vector, because the
   * device has refused the one given.
   *
   * @param vector where the device has any
   */
  enableQueue(
    index: number,
    size: number,
    addresses: QueueAddresses,
    vector: number | null,
  ): boolean {
    const common = this.#common;
    common.write("queueSelect", index);
    common.write("queueSize", size);
    const hasVector = this.#setVector("queueMsixVector", vector);
    common.writeAddress("queueDescriptor", addresses.descriptor);
    common.writeAddress("queueDriver", addresses.available);
    common.writeAddress("queueDevice", addresses.used);
    common.write("queueEnable", 1);
    return hasVector;
  }

  /** Which vector tells of changes; false when the device refuses it. */
  setConfigVector(vector: number | null): boolean {
    return this.#setVector("msixConfig", vector);
  }

  #setVector(register: CommonRegister, vector: number | null): boolean {
    if (vector === null) return true;
    this.#common.write(register, vector);
    return this.#common.read(register) !== NO_VECTOR;
  }

  /** Whether `resetQueue` is possible, where RING_RESET is negotiated. */
  get canResetQueues(): boolean {
    return this.#common.has("queueReset");
  }

  /**
   * Section 4.1.4.3.2, RING_RESET: when the promise resolves the device does
   * nothing with the queue any more. Rejects as `reset` does.
   */
  async resetQueue(index: number): Promise<void> {
    this.#common.write("queueSelect", index);
    this.#common.write("queueReset", 1);
    await this.#until(() => {
      this.#common.write("queueSelect", index);
      const isUnderWay = this.#common.read("queueReset");
      if (isUnderWay === goneValue[2] && hasGone(this.pci)) throw this.#gone();
      return isUnderWay === 0;
    }, `queue ${index}`);
  }

  /** The register that tells the device of a queue's buffers. */
  notification(index: number): BarPlace {
    this.#common.write("queueSelect", index);
    const { bar, offset, length, multiplier } = this.#notify;
    const at = this.#common.read("queueNotifyOffset") * multiplier;
    if (at + 2 <= length) return { bar, offset: offset + at };
    throw new Vhost2Error(
      "PROTOCOL",
      `Cannot use queue ${index} of PCI device ${this.pci.name}: its notification is at ${at} of ${length} bytes`,
    );
  }

  /** Bytes from one queue's notification to the next one's. */
  get notificationDistance(): number {
    return this.#notify.multiplier;
  }

  /** Changes with the device's own configuration space. */
  get configGeneration(): number {
    return this.#common.read("configGeneration");
  }

  /** Reading takes a pin's interrupt back. */
  readIsr(): void {
    if (this.#isr !== undefined) {
      this.pci.readBar(this.#isr.bar, this.#isr.offset, 1);
    }
  }

  /** Bytes of the device's own configuration space; 0 where it has none. */
  get configSize(): number {
    return this.#config?.length ?? 0;
  }

  /** A field of the device's own configuration space. */
  readConfig(offset: number, width: RegisterWidth): number {
    const { bar, offset: at } = this.#configPlace(offset, width);
    return this.pci.readBar(bar, at, width);
  }

  writeConfig(offset: number, width: RegisterWidth, value: number): void {
    const { bar, offset: at } = this.#configPlace(offset, width);
    this.pci.writeBar(bar, at, width, value);
  }

  /**
   * Bytes of the device's own configuration space as they were at one time
   * (section 2.5): read again while it changes.
   */
  readConfigBytes(offset: number, length: number): Uint8Array<ArrayBuffer> {
    const bytes = new Uint8Array(length);
    for (let count = 0; count < maxConfigReads; count++) {
      const before = this.#common.read("configGeneration");
      for (let i = 0; i < length; i++) {
        bytes[i] = this.readConfig(offset + i, 1);
      }
      if (this.#common.read("configGeneration") === before) return bytes;
    }
    throw new Vhost2Error(
      "PROTOCOL",
      `Cannot read the configuration of PCI device ${this.pci.name}: it never stays the same`,
    );
  }

  #configPlace(offset: number, width: number): BarPlace {
    const place = this.#config;
    if (place !== undefined && offset >= 0 && offset + width <= place.length) {
      return { bar: place.bar, offset: place.offset + offset };
    }
    throw new Vhost2Error(
      "PROTOCOL",
      `Cannot reach byte ${offset} of the configuration of PCI device ${this.pci.name}: it has ${this.configSize}`,
    );
  }

  #gone(): Vhost2Error {
    return goneError(this.pci);
  }
}

function goneError(pci: PciDevice): Vhost2Error {
  return new Vhost2Error(
    "CLOSED",
    `Cannot use PCI device ${pci.name}: it has gone (it answers all ones)`,
  );
}

/** The virtio type of a PCI device. */
function virtioType(pci: PciDevice): number {
  const id = pci.readConfig(ConfigRegister.deviceId, 2);
  return id >= firstModern
    ? id - firstModern
    : pci.readConfig(ConfigRegister.subsystemId, 2);
}

function requireVirtio(pci: PciDevice): void {
  if (hasGone(pci)) throw goneError(pci);
  const vendor = pci.readConfig(ConfigRegister.vendorId, 2);
  const id = pci.readConfig(ConfigRegister.deviceId, 2);
  if (vendor === VIRTIO_VENDOR && id >= firstTransitional && id <= lastModern) {
    return;
  }
  const hex = (value: number) => value.toString(16).padStart(4, "0");
  throw new Vhost2Error(
    "PROTOCOL",
    `Cannot use PCI device ${pci.name}: ${hex(vendor)}:${
      hex(id)
    } is no virtio device`,
  );
}
