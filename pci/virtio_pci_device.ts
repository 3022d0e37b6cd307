/**
 * A driver for modern virtio PCI devices (VIRTIO 1.3 section 4.1), of any
 * type: initialisation, feature negotiation, queues, configuration space,
 * interrupts.
 *
 * The registers are `virtio_registers.ts`; here is what a driver of its own
 * rings adds.
 *
 * @module
 */

import { PackedDriver } from "../driver/packed_driver.ts";
import type { QueueDriver } from "../driver/queue_driver.ts";
import { SplitDriver } from "../driver/split_driver.ts";
import { eventLoop } from "../ffi/event_loop.ts";
import {
  featureMask,
  hasFeature,
  VirtioFeature,
} from "../protocol/features.ts";
import { DmaMemory } from "./dma_memory.ts";
import { PciInterrupts } from "./interrupts.ts";
import type { PciDevice, RegisterWidth } from "./pci_device.ts";
import type { VirtioCapabilities } from "./virtio_capabilities.ts";
import {
  type Condition,
  ringSize,
  VirtioRegisters,
} from "./virtio_registers.ts";

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
  readonly #registers: VirtioRegisters;
  readonly #queues = new Map<number, QueueDriver>();
  readonly #queueVectors: number;
  #isOpen = true;

  private constructor(
    registers: VirtioRegisters,
    options: VirtioPciOptions,
    found: { offered: bigint; features: bigint },
  ) {
    const { pci } = registers;
    this.#registers = registers;
    this.pci = pci;
    this.type = registers.type;
    this.capabilities = registers.capabilities;
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
    const look = () => this.#interrupted();
    this.interrupts.handle(0, look);
    const hasVector = registers.setConfigVector(this.#vector(0));
    // A device may refuse a vector: then it is looked at now and then.
    if (!hasVector) this.interrupts.poll(look);
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
    const registers = new VirtioRegisters(pci, options.isOpenEnded);
    await registers.reset();
    registers.acknowledge();
    const offered = registers.offeredFeatures;
    const features = chosen(offered, options);
    registers.agree(features);
    return new VirtioPciDevice(registers, options, { offered, features });
  }

  /** Whether it works, as it says itself. */
  get condition(): Condition {
    return this.#registers.condition;
  }

  /** Queues that the device has. */
  get queueCount(): number {
    return this.#registers.queueCount;
  }

  /**
   * Sets a queue up and enables it, before `start`.
   *
   * @param size descriptors at most; 128 unless given
   * @throws Vhost2Error PROTOCOL for a queue that is not there
   */
  addQueue(index: number, size = 128): QueueDriver {
    const largest = this.#registers.largestQueue(index);
    const isPacked = hasFeature(this.features, VirtioFeature.RING_PACKED);
    const queueSize = ringSize(Math.min(size, largest), isPacked);
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
    const poll = () => void driver.poll();
    this.interrupts.handle(vector, poll);
    const hasVector = this.#registers.enableQueue(
      index,
      queueSize,
      driver.ring.addresses,
      this.#vector(vector),
    );
    if (!hasVector) this.interrupts.poll(poll);
    this.#queues.set(index, driver);
    return driver;
  }

  /** For a register: the vector, where the device has any. */
  #vector(vector: number): number | null {
    return this.interrupts.vectorCount === 0 ? null : vector;
  }

  #notifier(index: number): () => void {
    const { bar, offset } = this.#registers.notification(index);
    return () => this.pci.writeBar(bar, offset, 2, index);
  }

  #interrupted(): void {
    if (this.interrupts.vectorCount === 0) this.#registers.readIsr();
    this.onConfigChange?.();
  }

  /** All queues are set up: the device works from here on (DRIVER_OK). */
  start(): void {
    this.#registers.start();
  }

  /** Bytes of the device's own configuration space; 0 where it has none. */
  get configSize(): number {
    return this.#registers.configSize;
  }

  /** A field of the device's own configuration space. */
  readConfig(offset: number, width: RegisterWidth): number {
    return this.#registers.readConfig(offset, width);
  }

  writeConfig(offset: number, width: RegisterWidth, value: number): void {
    this.#registers.writeConfig(offset, width, value);
  }

  /**
   * Bytes of the device's own configuration space as they were at one time
   * (section 2.5): read again while it changes.
   */
  readConfigBytes(offset: number, length: number): Uint8Array<ArrayBuffer> {
    return this.#registers.readConfigBytes(offset, length);
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
      await this.#registers.reset();
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

function chosen(
  offered: bigint,
  { features = ringFeatures, packed = false }: VirtioPciOptions,
): bigint {
  const packedMask = featureMask(VirtioFeature.RING_PACKED);
  return offered &
    (always | (features & ~packedMask) | (packed ? packedMask : 0n));
}
