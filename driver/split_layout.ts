/**
 * Where the three parts of a split virtqueue lie in guest memory, and plain
 * access to each of their fields (VIRTIO 1.3 section 2.7).
 *
 * The indices and flags are read and written by atomics: the device is another
 * process or native code, the fields must not be cached or merged, and a store
 * of the available index must be visible before the suppression field that the
 * device wrote is read (a store-load barrier, which `Atomics.store` is).
 *
 * @module
 */

import type { GuestRam } from "./guest_ram.ts";
import type { DriverAddresses, UsedElement } from "./queue_driver.ts";

/** Flags of a descriptor. */
export const DescriptorFlag = { NEXT: 1, WRITE: 2, INDIRECT: 4 } as const;
/** Used ring flag: the device wants no kicks. */
export const USED_FLAG_NO_NOTIFY = 1;
/** Available ring flag: the driver wants no calls. */
export const AVAILABLE_FLAG_NO_INTERRUPT = 1;

/** Bytes of a descriptor, in the table or an indirect one. */
export const DESCRIPTOR_SIZE = 16;

/** One descriptor, every field as the driver writes it. */
export interface Descriptor {
  /** Guest address. */
  readonly address: bigint;
  /** Bytes. */
  readonly length: number;
  readonly flags: number;
  /** Index of the next descriptor, with NEXT. */
  readonly next: number;
}

/** Guest addresses of the three parts. */
export type SplitAddresses = DriverAddresses;

/** Bytes of each part, for a queue of `queueSize` descriptors. */
export function splitSizes(queueSize: number) {
  return {
    descriptor: DESCRIPTOR_SIZE * queueSize,
    available: 4 + 2 * queueSize + 2,
    used: 4 + 8 * queueSize + 2,
  };
}

/** Writes a descriptor at a byte offset. */
export function writeDescriptor(
  view: DataView,
  offset: number,
  descriptor: Descriptor,
): void {
  view.setBigUint64(offset, BigInt.asUintN(64, descriptor.address), true);
  view.setUint32(offset + 8, descriptor.length, true);
  view.setUint16(offset + 12, descriptor.flags, true);
  view.setUint16(offset + 14, descriptor.next, true);
}

/** The fields of one split virtqueue in guest memory. */
export class SplitLayout {
  readonly queueSize: number;
  readonly addresses: SplitAddresses;
  readonly #descriptors: DataView;
  readonly #available: Uint16Array;
  readonly #used: Uint16Array;
  readonly #elements: Uint32Array;

  /**
   * @param ram holds each part whole in one region
   * @param queueSize descriptors
   * @param addresses aligned to 16, 2 and 4 bytes
   */
  constructor(ram: GuestRam, queueSize: number, addresses: SplitAddresses) {
    this.queueSize = queueSize;
    this.addresses = addresses;
    const sizes = splitSizes(queueSize);
    const part = (name: keyof SplitAddresses, alignment: bigint) =>
      ram.ringPart(name, addresses[name], sizes[name], alignment);
    const table = part("descriptor", 16n);
    const available = part("available", 2n);
    const used = part("used", 4n);
    this.#descriptors = new DataView(
      table.buffer,
      table.byteOffset,
      table.length,
    );
    this.#available = new Uint16Array(
      available.buffer,
      available.byteOffset,
      available.length / 2,
    );
    this.#used = new Uint16Array(used.buffer, used.byteOffset, used.length / 2);
    this.#elements = new Uint32Array(
      used.buffer,
      used.byteOffset + 4,
      2 * queueSize,
    );
  }

  setDescriptor(index: number, descriptor: Descriptor): void {
    writeDescriptor(this.#descriptors, DESCRIPTOR_SIZE * index, descriptor);
  }

  setAvailableFlags(flags: number): void {
    Atomics.store(this.#available, 0, flags);
  }

  get availableIndex(): number {
    return Atomics.load(this.#available, 1);
  }

  setAvailableIndex(index: number): void {
    Atomics.store(this.#available, 1, index);
  }

  /** `position` counts freely; the slot is its remainder. */
  setAvailableEntry(position: number, head: number): void {
    Atomics.store(this.#available, 2 + position % this.queueSize, head);
  }

  /** EVENT_IDX: the driver's word on when to be called. */
  setUsedEvent(index: number): void {
    Atomics.store(this.#available, 2 + this.queueSize, index);
  }

  get usedFlags(): number {
    return Atomics.load(this.#used, 0);
  }

  get usedIndex(): number {
    return Atomics.load(this.#used, 1);
  }

  /** `position` counts freely; the slot is its remainder. */
  usedElement(position: number): UsedElement {
    const slot = 2 * (position % this.queueSize);
    return {
      id: Atomics.load(this.#elements, slot),
      length: Atomics.load(this.#elements, slot + 1),
    };
  }

  /** EVENT_IDX: the device's word on when to be kicked. */
  get availableEvent(): number {
    return Atomics.load(this.#used, 2 + 4 * this.queueSize);
  }

  /** As after a reset: all indices, flags and event fields are 0. */
  clear(): void {
    this.#available.fill(0);
    this.#used.fill(0);
  }
}
