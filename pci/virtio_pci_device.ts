/**
 * A driver for modern virtio PCI devices (VIRTIO 1.3 section 4.1), of any
 * type: initialisation, feature negotiation, queues, configuration space,
 * interrupts.
 *
 * The device is not trusted: what it says is checked, and it may go away at
 * any moment, after which it answers all ones.
 *
 * @module
 */

import { PackedDriver } from "../driver/packed_driver.ts";
import type { QueueDriver } from "../driver/queue_driver.ts";
import { SplitDriver } from "../driver/split_driver.ts";
import { Vhost2Error } from "../ffi/errors.ts";
import { eventLoop } from "../ffi/event_loop.ts";
import {
  describeFeatures,
  featureMask,
  hasFeature,
  VirtioFeature,
} from "../protocol/features.ts";
import { CommonConfig } from "./common_config.ts";
import { DmaMemory } from "./dma_memory.ts";
import { NO_VECTOR, PciInterrupts } from "./interrupts.ts";
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

/** Without them no driver of today works. */
const required = featureMask(VirtioFeature.VERSION_1);
/** Acked wherever they are offered: this driver does what they ask. */
const always = featureMask(
  VirtioFeature.VERSION_1,
  VirtioFeature.ACCESS_PLATFORM,
  VirtioFeature.ORDER_PLATFORM,
);
/** Features of rings that the queues' drivers know. */
const ringFeatures = featureMask(
  VirtioFeature.RING_INDIRECT_DESC,
  VirtioFeature.RING_EVENT_IDX,
  VirtioFeature.IN_ORDER,
);

/** How a device is opened. */
export interface VirtioPciOptions {
  /**
   * Features wanted, those of the device's type included; of them those that
   * are offered are acked. Those of the rings unless given.
   */
  readonly features?: bigint;
  /** Packed rings where they are offered; split ones unless given. */
  readonly packed?: boolean;
  /** Queues that will be added, for sharing out the vectors; 1 unless given. */
  readonly queueCount?: number;
  /** Vectors wanted beyond those for the queues and configuration changes. */
  readonly extraVectors?: number;
  /** Bytes of memory for rings and buffers; 1 MiB unless given. */
  readonly memorySize?: number;
  /** Capabilities whose length is to be ignored. */
  readonly isOpenEnded?: (type: number) => boolean;
}

/** Whether the device works. */
export type Condition =
  | "ok"
  /** It says that it is broken until it is reset. */
  | "needsReset"
  | "gone";

interface Place {
  readonly notify: VirtioCapability;
  readonly device: VirtioCapability | undefined;
  readonly isr: VirtioCapability | undefined;
}

/**
 * A virtio device behind PCI, from the negotiation of features to its reset.
 *
 * @example A random number, from QEMU's `virtio-rng-pci`
 * ```ts ignore
 * import { openVfioDevice, VirtioPciDevice } from "vhost2/pci";
 * const pci = openVfioDevice("0000:00:05.0");
 * const device = await VirtioPciDevice.open(pci);
 * const queue = device.addQueue(0);
 * device.start();
 * const { data } = await queue.submit({ writable: [16] });
 * console.log(data[0]);
 * await device.close();
 * pci.close();
 * ```
 */
export class VirtioPciDevice {
  readonly pci: PciDevice;
  /** The virtio device type: 2 is a disk. */
  readonly type: number;
  /** Negotiated. */
  readonly features: bigint;
  readonly offeredFeatures: bigint;
  readonly capabilities: VirtioCapabilities;
  readonly memory: DmaMemory;
  readonly interrupts: PciInterrupts;
  /** The first vector that no queue has, or the last one, to be shared. */
  readonly firstExtraVector: number;
  /** Configuration space has changed, or the device's condition has. */
  onConfigChange: (() => void) | undefined;
  readonly #common: CommonConfig;
  readonly #place: Place;
  readonly #queues = new Map<number, QueueDriver>();
  readonly #queueVectors: number;
  #isOpen = true;

