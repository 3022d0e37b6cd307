/**
 * The driver's side of a packed virtqueue, with the event suppression of both
 * sides, and every field within reach for tests that break the rules.
 *
 * @module
 */

import { Vhost2Error } from "../ffi/errors.ts";
import type { GuestRam } from "./guest_ram.ts";
import {
  availableFlags,
  EventFlag,
  firstPosition,
  type PackedDescriptor,
  PackedLayout,
  packedSizes,
  positionAfter,
  slotOf,
  stepsBetween,
  writePackedDescriptor,
} from "./packed_layout.ts";
import {
  type GuestBuffer,
  type IndirectTable,
  placeRing,
  QueueDriver,
  type QueueDriverOptions,
} from "./queue_driver.ts";
import { DescriptorFlag } from "./split_layout.ts";

/** What a driver is made of; `queueSize` is any up to 32768. */
export type PackedDriverOptions = QueueDriverOptions;

/** The driver of one queue. It owns its two eventfds. */
export class PackedDriver extends QueueDriver<PackedLayout> {
  readonly firstBase: number = firstPosition | firstPosition * 0x1_0000;
  readonly #freeIds: number[] = [];
  /** By buffer id in flight, the oldest first: descriptors of its chain. */
  readonly #lengths = new Map<number, number>();
  #free = 0;
  #available = firstPosition;
  #used = firstPosition;
  /** Descriptors made available since the device was last offered a kick. */
  #unnotified = 0;
  /** The first descriptor of what was written last, and its flags. */
  #first = { slot: 0, flags: 0 };

  constructor(ram: GuestRam, options: PackedDriverOptions) {
    const { queueSize } = options;
    if (!(queueSize >= 1 && queueSize <= 32768)) {
      throw new Vhost2Error("OPTION", `Cannot use queueSize: ${queueSize}`);
    }
    const sizes = packedSizes(queueSize);
    const addresses = placeRing(ram, options.addresses, sizes, {
      descriptor: 16,
      available: 4,
      used: 4,
    });
    const ring = new PackedLayout(ram, queueSize, addresses);
    super(ram, ring, options, sizes);
    ring.clear();
    this.forget();
  }

  override get freeDescriptors(): number {
    return this.#free;
  }

  /** Where the next chain goes: 15 bits and the wrap counter. */
  get availablePosition(): number {
    return this.#available;
  }

  /** Where the device's next used descriptor is looked for. */
  get usedPosition(): number {
    return this.#used;
  }

  /** Takes a buffer id out of use by requests, for chains made by hand. */
  takeId(): number {
    const id = this.#freeIds.pop();
    if (id !== undefined) return id;
    throw new Vhost2Error("OPTION", "Cannot take a buffer id: none is free");
  }

  /**
   * Makes a chain available as it is: the flags get AVAILABLE and USED for
   * their place, the first ones last. What comes back for it is a stray.
   */
  publish(chain: readonly PackedDescriptor[]): void {
    const { id } = chain[chain.length - 1];
    this.#put(chain);
    this.#lengths.set(id, chain.length);
    this.offer();
  }

  override notify(): boolean {
    const steps = this.#unnotified;
    this.#unnotified = 0;
    const { flags, position } = this.ring.deviceEvent;
    let isWanted = flags !== EventFlag.DISABLE;
    if (this.usesEventIndex && flags === EventFlag.DESCRIPTOR) {
      const { queueSize } = this;
      const last = this.#available;
      // How far behind the end of what is new the event is; 0 is just ahead.
      const behind = stepsBetween(position, last, queueSize);
      isWanted = steps >= 2 * queueSize || (behind > 0 && behind <= steps);
    }
    if (isWanted) this.kick();
    return isWanted;
  }

  protected override write(
    buffers: readonly GuestBuffer[],
    table: IndirectTable | null,
  ): number {
    const id = this.takeId();
    const chain = table === null
      ? buffers.map(({ address, length, isWritable }, i) => ({
        address,
        length,
        id,
        flags: (isWritable ? DescriptorFlag.WRITE : 0) |
          (i + 1 < buffers.length ? DescriptorFlag.NEXT : 0),
      }))
      : [{
        address: table.address,
        length: table.size,
        id,
        flags: DescriptorFlag.INDIRECT,
      }];
    this.#put(chain);
    this.#lengths.set(id, chain.length);
    return id;
  }

  /** Writes a chain of which only the first descriptor's flags are missing. */
  #put(chain: readonly PackedDescriptor[]): void {
    if (chain.length > this.#free) {
      throw new Vhost2Error(
        "OPTION",
        `Cannot take ${chain.length} descriptors: ${this.#free} are free`,
      );
    }
    let position = this.#available;
    chain.forEach((descriptor, i) => {
      const slot = slotOf(position);
      const flags = descriptor.flags | availableFlags(position);
      if (i === 0) this.#first = { slot, flags };
      // Until then it is what it was: used, or never available.
      this.ring.setDescriptor(slot, {
        ...descriptor,
        flags: i === 0 ? this.ring.flags(slot) : flags,
      });
      position = positionAfter(position, 1, this.queueSize);
    });
    this.#available = position;
    this.#free -= chain.length;
    this.#unnotified += chain.length;
  }

  protected override offer(): void {
    this.ring.setFlags(this.#first.slot, this.#first.flags);
  }

  /** Their order is that of the table: neither NEXT nor ids. */
  protected override writeTable(
    view: DataView,
    buffers: readonly GuestBuffer[],
  ): void {
    buffers.forEach(({ address, length, isWritable }, i) => {
      const flags = isWritable ? DescriptorFlag.WRITE : 0;
      writePackedDescriptor(view, 16 * i, { address, length, id: 0, flags });
    });
  }

  protected override take(): number {
    let count = 0;
    for (;;) {
      const before = count;
      while (this.ring.isUsed(this.#used)) {
        const element = this.ring.descriptor(slotOf(this.#used));
        const run = this.usedUpTo(element, this.#lengths.keys());
        if (run === null) return count;
        for (const { id, length } of run) {
          const skipped = this.#lengths.get(id);
          if (skipped === undefined) {
            this.fail(`buffer id ${id} is not in flight`);
            return count;
          }
          this.#lengths.delete(id);
          this.#free += skipped;
          this.#used = positionAfter(this.#used, skipped, this.queueSize);
          count++;
          if (!this.use({ id, length })) return count;
        }
      }
      if (count === before) return count;
      // The store is a barrier: what came before it is seen by the next turn
      // of the loop, what comes after it brings a call.
      if (this.usesEventIndex && this.usesCalls) this.#wantCalls();
    }
  }

  protected override release(id: number): void {
    this.#freeIds.push(id);
  }

  protected override forget(): void {
    this.#freeIds.length = 0;
    for (let id = this.queueSize - 1; id >= 0; id--) this.#freeIds.push(id);
    this.#lengths.clear();
    this.#free = this.queueSize;
    this.#available = firstPosition;
    this.#used = firstPosition;
    this.#unnotified = 0;
    this.#wantCalls();
  }

  #wantCalls(): void {
    const flags = !this.usesCalls
      ? EventFlag.DISABLE
      : this.usesEventIndex
      ? EventFlag.DESCRIPTOR
      : EventFlag.ENABLE;
    this.ring.setDriverEvent({ position: this.#used, flags });
  }
}
