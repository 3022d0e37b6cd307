/**
 * Where the three parts of a packed virtqueue lie in guest memory, and plain
 * access to each of their fields (VIRTIO 1.3 section 2.8).
 *
 * Flags and event suppression are read and written by atomics, for the reasons
 * given in split_layout.ts.
 *
 * @module
 */

import type { GuestRam } from "./guest_ram.ts";
import type { DriverAddresses } from "./queue_driver.ts";

/** Flags of a packed ring's descriptor, besides those of a split ring's. */
export const PackedFlag = { AVAILABLE: 1 << 7, USED: 1 << 15 } as const;
const bothFlags = PackedFlag.AVAILABLE | PackedFlag.USED;

/** Flags of event suppression (2.8.10). */
export const EventFlag = { ENABLE: 0, DISABLE: 1, DESCRIPTOR: 2 } as const;

const descriptorSize = 16;

/** One descriptor, every field as the driver or the device writes it. */
export interface PackedDescriptor {
  /** Guest address. */
  readonly address: bigint;
  /** Bytes. */
  readonly length: number;
  /** Buffer id. */
  readonly id: number;
  readonly flags: number;
}

/** Event suppression: when one side wants to be told by the other. */
export interface EventSuppression {
  /** 15 bits of position and the wrap counter, for DESCRIPTOR. */
  readonly position: number;
  readonly flags: number;
}

/**
 * A place in the ring with its wrap counter, as event suppression and the
 * vring base carry it: 15 bits and one.
 */
export const firstPosition = 0x8000;

/** The position `count` descriptors further, at most `queueSize`. */
export function positionAfter(
  position: number,
  count: number,
  queueSize: number,
): number {
  const slot = slotOf(position) + count;
  return slot < queueSize
    ? position + count
    : (slot - queueSize) | (~position & 0x8000);
}

/** The descriptor's index. */
export function slotOf(position: number): number {
  return position & 0x7fff;
}

/** AVAILABLE and USED as the driver sets them there. */
export function availableFlags(position: number): number {
  return (position & 0x8000) !== 0 ? PackedFlag.AVAILABLE : PackedFlag.USED;
}

/** AVAILABLE and USED as the device sets them there. */
export function usedFlags(position: number): number {
  return (position & 0x8000) !== 0 ? bothFlags : 0;
}

/** Descriptors from one position to another, up to two laps ahead. */
export function stepsBetween(
  from: number,
  to: number,
  queueSize: number,
): number {
  const place = (position: number) =>
    slotOf(position) + ((position & 0x8000) !== 0 ? 0 : queueSize);
  return (place(to) - place(from) + 2 * queueSize) % (2 * queueSize);
}

/** Bytes of each part, for a queue of `queueSize` descriptors. */
export function packedSizes(queueSize: number) {
  return { descriptor: descriptorSize * queueSize, available: 4, used: 4 };
}

/** Writes a descriptor, its flags included, at a byte offset. */
export function writePackedDescriptor(
  view: DataView,
  offset: number,
  descriptor: PackedDescriptor,
): void {
  view.setBigUint64(offset, BigInt.asUintN(64, descriptor.address), true);
  view.setUint32(offset + 8, descriptor.length, true);
  view.setUint16(offset + 12, descriptor.id, true);
  view.setUint16(offset + 14, descriptor.flags, true);
}

/** The fields of one packed virtqueue in guest memory. */
export class PackedLayout {
  readonly queueSize: number;
  /** `available` is driver event suppression, `used` the device's. */
  readonly addresses: DriverAddresses;
  readonly #descriptors: DataView;
  readonly #halves: Uint16Array;
  readonly #driverEvent: Uint32Array;
  readonly #deviceEvent: Uint32Array;

  /**
   * @param ram holds each part whole in one region
   * @param queueSize descriptors
   * @param addresses aligned to 16, 4 and 4 bytes
   */
  constructor(ram: GuestRam, queueSize: number, addresses: DriverAddresses) {
    this.queueSize = queueSize;
    this.addresses = addresses;
    const sizes = packedSizes(queueSize);
    const part = (name: keyof DriverAddresses, alignment: bigint) =>
      ram.ringPart(name, addresses[name], sizes[name], alignment);
    const ring = part("descriptor", 16n);
    const driver = part("available", 4n);
    const device = part("used", 4n);
    this.#descriptors = new DataView(ring.buffer, ring.byteOffset, ring.length);
    this.#halves = new Uint16Array(
      ring.buffer,
      ring.byteOffset,
      ring.length / 2,
    );
    this.#driverEvent = new Uint32Array(driver.buffer, driver.byteOffset, 1);
    this.#deviceEvent = new Uint32Array(device.buffer, device.byteOffset, 1);
  }

  /** All fields but the flags, and then those. */
  setDescriptor(slot: number, descriptor: PackedDescriptor): void {
    const offset = descriptorSize * slot;
    const view = this.#descriptors;
    view.setBigUint64(offset, BigInt.asUintN(64, descriptor.address), true);
    view.setUint32(offset + 8, descriptor.length, true);
    view.setUint16(offset + 12, descriptor.id, true);
    this.setFlags(slot, descriptor.flags);
  }

  setFlags(slot: number, flags: number): void {
    Atomics.store(this.#halves, 8 * slot + 7, flags);
  }

  flags(slot: number): number {
    return Atomics.load(this.#halves, 8 * slot + 7);
  }

  descriptor(slot: number): PackedDescriptor {
    const flags = this.flags(slot);
    const offset = descriptorSize * slot;
    return {
      address: this.#descriptors.getBigUint64(offset, true),
      length: this.#descriptors.getUint32(offset + 8, true),
      id: this.#descriptors.getUint16(offset + 12, true),
      flags,
    };
  }

  /** Whether the device has written a used descriptor there. */
  isUsed(position: number): boolean {
    return (this.flags(slotOf(position)) & bothFlags) === usedFlags(position);
  }

  /** The driver's word on when to be called. */
  setDriverEvent({ position, flags }: EventSuppression): void {
    Atomics.store(this.#driverEvent, 0, ((flags << 16) | position) >>> 0);
  }

  /** The device's word on when to be kicked. */
  get deviceEvent(): EventSuppression {
    const word = Atomics.load(this.#deviceEvent, 0);
    return { position: word & 0xffff, flags: (word >>> 16) & 3 };
  }

  /** As after a reset: nothing is available, both sides want to be told. */
  clear(): void {
    this.#halves.fill(0);
    this.#driverEvent.fill(0);
    this.#deviceEvent.fill(0);
  }
}
