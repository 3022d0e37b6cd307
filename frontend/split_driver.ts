/**
 * The driver's side of a split virtqueue: requests in, completions out, with
 * the notification suppression of both sides, and every field within reach for
 * tests that break the rules.
 *
 * Event-driven: the used ring is looked at when the call eventfd is signalled,
 * or when `poll` is called.
 *
 * @module
 */

import { core } from "../ffi/core.ts";
import { check, Vhost2Error } from "../ffi/errors.ts";
import { eventLoop, type Watch } from "../ffi/event_loop.ts";
import type { Gpa } from "../protocol/address.ts";
import { hasFeature, VirtioFeature } from "../protocol/features.ts";
import type { GuestRam } from "./guest_ram.ts";
import {
  AVAILABLE_FLAG_NO_INTERRUPT,
  type Descriptor,
  DESCRIPTOR_SIZE,
  DescriptorFlag,
  type SplitAddresses,
  SplitLayout,
  splitSizes,
  USED_FLAG_NO_NOTIFY,
  type UsedElement,
  writeDescriptor,
} from "./split_layout.ts";

/** What a driver is made of. */
export interface SplitDriverOptions {
  /** Descriptors: a power of two up to 32768. */
  readonly queueSize: number;
  /** Negotiated virtio features: EVENT_IDX and INDIRECT matter here. */
  readonly features: bigint;
  /** Where the parts are; allocated from the memory unless given. */
  readonly addresses?: SplitAddresses;
  /** Watches the call eventfd; true unless given. Otherwise call `poll`. */
  readonly usesCalls?: boolean;
}

/** One buffer of a chain, somewhere in guest memory. */
export interface GuestBuffer {
  /** Guest address; any, for hostile chains. */
  readonly address: bigint;
  /** Bytes. */
  readonly length: number;
  /** The device may write it. */
  readonly isWritable: boolean;
}

/** How a chain is put into the ring. */
export interface ChainOptions {
  /** Puts the descriptors into an indirect table. */
  readonly indirect?: boolean;
  /** Kicks as the device wants it; true unless given. */
  readonly kick?: boolean;
}

/** A request: what the device reads, and the sizes of what it writes. */
export interface DriverRequest extends ChainOptions {
  readonly readable?: readonly Uint8Array[];
  /** Bytes of each writable buffer. */
  readonly writable?: readonly number[];
  /** What the writable buffers hold at first, each byte; 0 unless given. */
  readonly initial?: number;
}

/** What came back for a request. */
export interface DriverCompletion {
  /** Bytes that the device says it wrote. */
  readonly written: number;
  /** Each writable buffer, whole; `initial` where nothing was written. */
  readonly data: Uint8Array<ArrayBuffer>[];
}

interface InFlight {
  readonly descriptors: readonly number[];
  readonly indirect: { readonly address: Gpa; readonly size: number } | null;
  /** Bytes that the device may write at most. */
  readonly writableBytes: number;
  resolve(written: number): void;
  reject(error: Vhost2Error): void;
}

interface DescriptorWaiter {
  readonly needed: number;
  resolve(descriptors: number[]): void;
  reject(error: Vhost2Error): void;
}

interface UsedWaiter {
  readonly count: number;
  resolve(): void;
  reject(error: Vhost2Error): void;
}

/** The driver of one queue. It owns its two eventfds. */
export class SplitDriver {
  readonly ram: GuestRam;
  readonly queueSize: number;
  readonly features: bigint;
  /** Eventfd for SET_VRING_KICK. */
  readonly kickFd: number;
  /** Eventfd for SET_VRING_CALL. */
  readonly callFd: number;
  /** Every field of the ring, for hostile tests. */
  readonly ring: SplitLayout;
  /** Used elements of heads that were not in flight, the last of them. */
  readonly strays: UsedElement[] = [];
  /** Called for each element that appears in the used ring. */
  onUsed: ((element: UsedElement) => void) | undefined;
  readonly #ownsMemory: boolean;
  readonly #watch: Watch | undefined;
  readonly #free: number[] = [];
  readonly #inFlight = new Map<number, InFlight>();
  readonly #waiting: DescriptorWaiter[] = [];
  readonly #usedWaiters: UsedWaiter[] = [];
  readonly #usesEventIndex: boolean;
  #availableIndex = 0;
  /** Available index when the device was last offered a kick. */
  #notifiedIndex = 0;
  #lastUsedIndex = 0;
  #usedCount = 0;
  #kicks = 0;
  #calls = 0;
  #failure: Vhost2Error | undefined;
  #isOpen = true;