  private constructor(
    pci: PciDevice,
    options: VirtioPciOptions,
    found: {
      capabilities: VirtioCapabilities;
      place: Place;
      common: CommonConfig;
      offered: bigint;
      features: bigint;
    },
  ) {
    this.pci = pci;
    this.type = virtioType(pci);
    this.capabilities = found.capabilities;
    this.#common = found.common;
    this.#place = found.place;
    this.features = found.features;
    this.offeredFeatures = found.offered;
    const queueCount = options.queueCount ?? 1;
    this.#queueVectors = queueCount;
    const wanted = 1 + queueCount + (options.extraVectors ?? 0);
    this.memory = new DmaMemory(pci.dma, options.memorySize ?? 1 << 20);
    try {
      this.interrupts = new PciInterrupts(pci, wanted);
    } catch (error) {
      this.memory.close();
      throw error;
    }
    const { vectorCount } = this.interrupts;
    this.firstExtraVector = Math.max(
      0,
      Math.min(1 + queueCount, vectorCount - 1),
    );
    // Who awaits a request must not see the process end before.
    eventLoop.ref();
    this.interrupts.handle(0, () => this.#interrupted());
    this.#setVector("msixConfig", 0, () => this.#interrupted());
  }

  /**
   * Resets the device and negotiates features. Throws PROTOCOL for what is no
   * modern virtio device or does not keep to the rules, TIMEOUT when it does
   * not come out of its reset, CLOSED when it has gone.
   */
  static async open(
    pci: PciDevice,
    options: VirtioPciOptions = {},
  ): Promise<VirtioPciDevice> {
    requireVirtio(pci);
    const capabilities = virtioCapabilities(pci, options.isOpenEnded);
    const common = new CommonConfig(
      pci,
      requireCapability(pci, capabilities, CapabilityType.common),
    );
    const first = (type: number) =>
      capabilities.usable.find((capability) => capability.type === type);
    const place: Place = {
      notify: requireCapability(pci, capabilities, CapabilityType.notify),
      device: first(CapabilityType.device),
      isr: first(CapabilityType.isr),
    };
    await reset(pci, common);
    common.write("deviceStatus", Status.ACKNOWLEDGE);
    common.write("deviceStatus", Status.ACKNOWLEDGE | Status.DRIVER);
    const offered = common.offeredFeatures;
    const features = negotiate(pci, offered, options);
    common.ackedFeatures = features;
    const agreed = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK;
    common.write("deviceStatus", agreed);
    const status = common.read("deviceStatus");
    if (status === goneValue[1]) throw goneError(pci);
    if ((status & Status.FEATURES_OK) === 0) {
      throw new Vhost2Error(
        "PROTOCOL",
        `Cannot use PCI device ${pci.name}: it does not take the features ${
          describeFeatures(features)
        }`,
      );
    }
    const found = { capabilities, place, common, offered, features };
    return new VirtioPciDevice(pci, options, found);
  }

  /** Whether it works, as it says itself. */
  get condition(): Condition {
    const status = this.#common.read("deviceStatus");
    if (status === goneValue[1] && hasGone(this.pci)) return "gone";
    return (status & Status.NEEDS_RESET) === 0 ? "ok" : "needsReset";
  }

  /** Queues that the device has. */
  get queueCount(): number {
    return this.#common.read("queueCount");
  }

  /**
   * Sets a queue up and enables it, before `start`.
   *
   * @param size descriptors at most; 128 unless given
   * @throws Vhost2Error PROTOCOL for a queue that is not there
   */
  addQueue(index: number, size = 128): QueueDriver {
    const common = this.#common;
    common.write("queueSelect", index);
    const largest = common.read("queueSize");
    if (index >= this.queueCount || largest === 0 || largest > 32768) {
      throw new Vhost2Error(
        "PROTOCOL",
        `Cannot use queue ${index} of PCI device ${this.pci.name}: it has none of that number`,
      );
    }
    const isPacked = hasFeature(this.features, VirtioFeature.RING_PACKED);
    const queueSize = fitting(Math.min(size, largest), isPacked);
    const options = {
      queueSize,
      features: this.features,
      notify: this.#notifier(index),
    };
    const driver = isPacked
      ? new PackedDriver(this.memory.ram, options)
      : new SplitDriver(this.memory.ram, options);
    const vector = this.interrupts.vectorCount > this.#queueVectors
      ? 1 + index
      : 0;
    common.write("queueSize", queueSize);
    const poll = () => void driver.poll();
    this.interrupts.handle(vector, poll);
    this.#setVector("queueMsixVector", vector, poll);
    const { descriptor, available, used } = driver.ring.addresses;
    common.writeAddress("queueDescriptor", descriptor);
    common.writeAddress("queueDriver", available);
    common.writeAddress("queueDevice", used);
    common.write("queueEnable", 1);
    this.#queues.set(index, driver);
    return driver;
  }

  /** A device may refuse a vector: then it is looked at now and then. */
  #setVector(
    register: "msixConfig" | "queueMsixVector",
    vector: number,
    look: () => void,
  ): void {
    if (this.interrupts.vectorCount === 0) return;
    this.#common.write(register, vector);
    if (this.#common.read(register) === NO_VECTOR) this.interrupts.poll(look);
  }

  #notifier(index: number): () => void {
    const { notify } = this.#place;
    const offset = this.#common.read("queueNotifyOffset") * notify.multiplier;
    if (offset + 2 > notify.length) {
      throw new Vhost2Error(
        "PROTOCOL",
        `Cannot use queue ${index} of PCI device ${this.pci.name}: its notification is at ${offset} of ${notify.length} bytes`,
      );
    }
    const at = notify.offset + offset;
    return () => this.pci.writeBar(notify.bar, at, 2, index);
  }

