/**
 * What the driver's sides of split and packed virtqueues share: requests in,
 * completions out, kicks and calls.
 *
 * Event-driven: the ring is looked at when the call eventfd is signalled, or
 * when `poll` is called.
 *
 * @module
 */

import { core } from "../ffi/core.ts";
import { check, Vhost2Error } from "../ffi/errors.ts";
import { eventLoop, type Watch } from "../ffi/event_loop.ts";
import type { Access } from "../ffi/iotlb.ts";
import type { Gpa } from "../protocol/address.ts";
import { hasFeature, VirtioFeature } from "../protocol/features.ts";
import type { GuestRam } from "./guest_ram.ts";

/** Guest addresses of a ring's parts, by their names in a split ring. */
export interface DriverAddresses {
  readonly descriptor: Gpa;
  /** The driver area. */
  readonly available: Gpa;
  /** The device area. */
  readonly used: Gpa;
}

/** What stands between a device's addresses and the guest's: an IOMMU. */
export interface AddressMap {
  /** Lets the device reach guest memory, by the address that returns. */
  map(address: bigint, length: number, access?: Access): bigint;
  /** Fulfilled when the device cannot reach it any more. */
  unmap(address: bigint, length: number): Promise<void>;
}

/** What a driver is made of. */
export interface QueueDriverOptions {
  /** Descriptors: up to 32768, a power of two in a split ring. */
  readonly queueSize: number;
  /** Negotiated virtio features: EVENT_IDX and IN_ORDER matter here. */
  readonly features: bigint;
  /** Where the parts are; allocated from the memory unless given. */
  readonly addresses?: DriverAddresses;
  /** Watches the call eventfd; true unless given. Otherwise call `poll`. */
  readonly usesCalls?: boolean;
  /** Kicks the device, where that is no eventfd but a register. */
  readonly notify?: () => void;
  /** Between the device and the memory; the device's addresses are its. */
  readonly iommu?: AddressMap;
}

/** One buffer of a chain, somewhere in guest memory. */
export interface GuestBuffer {
  /** As the device sees it (with an IOMMU, its); any, for hostile chains. */
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

/** What the device says of a chain that it is done with. */
export interface UsedElement {
  /** Head of the chain (packed: its buffer id). */
  readonly id: number;
  /** Bytes that the device says it wrote. */
  readonly length: number;
}

/** An indirect table in guest memory. */
export interface IndirectTable {
  /** Where it is in guest memory. */
  readonly memory: Gpa;
  /** As the device sees it. */
  readonly address: bigint;
  /** Bytes. */
  readonly size: number;
}

/** A ring's fields in guest memory. */
export interface RingLayout {
  readonly addresses: DriverAddresses;
  /** As after a reset. */
  clear(): void;
}

interface OwnBuffer extends GuestBuffer {
  readonly memory: Gpa;
}

interface InFlight {
  readonly indirect: IndirectTable | null;
  /** Bytes that the device may write at most. */
  readonly writableBytes: number;
  resolve(written: number): void;
  reject(error: Vhost2Error): void;
}

interface RoomWaiter {
  readonly needed: number;
  start(): void;
  reject(error: Vhost2Error): void;
}

interface UsedWaiter {
  readonly count: number;
  resolve(): void;
  reject(error: Vhost2Error): void;
}

/** The driver of one queue. It owns its two eventfds. */
export abstract class QueueDriver<Ring extends RingLayout = RingLayout> {
  readonly ram: GuestRam;
  readonly queueSize: number;
  readonly features: bigint;
  /** Eventfd for SET_VRING_KICK; -1 where `notify` takes its place. */
  readonly kickFd: number;
  /** Eventfd for SET_VRING_CALL. */
  readonly callFd: number;
  /** Every field of the ring, for hostile tests. */
  readonly ring: Ring;
  /** Where the ring's parts are as the device sees them. */
  readonly deviceAddresses: Readonly<Record<keyof DriverAddresses, bigint>>;
  readonly iommu: AddressMap | undefined;
  /** Used elements of chains made by hand, the last of them. */
  readonly strays: UsedElement[] = [];
  /** Kicks in place of the eventfd where it answers true: a host notifier. */
  kickDirectly: (() => boolean) | undefined;
  /** Called for each element that appears as used. */
  onUsed: ((element: UsedElement) => void) | undefined;
  /** The base of a ring that nobody has used. */
  abstract readonly firstBase: number;
  protected readonly usesEventIndex: boolean;
  /** IN_ORDER: buffers are used in the order in which they were available. */
  protected readonly isInOrder: boolean;
  protected readonly usesCalls: boolean;
  readonly #notify: (() => void) | undefined;
  readonly #ownedSizes: Readonly<Record<keyof DriverAddresses, number>> | null;
  readonly #watch: Watch | undefined;
  readonly #inFlight = new Map<number, InFlight>();
  readonly #waiting: RoomWaiter[] = [];
  readonly #usedWaiters: UsedWaiter[] = [];
  #usedCount = 0;
  #kicks = 0;
  #calls = 0;
  #failure: Vhost2Error | undefined;
  #isOpen = true;