  constructor(ram: GuestRam, options: SplitDriverOptions) {
    const { queueSize, features } = options;
    if (!(queueSize >= 1 && queueSize <= 32768)) {
      throw new Vhost2Error("OPTION", `Cannot use queueSize: ${queueSize}`);
    }
    this.ram = ram;
    this.queueSize = queueSize;
    this.features = features;
    this.#usesEventIndex = hasFeature(features, VirtioFeature.RING_EVENT_IDX);
    this.#ownsMemory = options.addresses === undefined;
    const sizes = splitSizes(queueSize);
    const addresses = options.addresses ?? {
      descriptor: ram.allocate(sizes.descriptor, 16),
      available: ram.allocate(sizes.available, 2),
      used: ram.allocate(sizes.used, 4),
    };
    this.ring = new SplitLayout(ram, queueSize, addresses);
    this.kickFd = check(core.eventfdCreate(), "Cannot make a kick eventfd");
    this.callFd = core.eventfdCreate();
    if (this.callFd < 0) {
      core.descriptorClose(this.kickFd);
      check(this.callFd, "Cannot make a call eventfd");
    }
    if (options.usesCalls ?? true) {
      this.#watch = eventLoop.watch(this.callFd, () => this.#called());
    }
    this.#forget();
  }

  /** Notifications sent to the device. */
  get kicks(): number {
    return this.#kicks;
  }

  /** Notifications received from the device; looks for new ones. */
  get calls(): number {
    this.#called();
    return this.#calls;
  }

  /** Elements seen in the used ring since the start. */
  get usedCount(): number {
    return this.#usedCount;
  }

  /** Requests that the device has not completed. */
  get inFlight(): number {
    return this.#inFlight.size;
  }

  /** Descriptors that no request occupies. */
  get freeDescriptors(): number {
    return this.#free.length;
  }

  /** Why the ring is of no more use: the device broke it. */
  get failure(): Vhost2Error | undefined {
    return this.#failure;
  }

  /**
   * Sends a request. Waits for free descriptors if need be. Rejects with RING
   * when the device breaks the ring, with CLOSED when the driver is closed.
   */
  async submit(request: DriverRequest): Promise<DriverCompletion> {
    const buffers: GuestBuffer[] = [];
    try {
      for (const bytes of request.readable ?? []) {
        const address = this.ram.allocate(bytes.length);
        this.ram.write(address, bytes);
        buffers.push({ address, length: bytes.length, isWritable: false });
      }
      for (const length of request.writable ?? []) {
        const address = this.ram.allocate(length);
        if (request.initial) {
          this.ram.bytes(address, length).fill(request.initial);
        }
        buffers.push({ address, length, isWritable: true });
      }
      const written = await this.submitChain(buffers, request);
      const data = buffers.filter((buffer) => buffer.isWritable)
        .map(({ address, length }) => this.ram.read(address, length));
      return { written, data };
    } finally {
      // After a failure the device may still write there: then the memory is
      // left out of use until it goes as a whole.
      if (this.#isOpen && this.#failure === undefined) {
        for (const { address, length } of buffers) {
          this.ram.free(address, length);
        }
      }
    }
  }

