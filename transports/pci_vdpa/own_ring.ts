/**
 * A ring in the device of which we are the driver: it, and what its requests
 * need, lie in memory of ours that the device reaches, out of the guest's way.
 *
 * @module
 */

import { PackedDriver } from "../../driver/packed_driver.ts";
import type { QueueDriver } from "../../driver/queue_driver.ts";
import { SplitDriver } from "../../driver/split_driver.ts";
import { DmaMemory } from "../../pci/dma_memory.ts";
import type { PciDevice } from "../../pci/pci_device.ts";
import { type QueueAddresses, ringSize } from "../../pci/virtio_registers.ts";
import { hasFeature, VirtioFeature } from "../../protocol/features.ts";
import type { DeviceRing } from "./device.ts";

/** Of the three parts of a ring, for each descriptor; and their ends. */
const ringBytes = 26;
const ringSlack = 4096;

export interface OwnRingOptions {
  readonly index: number;
  /** Descriptors at most. */
  readonly most: number;
  /** Negotiated: they say which format. */
  readonly features: bigint;
  /** Bytes for what requests need. */
  readonly roomFor: number;
  readonly notify: () => void;
}

export class OwnRing implements DeviceRing {
  readonly index: number;
  readonly size: number;
  readonly addresses: QueueAddresses;
  readonly driver: QueueDriver;
  readonly isPacked: boolean;
  readonly #memory: DmaMemory;

  constructor(pci: PciDevice, options: OwnRingOptions) {
    const { features, notify } = options;
    this.index = options.index;
    this.isPacked = hasFeature(features, VirtioFeature.RING_PACKED);
    this.size = ringSize(options.most, this.isPacked);
    const bytes = ringBytes * this.size + ringSlack + options.roomFor;
    this.#memory = new DmaMemory(pci.dma, bytes, true);
    try {
      const of = { queueSize: this.size, features, notify };
      const { ram } = this.#memory;
      this.driver = this.isPacked
        ? new PackedDriver(ram, of)
        : new SplitDriver(ram, of);
    } catch (error) {
      this.#memory.close();
      throw error;
    }
    this.addresses = this.driver.ring.addresses;
  }

  /** The device has let go of it. */
  close(): void {
    this.driver.close();
    this.#memory.close();
  }
}