  /**
   * @param ownedSizes bytes of the parts to free at the end; null if they are
   * somebody else's
   */
  protected constructor(
    ram: GuestRam,
    ring: Ring,
    options: QueueDriverOptions,
    ownedSizes: Readonly<Record<keyof DriverAddresses, number>>,
  ) {
    this.ram = ram;
    this.ring = ring;
    this.queueSize = options.queueSize;
    this.features = options.features;
    this.usesEventIndex = hasFeature(
      options.features,
      VirtioFeature.RING_EVENT_IDX,
    );
    this.isInOrder = hasFeature(options.features, VirtioFeature.IN_ORDER);
    this.usesCalls = options.usesCalls ?? true;
    this.iommu = options.iommu;
    const seen = (part: keyof DriverAddresses) => {
      const address = ring.addresses[part];
      return this.iommu?.map(address, ownedSizes[part]) ?? address;
    };
    this.deviceAddresses = {
      descriptor: seen("descriptor"),
      available: seen("available"),
      used: seen("used"),
    };
    this.#ownedSizes = options.addresses === undefined ? ownedSizes : null;
    this.#notify = options.notify;
    this.kickFd = options.notify === undefined
      ? check(core.eventfdCreate(), "Cannot make a kick eventfd")
      : -1;
    this.callFd = core.eventfdCreate();
    if (this.callFd < 0) {
      if (this.kickFd >= 0) core.descriptorClose(this.kickFd);
      check(this.callFd, "Cannot make a call eventfd");
    }
    if (this.usesCalls) {
      this.#watch = eventLoop.watch(this.callFd, () => this.#called());
    }
  }

  /** Descriptors that no request occupies. */
  abstract get freeDescriptors(): number;

  /** Kicks if the device wants it (flags, or EVENT_IDX); whether it did. */
  abstract notify(): boolean;

  /** Takes descriptors and writes a chain; returns its head or buffer id. */
  protected abstract write(
    buffers: readonly GuestBuffer[],
    table: IndirectTable | null,
  ): number;
  /** Makes available what was written last. */
  protected abstract offer(head: number): void;
  /** Fills an indirect table. */
  protected abstract writeTable(
    view: DataView,
    buffers: readonly GuestBuffer[],
  ): void;
  /** Calls `use` for what is used now, and says when to be called next. */
  protected abstract take(): number;
  /** The descriptors of a chain are free again. */
  protected abstract release(head: number): void;
  /** As after a reset. */
  protected abstract forget(): void;

  /** Notifications sent to the device. */
  get kicks(): number {
    return this.#kicks;
  }

  /** Notifications received from the device; looks for new ones. */
  get calls(): number {
    this.#called();
    return this.#calls;
  }

  /** Used elements seen since the start. */
  get usedCount(): number {
    return this.#usedCount;
  }

