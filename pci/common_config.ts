/**
 * The common configuration of a virtio PCI device, register by register
 * (VIRTIO 1.3 section 4.1.4.3).
 *
 * @module
 */

import type { PciDevice, RegisterWidth } from "./pci_device.ts";
import type { VirtioCapability } from "./virtio_capabilities.ts";

/** Bytes from the start of the structure, and bytes of the register. */
const registers = {
  deviceFeatureSelect: [0, 4],
  deviceFeature: [4, 4],
  driverFeatureSelect: [8, 4],
  driverFeature: [12, 4],
  msixConfig: [16, 2],
  queueCount: [18, 2],
  deviceStatus: [20, 1],
  configGeneration: [21, 1],
  queueSelect: [22, 2],
  queueSize: [24, 2],
  queueMsixVector: [26, 2],
  queueEnable: [28, 2],
  queueNotifyOffset: [30, 2],
  queueDescriptor: [32, 4],
  queueDriver: [40, 4],
  queueDevice: [48, 4],
  queueReset: [58, 2],
} as const satisfies Record<string, readonly [number, RegisterWidth]>;

export type CommonRegister = keyof typeof registers;

export class CommonConfig {
  readonly #device: PciDevice;
  readonly #place: VirtioCapability;

  constructor(device: PciDevice, place: VirtioCapability) {
    this.#device = device;
    this.#place = place;
  }

  read(register: CommonRegister): number {
    const [offset, width] = registers[register];
    const { bar, offset: start } = this.#place;
    return this.#device.readBar(bar, start + offset, width);
  }

  write(register: CommonRegister, value: number): void {
    const [offset, width] = registers[register];
    const { bar, offset: start } = this.#place;
    this.#device.writeBar(bar, start + offset, width, value);
  }

  /** A 64-bit register is written by halves. */
  writeAddress(
    register: "queueDescriptor" | "queueDriver" | "queueDevice",
    address: bigint,
  ): void {
    const [offset] = registers[register];
    const { bar, offset: start } = this.#place;
    const low = Number(address & 0xffff_ffffn);
    this.#device.writeBar(bar, start + offset, 4, low);
    this.#device.writeBar(bar, start + offset + 4, 4, Number(address >> 32n));
  }

  /** Whether the structure is long enough for the register: not all are. */
  has(register: CommonRegister): boolean {
    const [offset, width] = registers[register];
    return offset + width <= this.#place.length;
  }

  /** All 64 feature bits that the device offers. */
  get offeredFeatures(): bigint {
    let features = 0n;
    for (let half = 0; half < 2; half++) {
      this.write("deviceFeatureSelect", half);
      features |= BigInt(this.read("deviceFeature")) << BigInt(32 * half);
    }
    return features;
  }

  set ackedFeatures(features: bigint) {
    for (let half = 0; half < 2; half++) {
      this.write("driverFeatureSelect", half);
      const bits = (features >> BigInt(32 * half)) & 0xffff_ffffn;
      this.write("driverFeature", Number(bits));
    }
  }
}