  /**
   * Sends a chain of buffers that are in guest memory already (or nowhere);
   * returns how many bytes the device says it wrote.
   */
  async submitChain(
    buffers: readonly GuestBuffer[],
    options: ChainOptions = {},
  ): Promise<number> {
    const isIndirect = options.indirect ?? false;
    const needed = isIndirect ? 1 : buffers.length;
    if (needed < 1 || needed > this.queueSize) {
      throw new Vhost2Error(
        "OPTION",
        `Cannot submit a chain of ${needed} descriptors: the queue has ${this.queueSize}`,
      );
    }
    this.#requireUsable();
    const taken = this.#waiting.length === 0 && needed <= this.#free.length
      ? this.takeDescriptors(needed)
      : null;
    const descriptors = taken ?? await this.#waitForDescriptors(needed);
    const head = descriptors[0];
    const indirect = isIndirect ? this.#writeIndirect(head, buffers) : null;
    if (!isIndirect) this.#writeDirect(descriptors, buffers);
    const writableBytes = buffers.reduce(
      (sum, { length, isWritable }) => isWritable ? sum + length : sum,
      0,
    );
    const completion = new Promise<number>((resolve, reject) => {
      this.#inFlight.set(head, {
        descriptors,
        indirect,
        writableBytes,
        resolve,
        reject,
      });
    });
    this.publish(head);
    // Who wants to kick once for many cannot know that this one had to wait.
    if (taken === null || (options.kick ?? true)) this.notify();
    return await completion;
  }

  /** Puts a head into the available ring and moves its index. */
  publish(head: number): void {
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
    return this.#free.splice(this.#free.length - count, count).reverse();
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

  /** Kicks if the device wants it (flags, or EVENT_IDX); whether it did. */
  notify(): boolean {
    const from = this.#notifiedIndex;
    const to = this.#availableIndex;
    this.#notifiedIndex = to;
    const isWanted = this.#usesEventIndex
      ? needsEvent(this.ring.availableEvent, to, from)
      : (this.ring.usedFlags & USED_FLAG_NO_NOTIFY) === 0;
    if (isWanted) this.kick();
    return isWanted;
  }

  /** Kicks whatever the device wants. */
  kick(): void {
    if (!this.#isOpen) return;
    core.eventfdSignal(this.kickFd);
    this.#kicks++;
  }

  /** Takes what is in the used ring now; returns how many elements. */
  poll(): number {
    if (!this.#isOpen || this.#failure !== undefined) return 0;
    let count = 0;
    for (;;) {
      const usedIndex = this.ring.usedIndex;
      const ahead = (usedIndex - this.#lastUsedIndex) & 0xffff;
      if (ahead === 0) break;
      if (ahead > this.queueSize) {
        this.#fail(`used index jumped by ${ahead}`);
        break;
      }
      for (let i = 0; i < ahead && this.#failure === undefined; i++) {
        const element = this.ring.usedElement(this.#lastUsedIndex);
        this.#lastUsedIndex = (this.#lastUsedIndex + 1) & 0xffff;
        this.#use(element);
        count++;
      }
      if (this.#failure !== undefined) break;
      // The store is a barrier: an element that came before it is seen by the
      // next turn of the loop, one that comes after it brings a call.
      if (this.#usesEventIndex) this.ring.setUsedEvent(this.#lastUsedIndex);
    }
    this.#wakeWaiters();
    return count;
  }

  /** Fulfilled when `count` elements in all have been seen as used. */
  whenUsed(count: number): Promise<void> {
    if (this.#usedCount >= count) return Promise.resolve();
    if (this.#failure !== undefined) return Promise.reject(this.#failure);
    return new Promise((resolve, reject) => {
      this.#usedWaiters.push({ count, resolve, reject });
    });
  }

  /**
   * Forgets all requests (they reject) and clears the ring, as a guest does
   * that resets the device; the queue must be stopped.
   */
  reset(): void {
    for (const { indirect } of this.#inFlight.values()) {
      if (indirect !== null) this.ram.free(indirect.address, indirect.size);
    }
    this.#rejectAll(
      new Vhost2Error(
        "CLOSED",
        "Cannot complete a request: the ring was reset",
      ),
    );
    this.#forget();
  }

  /** Rejects what is in flight and closes the eventfds. */
  close(): void {
    if (!this.#isOpen) return;
    this.#isOpen = false;
    this.#watch?.close();
    core.descriptorClose(this.kickFd);
    core.descriptorClose(this.callFd);
    this.#rejectAll(
      new Vhost2Error("CLOSED", "Cannot complete a request: the driver closed"),
    );
    if (!this.#ownsMemory) return;
    const sizes = splitSizes(this.queueSize);
    for (const part of ["descriptor", "available", "used"] as const) {
      this.ram.free(this.ring.addresses[part], sizes[part]);
    }
  }

  [Symbol.dispose](): void {
    this.close();
  }

  #requireUsable(): void {
    if (this.#failure !== undefined) throw this.#failure;
    if (this.#isOpen) return;
    throw new Vhost2Error(
      "CLOSED",
      "Cannot submit a request: the driver is closed",
    );
  }

  #writeDirect(
    descriptors: readonly number[],
    buffers: readonly GuestBuffer[],
  ): void {
    buffers.forEach(({ address, length, isWritable }, i) => {
      const isLast = i === buffers.length - 1;
      this.ring.setDescriptor(descriptors[i], {
        address,
        length,
        flags: (isWritable ? DescriptorFlag.WRITE : 0) |
          (isLast ? 0 : DescriptorFlag.NEXT),
        next: isLast ? 0 : descriptors[i + 1],
      });
    });
  }

  #writeIndirect(head: number, buffers: readonly GuestBuffer[]) {
    const size = DESCRIPTOR_SIZE * buffers.length;
    const address = this.ram.allocate(size);
    const bytes = this.ram.bytes(address, size);
    const table = new DataView(bytes.buffer, bytes.byteOffset, size);
    buffers.forEach((buffer, i) => {
      const isLast = i === buffers.length - 1;
      writeDescriptor(table, DESCRIPTOR_SIZE * i, {
        address: buffer.address,
        length: buffer.length,
        flags: (buffer.isWritable ? DescriptorFlag.WRITE : 0) |
          (isLast ? 0 : DescriptorFlag.NEXT),
        next: isLast ? 0 : i + 1,
      });
    });
    const flags = DescriptorFlag.INDIRECT;
    this.ring.setDescriptor(head, { address, length: size, flags, next: 0 });
    return { address, size };
  }

  #called(): void {
    if (!this.#isOpen) return;
    this.#calls += Math.max(0, core.eventfdTake(this.callFd));
    if (this.#watch !== undefined) this.poll();
  }

  #waitForDescriptors(needed: number): Promise<number[]> {
    return new Promise((resolve, reject) => {
      this.#waiting.push({ needed, resolve, reject });
    });
  }

  #use(element: UsedElement): void {
    this.#usedCount++;
    const request = this.#inFlight.get(element.id);
    if (request === undefined) {
      this.strays.push(element);
      if (this.strays.length > this.queueSize) this.strays.shift();
    } else if (element.length > request.writableBytes) {
      this.#fail(
        `${element.length} bytes written to head ${element.id}, which has ${request.writableBytes}`,
      );
    } else {
      this.#inFlight.delete(element.id);
      this.#free.push(...[...request.descriptors].reverse());
      if (request.indirect !== null) {
        this.ram.free(request.indirect.address, request.indirect.size);
      }
      request.resolve(element.length);
    }
    this.onUsed?.(element);
  }

  #wakeWaiters(): void {
    while (
      this.#waiting.length > 0 && this.#waiting[0].needed <= this.#free.length
    ) {
      const { needed, resolve } = this.#waiting.shift()!;
      resolve(this.takeDescriptors(needed));
    }
    const reached = this.#usedWaiters.filter((w) => w.count <= this.#usedCount);
    for (const waiter of reached) {
      this.#usedWaiters.splice(this.#usedWaiters.indexOf(waiter), 1);
      waiter.resolve();
    }
  }

  #fail(what: string): void {
    this.#failure = new Vhost2Error(
      "RING",
      `Cannot use the used ring: ${what}`,
    );
    this.#rejectAll(this.#failure);
  }

  #rejectAll(error: Vhost2Error): void {
    const requests = [...this.#inFlight.values()];
    this.#inFlight.clear();
    for (const request of requests) request.reject(error);
    for (const waiter of this.#usedWaiters.splice(0)) waiter.reject(error);
    for (const waiter of this.#waiting.splice(0)) waiter.reject(error);
  }

  #forget(): void {
    this.ring.clear();
    this.#free.length = 0;
    for (let i = this.queueSize - 1; i >= 0; i--) this.#free.push(i);
    this.#availableIndex = 0;
    this.#notifiedIndex = 0;
    this.#lastUsedIndex = 0;
    this.#failure = undefined;
    this.strays.length = 0;
    if (this.#watch === undefined) {
      this.ring.setAvailableFlags(AVAILABLE_FLAG_NO_INTERRUPT);
    }
  }
}

/** VIRTIO 1.3 section 2.7.7.1: whether going `from` to `to` passes `event`. */
function needsEvent(event: number, to: number, from: number): boolean {
  return ((to - event - 1) & 0xffff) < ((to - from) & 0xffff);
}