  /** Requests that the device has not completed. */
  get inFlight(): number {
    return this.#inFlight.size;
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
    const buffers: OwnBuffer[] = [];
    const add = (memory: Gpa, length: number, isWritable: boolean) => {
      const access = isWritable ? "write" : "read";
      const address = this.iommu?.map(memory, length, access) ?? memory;
      buffers.push({ memory, address, length, isWritable });
    };
    try {
      for (const bytes of request.readable ?? []) {
        const address = this.ram.allocate(bytes.length);
        this.ram.write(address, bytes);
        add(address, bytes.length, false);
      }
      for (const length of request.writable ?? []) {
        const address = this.ram.allocate(length);
        if (request.initial) {
          this.ram.bytes(address, length).fill(request.initial);
        }
        add(address, length, true);
      }
      const written = await this.submitChain(buffers, request);
      const data = buffers.filter((buffer) => buffer.isWritable)
        .map(({ memory, length }) => this.ram.read(memory, length));
      const { iommu } = this;
      if (iommu !== undefined) {
        // What is free again the device must not reach any more.
        await Promise.all(
          buffers.map(({ address, length }) => iommu.unmap(address, length)),
        );
      }
      return { written, data };
    } finally {
      // After a failure the device may still write there: then the memory is
      // left out of use until it goes as a whole.
      if (this.#isOpen && this.#failure === undefined) {
        for (const { memory, length } of buffers) {
          this.ram.free(memory, length);
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
    const hasRoom = this.#waiting.length === 0 &&
      needed <= this.freeDescriptors;
    return await new Promise<number>((resolve, reject) => {
      const start = () => {
        const indirect = isIndirect ? this.#makeTable(buffers) : null;
        const head = this.write(buffers, indirect);
        const writableBytes = buffers.reduce(
          (sum, { length, isWritable }) => isWritable ? sum + length : sum,
          0,
        );
        this.#inFlight.set(head, { indirect, writableBytes, resolve, reject });
        this.offer(head);
        // Who kicks once for many cannot know that this one had to wait.
        if (!hasRoom || (options.kick ?? true)) this.notify();
      };
      if (hasRoom) start();
      else this.#waiting.push({ needed, start, reject });
    });
  }

  /** Kicks whatever the device wants. */
  kick(): void {
    if (!this.#isOpen) return;
    this.#kicks++;
    if (this.kickDirectly?.()) return;
    if (this.#notify === undefined) core.eventfdSignal(this.kickFd);
    else this.#notify();
  }

  /** Takes what is used now; returns how many elements. */
  poll(): number {
    if (!this.#isOpen || this.#failure !== undefined) return 0;
    const count = this.take();
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
      if (indirect !== null) this.#freeTable(indirect);
    }
    this.#rejectAll(
      new Vhost2Error(
        "CLOSED",
        "Cannot complete a request: the ring was reset",
      ),
    );
    this.#failure = undefined;
    this.strays.length = 0;
    this.ring.clear();
    this.forget();
  }

  /** Rejects what is in flight and closes the eventfds. */
  close(): void {
    if (!this.#isOpen) return;
    this.#isOpen = false;
    this.#watch?.close();
    if (this.kickFd >= 0) core.descriptorClose(this.kickFd);
    core.descriptorClose(this.callFd);
    this.#rejectAll(
      new Vhost2Error("CLOSED", "Cannot complete a request: the driver closed"),
    );
    if (this.#ownedSizes === null) return;
    for (const part of ["descriptor", "available", "used"] as const) {
      this.ram.free(this.ring.addresses[part], this.#ownedSizes[part]);
    }
  }

  [Symbol.dispose](): void {
    this.close();
  }

  /**
   * The requests for which a used element stands: with IN_ORDER also those
   * before it in `available` (2.7.9, 2.8.8), the others having been used
   * completely. Null, and the ring has failed, when it is not among them.
   */
  protected usedUpTo(
    last: UsedElement,
    available: Iterable<number>,
  ): UsedElement[] | null {
    if (!this.isInOrder) return [last];
    const run: UsedElement[] = [];
    for (const id of available) {
      if (id === last.id) {
        run.push(last);
        return run;
      }
      // Of a chain made by hand it is not known here.
      const length = this.#inFlight.get(id)?.writableBytes ?? 0;
      run.push({ id, length });
    }
    this.fail(`head ${last.id} is not in flight`);
    return null;
  }

  /** An element appeared as used; false once the ring is of no more use. */
  protected use(element: UsedElement): boolean {
    this.#usedCount++;
    const request = this.#inFlight.get(element.id);
    if (request === undefined) {
      this.strays.push(element);
      if (this.strays.length > this.queueSize) this.strays.shift();
    } else if (
      // Of a chain that nobody can write, DPDK says how much it has read.
      request.writableBytes > 0 && element.length > request.writableBytes
    ) {
      this.fail(
        `${element.length} bytes written to head ${element.id}, which has ${request.writableBytes}`,
      );
    } else {
      this.#inFlight.delete(element.id);
      this.release(element.id);
      if (request.indirect !== null) this.#freeTable(request.indirect);
      request.resolve(Math.min(element.length, request.writableBytes));
    }
    this.onUsed?.(element);
    return this.#failure === undefined;
  }

  /** The device broke the ring. */
  protected fail(what: string): void {
    this.#failure = new Vhost2Error(
      "RING",
      `Cannot use the used ring: ${what}`,
    );
    this.#rejectAll(this.#failure);
  }

  #requireUsable(): void {
    if (this.#failure !== undefined) throw this.#failure;
    if (this.#isOpen) return;
    throw new Vhost2Error(
      "CLOSED",
      "Cannot submit a request: the driver is closed",
    );
  }

  #makeTable(buffers: readonly GuestBuffer[]): IndirectTable {
    const size = 16 * buffers.length;
    const memory = this.ram.allocate(size);
    const bytes = this.ram.bytes(memory, size);
    const view = new DataView(bytes.buffer, bytes.byteOffset, size);
    this.writeTable(view, buffers);
    const address = this.iommu?.map(memory, size, "read") ?? memory;
    return { memory, address, size };
  }

  #freeTable({ memory, address, size }: IndirectTable): void {
    const free = () => this.ram.free(memory, size);
    if (this.iommu === undefined) return free();
    // A back-end that has gone, or refuses, keeps it: it goes with the memory.
    this.iommu.unmap(address, size).then(free, () => {});
  }

  #called(): void {
    if (!this.#isOpen) return;
    this.#calls += Math.max(0, core.eventfdTake(this.callFd));
    if (this.#watch !== undefined) this.poll();
  }

  #wakeWaiters(): void {
    while (
      this.#waiting.length > 0 &&
      this.#waiting[0].needed <= this.freeDescriptors
    ) {
      const { start, reject } = this.#waiting.shift()!;
      try {
        start();
      } catch (error) {
        reject(error as Vhost2Error);
      }
    }
    const reached = this.#usedWaiters.filter((w) => w.count <= this.#usedCount);
    for (const waiter of reached) {
      this.#usedWaiters.splice(this.#usedWaiters.indexOf(waiter), 1);
      waiter.resolve();
    }
  }

  #rejectAll(error: Vhost2Error): void {
    const requests = [...this.#inFlight.values()];
    this.#inFlight.clear();
    for (const request of requests) request.reject(error);
    for (const waiter of this.#usedWaiters.splice(0)) waiter.reject(error);
    for (const waiter of this.#waiting.splice(0)) waiter.reject(error);
  }
}

/** Memory for a ring, or the memory given. */
export function placeRing(
  ram: GuestRam,
  given: DriverAddresses | undefined,
  sizes: Readonly<Record<keyof DriverAddresses, number>>,
  alignments: Readonly<Record<keyof DriverAddresses, number>>,
): DriverAddresses {
  if (given !== undefined) return given;
  const place = (part: keyof DriverAddresses) =>
    ram.allocate(sizes[part], alignments[part]);
  return {
    descriptor: place("descriptor"),
    available: place("available"),
    used: place("used"),
  };
}
