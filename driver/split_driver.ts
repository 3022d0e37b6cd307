/**
 * The driver's side of a split virtqueue, with the notification suppression of
 * both sides, and every field within reach for tests that break the rules.
 *
 * @module
 */

import { Vhost2Error } from "../ffi/errors.ts";
import type { GuestRam } from "./guest_ram.ts";
import {
  type GuestBuffer,
  type IndirectTable,
  placeRing,
  QueueDriver,
  type QueueDriverOptions,
} from "./queue_driver.ts";
import {
  AVAILABLE_FLAG_NO_INTERRUPT,
  type Descriptor,
  DESCRIPTOR_SIZE,
  DescriptorFlag,
  SplitLayout,
  splitSizes,
  USED_FLAG_NO_NOTIFY,
  writeDescriptor,
} from "./split_layout.ts";

/** What a driver is made of; `queueSize` is a power of two. */
export type SplitDriverOptions = QueueDriverOptions;

/** The driver of one queue. It owns its two eventfds. */
export class SplitDriver extends QueueDriver<SplitLayout> {
  readonly firstBase: number = 0;
  /**
   * Taken from the end, or with IN_ORDER from the start, where each comes back
   * in its turn: then they are used in the order of the table (2.7.9).
   */
  readonly #free: number[] = [];
  /** By head: the descriptors of its chain. */
  readonly #chains = new Map<number, readonly number[]>();
  /** IN_ORDER: heads that are available and not used, the oldest first. */
  readonly #order: number[] = [];
  #availableIndex = 0;
  /** Available index when the device was last offered a kick. */
  #notifiedIndex = 0;
  #lastUsedIndex = 0;

  constructor(ram: GuestRam, options: SplitDriverOptions) {
    const { queueSize } = options;
    if (!(queueSize >= 1 && queueSize <= 32768)) {
      throw new Vhost2Error("OPTION", `Cannot use queueSize: ${queueSize}`);
    }
    const sizes = splitSizes(queueSize);
    const addresses = placeRing(ram, options.addresses, sizes, {
      descriptor: 16,
      available: 2,
      used: 4,
    });
    const ring = new SplitLayout(ram, queueSize, addresses);
    super(ram, ring, options, sizes);
    ring.clear();
    this.forget();
  }

  override get freeDescriptors(): number {
    return this.#free.length;
  }

  /** Puts a head into the available ring and moves its index. */
  publish(head: number): void {
    if (this.isInOrder) this.#order.push(head);
    this.ring.setAvailableEntry(this.#availableIndex, head);
    this.#availableIndex = (this.#availableIndex + 1) & 0xffff;
    this.ring.setAvailableIndex(this.#availableIndex);
  }

  /**
   * Writes a descriptor of the table. Take the index from
   * {@linkcode takeDescriptors} where requests run beside it.
   */
  descriptor(index: number, descriptor: Descriptor): void {
    this.ring.setDescriptor(index, descriptor);
  }

  /** Takes descriptors out of use by requests, for chains made by hand. */
  takeDescriptors(count: number): number[] {
    if (count > this.#free.length) {
      throw new Vhost2Error(
        "OPTION",
        `Cannot take ${count} descriptors: ${this.#free.length} are free`,
      );
    }
    return this.isInOrder
      ? this.#free.splice(0, count)
      : this.#free.splice(this.#free.length - count, count).reverse();
  }

  /** Sets the available index in memory and here; entries are not touched. */
  setAvailableIndex(index: number): void {
    this.#availableIndex = index & 0xffff;
    this.ring.setAvailableIndex(this.#availableIndex);
  }

  get availableIndex(): number {
    return this.#availableIndex;
  }

  /** The index that the device has written. */
  get usedIndex(): number {
    return this.ring.usedIndex;
  }

  override notify(): boolean {
    const from = this.#notifiedIndex;
    const to = this.#availableIndex;
    this.#notifiedIndex = to;
    const isWanted = this.usesEventIndex
      ? needsEvent(this.ring.availableEvent, to, from)
      : (this.ring.usedFlags & USED_FLAG_NO_NOTIFY) === 0;
    if (isWanted) this.kick();
    return isWanted;
  }

  protected override write(
    buffers: readonly GuestBuffer[],
    table: IndirectTable | null,
  ): number {
    const descriptors = this.takeDescriptors(table ? 1 : buffers.length);
    const head = descriptors[0];
    this.#chains.set(head, descriptors);
    if (table !== null) {
      this.ring.setDescriptor(head, {
        address: table.address,
        length: table.size,
        flags: DescriptorFlag.INDIRECT,
        next: 0,
      });
      return head;
    }
    buffers.forEach((buffer, i) => {
      this.ring.setDescriptor(
        descriptors[i],
        linked(buffer, descriptors[i + 1]),
      );
    });
    return head;
  }

  protected override offer(head: number): void {
    this.publish(head);
  }

  protected override writeTable(
    view: DataView,
    buffers: readonly GuestBuffer[],
  ): void {
    buffers.forEach((buffer, i) => {
      const next = i + 1 < buffers.length ? i + 1 : undefined;
      writeDescriptor(view, DESCRIPTOR_SIZE * i, linked(buffer, next));
    });
  }

  protected override take(): number {
    let count = 0;
    for (;;) {
      const ahead = (this.ring.usedIndex - this.#lastUsedIndex) & 0xffff;
      if (ahead === 0) return count;
      if (ahead > this.queueSize) {
        this.fail(`used index jumped by ${ahead}`);
        return count;
      }
      for (let left = ahead; left > 0;) {
        const element = this.ring.usedElement(this.#lastUsedIndex);
        const run = this.usedUpTo(element, this.#order);
        if (run === null) return count;
        if (run.length > left) {
          this.fail(`used index ends before head ${element.id}`);
          return count;
        }
        left -= run.length;
        this.#lastUsedIndex = (this.#lastUsedIndex + run.length) & 0xffff;
        if (this.isInOrder) this.#order.splice(0, run.length);
        for (const used of run) {
          count++;
          if (!this.use(used)) return count;
        }
      }
      // The store is a barrier: an element that came before it is seen by the
      // next turn of the loop, one that comes after it brings a call.
      if (this.usesEventIndex && this.usesCalls) {
        this.ring.setUsedEvent(this.#lastUsedIndex);
      }
    }
  }

  protected override release(head: number): void {
    const chain = this.#chains.get(head)!;
    this.#free.push(...this.isInOrder ? chain : [...chain].reverse());
    this.#chains.delete(head);
  }

  protected override forget(): void {
    this.#free.length = 0;
    for (let i = 0; i < this.queueSize; i++) this.#free.push(i);
    if (!this.isInOrder) this.#free.reverse();
    this.#chains.clear();
    this.#order.length = 0;
    this.#availableIndex = 0;
    this.#notifiedIndex = 0;
    this.#lastUsedIndex = 0;
    if (!this.usesCalls) {
      this.ring.setAvailableFlags(AVAILABLE_FLAG_NO_INTERRUPT);
    }
  }
}

/** A buffer's descriptor, with the next one's index if there is one. */
function linked(
  { address, length, isWritable }: GuestBuffer,
  next: number | undefined,
): Descriptor {
  return {
    address,
    length,
    flags: (isWritable ? DescriptorFlag.WRITE : 0) |
      (next === undefined ? 0 : DescriptorFlag.NEXT),
    next: next ?? 0,
  };
}

/** VIRTIO 1.3 section 2.7.7.1: whether going `from` to `to` passes `event`. */
function needsEvent(event: number, to: number, from: number): boolean {
  return ((to - event - 1) & 0xffff) < ((to - from) & 0xffff);
}