  #interrupted(): void {
    // Reading takes a pin's interrupt back.
    const { isr } = this.#place;
    if (this.interrupts.vectorCount === 0 && isr !== undefined) {
      this.pci.readBar(isr.bar, isr.offset, 1);
    }
    this.onConfigChange?.();
  }

  /** All queues are set up: the device works from here on (DRIVER_OK). */
  start(): void {
    const status = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK;
    this.#common.write("deviceStatus", status | Status.DRIVER_OK);
  }

  /** Bytes of the device's own configuration space; 0 where it has none. */
  get configSize(): number {
    return this.#place.device?.length ?? 0;
  }

  /** A field of the device's own configuration space. */
  readConfig(offset: number, width: RegisterWidth): number {
    const { bar, at } = this.#configPlace(offset, width);
    return this.pci.readBar(bar, at, width);
  }

  writeConfig(offset: number, width: RegisterWidth, value: number): void {
    const { bar, at } = this.#configPlace(offset, width);
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

  #configPlace(offset: number, width: number): { bar: number; at: number } {
    const { device } = this.#place;
    if (
      device !== undefined && offset >= 0 && offset + width <= device.length
    ) {
      return { bar: device.bar, at: device.offset + offset };
    }
    throw new Vhost2Error(
      "PROTOCOL",
      `Cannot reach byte ${offset} of the configuration of PCI device ${this.pci.name}: it has ${this.configSize}`,
    );
  }

  /**
   * Resets the device and frees its queues; requests in flight reject. The PCI
   * device stays open. One that does not come out of its reset is cut off by
   * the IOMMU all the same: its memory is unmapped.
   */
  async close(): Promise<void> {
    if (!this.#isOpen) return;
    this.#isOpen = false;
    this.onConfigChange = undefined;
    this.interrupts.close();
    try {
      await reset(this.pci, this.#common);
    } catch {
      // Gone, or stuck: without its memory it can do nothing.
    }
    for (const driver of this.#queues.values()) driver.close();
    this.#queues.clear();
    this.memory.close();
    eventLoop.unref();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

/** A split ring's size is a power of two. */
function fitting(size: number, isPacked: boolean): number {
  return isPacked ? size : 2 ** Math.floor(Math.log2(size));
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

/** Section 2.4: it has been reset when its status reads 0. */
async function reset(pci: PciDevice, common: CommonConfig): Promise<void> {
  common.write("deviceStatus", 0);
  const end = performance.now() + resetLimitMs;
  for (;;) {
    const status = common.read("deviceStatus");
    if (status === 0) return;
    if (status === goneValue[1] && hasGone(pci)) throw goneError(pci);
    if (performance.now() > end) break;
    await new Promise((resolve) => setTimeout(resolve, 1));
  }
  throw new Vhost2Error(
    "TIMEOUT",
    `Cannot reset PCI device ${pci.name}: it has not come out of it in ${resetLimitMs} ms`,
  );
}

function negotiate(
  pci: PciDevice,
  offered: bigint,
  { features = ringFeatures, packed = false }: VirtioPciOptions,
): bigint {
  if ((offered & required) !== required) {
    throw new Vhost2Error(
      "PROTOCOL",
      `Cannot use PCI device ${pci.name}: it does not offer VERSION_1 (offered: ${
        describeFeatures(offered)
      })`,
    );
  }
  const packedMask = featureMask(VirtioFeature.RING_PACKED);
  return offered &
    (always | (features & ~packedMask) | (packed ? packedMask : 0n));
}
