/**
 * The guest's own split ring in the device: neither its buffers nor, where the
 * front-end takes a host notifier, its notifications pass through this
 * process. A virtio PCI device begins every ring at index 0, so only a ring
 * that is there can be passed on like this; the index at which it has stopped
 * is read off the ring.
 *
 * @module
 */

import { Vhost2Error } from "../../ffi/errors.ts";
import type { QueueAddresses } from "../../pci/virtio_registers.ts";
import type { DataPathQueue } from "../transport.ts";
import {
  type RingOptions,
  type RunningRing,
  watchInterrupts,
  whenIdle,
} from "./running_ring.ts";

/** Bytes before the entries of an available and a used ring: flags, idx. */
const entriesAt = 4;
const availableEntry = 2;
const usedEntry = 8;

/** Little-endian, read once. */
function read(area: Uint8Array, offset: number, bytes: 2 | 4): number {
  if (area.length < offset + bytes) return 0;
  const view = new DataView(area.buffer, area.byteOffset, area.length);
  return bytes === 2
    ? view.getUint16(offset, true)
    : view.getUint32(offset, true);
}

/** Where the ring is in the guest's, and so the device's, addresses; or 0. */
export function guestAddresses(
  { memory, addresses }: DataPathQueue,
): QueueAddresses {
  const found = (address: bigint) => {
    if (addresses.space === "gpa") return address;
    const region = memory.regions.find(({ uva, size }) =>
      address >= uva && address < uva + BigInt(size)
    );
    return region === undefined ? 0n : region.gpa + (address - region.uva);
  };
  return {
    descriptor: found(addresses.descriptor),
    available: found(addresses.available),
    used: found(addresses.used),
  };
}

export class DirectRing implements RunningRing {
  readonly index: number;
  readonly size: number;
  readonly addresses: QueueAddresses;
  readonly #options: RingOptions;
  readonly #queue: DataPathQueue;
  readonly #notify: () => void;
  /** A vector of the device's signals the guest's call. */
  #isRouted = false;
  #unwatch: (() => void) | undefined;
  #seenUsed = 0;

  constructor(options: RingOptions) {
    const { queue, device } = options;
    this.#options = options;
    this.#queue = queue;
    this.index = queue.index;
    this.size = queue.size;
    this.addresses = guestAddresses(queue);
    this.#notify = device.notifier(queue.index);
  }

  started(hasVector: boolean): void {
    this.#isRouted = hasVector && this.#options.device.hasOwnVectors;
    this.#unwatch = watchInterrupts(
      this.#options,
      hasVector,
      () => this.#interrupted(),
    );
    this.#route();
    this.#notify();
  }

  /** From MSI-X to the guest's call, without a way through this process. */
  #route(): void {
    if (!this.#isRouted) return;
    const call = this.#queue.wires.call();
    const { device } = this.#options;
    device.interrupts.route(
      device.vectorOf(this.index),
      typeof call === "number" ? call : null,
    );
  }

  /** The vector is not the guest's: shared, or its call is no eventfd. */
  #interrupted(): void {
    const used = this.#usedIndex;
    if (used === this.#seenUsed) return;
    this.#seenUsed = used;
    this.#queue.call();
  }

  kick(): void {
    this.#notify();
  }

  changed(): void {
    try {
      this.#route();
    } catch (error) {
      this.#queue.fail((error as Error).message, error);
    }
  }

  get #usedIndex(): number {
    return read(this.#queue.usedRing, 2, 2);
  }

  get #availableIndex(): number {
    return read(this.#queue.availableRing, 2, 2);
  }

  async quiesce(): Promise<void> {
    // What was made available without a kick is to be done too.
    this.#notify();
    await whenIdle(
      this.#options,
      () => this.#usedIndex === this.#availableIndex,
    );
  }

  // deno-lint-ignore require-await -- as RunningRing has it
  async end(): Promise<number> {
    this.#unwatch?.();
    if (this.#isRouted) {
      const { device } = this.#options;
      try {
        device.interrupts.route(device.vectorOf(this.index), null);
      } catch {
        // It has gone, and its interrupts with it.
      }
    }
    return this.#position();
  }

  /**
   * All requests up to the used index are done, if the device has done them in
   * order or there are none left. Otherwise it is not to be known which: they
   * are lost rather than done twice.
   */
  #position(): number {
    const used = this.#usedIndex;
    const open = (this.#availableIndex - used) & 0xffff;
    if (open === 0 || this.#isInOrder(used, open)) return used;
    this.#options.report(
      new Vhost2Error(
        "RING",
        `Cannot go on with ${open} requests of queue ${this.index} of PCI device ${this.#options.device.pci.name}: it was stopped before it had done them`,
      ),
    );
    return (used + open) & 0xffff;
  }

  /** As far as both rings still show it. */
  #isInOrder(used: number, open: number): boolean {
    const { usedRing, availableRing } = this.#queue;
    // The available ring has the last `size` entries, the open ones included.
    for (let back = 1; back <= this.size - open && back <= used; back++) {
      const slot = ((used - back) & 0xffff) % this.size;
      const head = read(availableRing, entriesAt + availableEntry * slot, 2);
      if (head !== read(usedRing, entriesAt + usedEntry * slot, 4)) {
        return false;
      }
    }
    return true;
  }
}
