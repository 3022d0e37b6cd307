/**
 * The device as its user sees it: one per connected front-end.
 *
 * @module
 */

import type { GuestMemory, MappedRegion } from "../ffi/guest_memory.ts";
import type { Access } from "../ffi/iotlb.ts";
import { Vhost2Error } from "../ffi/errors.ts";
import { type Gpa, gpa, type Uva, uva } from "../protocol/address.ts";
import { BackendRequest as Id } from "../protocol/backend_request.ts";
import type { BackendRequests } from "./backend_requests.ts";
import type { Queue } from "./queue.ts";
import type { SharedMapping, SharedMemory } from "./shared_memory.ts";
import type { Translations } from "./translations.ts";

/** A sum that passed 2^64 must not come round to the guest's first bytes. */
function isRange(address: bigint, length: number): boolean {
  return length >= 1 && address === BigInt.asUintN(64, address);
}

/** One region of guest memory. */
export class MemoryRegion {
  /** Guest physical address of its first byte. */
  readonly gpa: Gpa;
  /** Virtual address of its first byte in the front-end's process. */
  readonly uva: Uva;
  /** Bytes. */
  readonly size: number;
  /** Buffers that cover it in order: one, except for large ones in Node 20. */
  readonly buffers: readonly ArrayBuffer[];

  constructor(region: MappedRegion) {
    this.gpa = gpa(region.gpa);
    this.uva = uva(region.uva);
    this.size = region.size;
    this.buffers = region.buffers;
  }

  /**
   * The whole region, without a copy. It becomes empty when the region goes
   * away.
   */
  get view(): Uint8Array<ArrayBuffer> {
    if (this.buffers.length === 1) return new Uint8Array(this.buffers[0]);
    throw new Vhost2Error(
      "MEMORY",
      `Cannot view a region of ${this.size} bytes at once in this runtime: use its buffers, Node 22 or Deno`,
    );
  }
}

/** What a device asks of its session. */
export interface DeviceSession {
  readonly name: string;
  readonly memory: GuestMemory;
  readonly features: bigint;
  readonly startedQueues: readonly Queue[];
  readonly signal: AbortSignal;
  readonly shared: SharedArrayBuffer;
  readonly servesQueues: boolean;
  report(error: Vhost2Error): void;
  readonly requests: Pick<BackendRequests, "send" | "lookUp">;
  readonly sharedMemory: Pick<SharedMemory, "map" | "unmap">;
  readonly translations: Pick<Translations, "isActive">;
  whenMapped(
    address: bigint,
    access: Access,
    queue: Queue | undefined,
  ): Promise<void>;
  configChanged(): void;
}

/**
 * A virtual device, as long as one front-end is connected. The ops of its
 * target are called with it.
 */
export class Device {
  readonly #session: DeviceSession;
  #mapped: readonly MappedRegion[] | undefined;
  #memory: readonly MemoryRegion[] = Object.freeze([]);

  /** Made by the session only. */
  constructor(session: DeviceSession) {
    this.#session = session;
  }

  /** The connection, for messages to people: `vhost-user:/tmp/a.sock #1`. */
  get name(): string {
    return this.#session.name;
  }

  /** Negotiated virtio features, LOG_ALL among them. */
  get features(): bigint {
    return this.#session.features;
  }

  /** The regions, in gpa order: a frozen list, replaced when it changes. */
  get memory(): readonly MemoryRegion[] {
    const mapped = this.#session.memory.regions;
    if (mapped !== this.#mapped) {
      this.#mapped = mapped;
      this.#memory = Object.freeze(mapped.map((r) => new MemoryRegion(r)));
    }
    return this.#memory;
  }

  /** The queues that are started now. */
  get queues(): readonly Queue[] {
    return this.#session.startedQueues;
  }

  /** Aborted when the front-end has gone. */
  get signal(): AbortSignal {
    return this.#session.signal;
  }

  /**
   * Memory that this device has in common with its instances in Workers, zeros
   * at first: `DeviceModule.sharedBytes` of it. By it they share what they have
   * to: what `setConfig` has set, say.
   */
  get shared(): SharedArrayBuffer {
    return this.#session.shared;
  }

  /**
   * Whether queues are served in this isolate: not by the instance that the
   * registering thread has of a target with Workers.
   */
  get servesQueues(): boolean {
    return this.#session.servesQueues;
  }

  /** Tells the user (`onError`) what went wrong. */
  report(error: Vhost2Error): void {
    this.#session.report(error);
  }

  /**
   * A view of guest memory, without a copy: shorter than `length` where the
   * region ends (or at a multiple of 2 GiB inside it), null where `address` is
   * not mapped. Every call checks; keep no address.
   *
   * With ACCESS_PLATFORM the driver's addresses are I/O virtual ones: then the
   * view ends also where the IOTLB leads elsewhere, and null says that it has
   * no translation, or none that permits the access (`translateAsync` asks the
   * front-end). Take such a view anew for each request: after the driver has
   * got its request back the memory may be something else's.
   *
   * @param address guest physical address; an IOVA with ACCESS_PLATFORM
   * @param length bytes wanted, more than 0
   * @param access what the device will do there; both unless given. It matters
   * with ACCESS_PLATFORM only.
   */
  translate(
    address: bigint,
    length: number,
    access: Access = "readWrite",
  ): Uint8Array<ArrayBuffer> | null {
    if (!isRange(address, length)) return null;
    const { memory, translations } = this.#session;
    const bytes = Math.min(Math.floor(length), Number.MAX_SAFE_INTEGER);
    const found = translations.isActive
      ? memory.iotlb.translate(address, bytes, access)
      : memory.translate("gpa", address, bytes);
    if (found === null || typeof found === "string") return null;
    const view = memory.views[found.view];
    return view === undefined
      ? null
      : view.subarray(found.offset, found.offset + found.length);
  }

  /**
   * Logs that guest memory was written, for the front-end that migrates the
   * guest: to be called after the write, and before the request that it was for
   * is used. `virtqueue/` does it for all writable parts of its requests; this
   * is for who writes elsewhere, or processes rings by himself. Costs little,
   * and does nothing, unless LOG_ALL is in `features`. Pages outside the guest
   * are ignored. (vhost-user, "Logging".)
   *
   * @param address as `translate` takes it
   * @param length bytes
   *
   * @example
   * ```ts
   * import type { Device } from "vhost2";
   * function writeByte(device: Device, address: bigint, value: number): void {
   *   const view = device.translate(address, 1);
   *   if (view === null) return;
   *   view[0] = value;
   *   device.markDirty(address, 1);
   * }
   * if (typeof writeByte !== "function") throw new Error();
   * ```
   */
  markDirty(address: bigint, length: number): void {
    if (!(length >= 1) || address !== BigInt.asUintN(64, address)) return;
    const bytes = Math.min(Math.ceil(length), Number.MAX_SAFE_INTEGER);
    const { memory, translations } = this.#session;
    if (!translations.isActive) return memory.log.mark(address, bytes);
    // The log is by guest physical addresses.
    for (let done = 0; done < bytes;) {
      const found = memory.iotlb.translate(
        address + BigInt(done),
        bytes - done,
        "write",
      );
      if (typeof found === "string") return;
      const region = memory.regions.find((one) =>
        one.viewFirst === found.regionViewFirst
      );
      if (region === undefined) return;
      memory.log.mark(
        region.gpa + BigInt(found.regionOffset),
        found.contiguous,
      );
      done += found.contiguous;
    }
  }

  /**
   * As `translate`, but asks the front-end for a translation that is missing,
   * and waits for it. May be awaited inside an op.
   *
   * Rejects with CLOSED when `queue` stops, all queues have stopped or the
   * connection ends; with MEMORY when there is no such memory, the front-end
   * has no translation or none that permits the access; with PROTOCOL when it
   * cannot be asked (BACKEND_REQ).
   *
   * @param queue for whose sake: its stop does not wait
   */
  async translateAsync(
    address: bigint,
    length: number,
    access: Access = "readWrite",
    queue?: Queue,
  ): Promise<Uint8Array<ArrayBuffer>> {
    for (;;) {
      const view = this.translate(address, length, access);
      if (view !== null) return view;
      if (
        !isRange(address, length) || !this.#session.translations.isActive
      ) {
        throw new Vhost2Error(
          "MEMORY",
          `Cannot translate ${length} bytes at 0x${
            address.toString(16)
          }: that is not guest memory`,
        );
      }
      await this.#session.whenMapped(address, access, queue);
    }
  }

  /**
   * Tells the driver that configuration space has changed; it then reads it
   * (`getConfig`). Never blocks; does nothing where the front-end cannot be
   * told. However often it is called, at most one message more is sent than the
   * front-end has read; while all queues are stopped it waits for a start.
   */
  configChanged(): void {
    this.#session.configChanged();
  }

  /**
   * Tells the front-end that other devices may ask for an object, which
   * `getSharedObject` then hands out. Rejects when it refuses, when
   * SHARED_OBJECT is not negotiated, and while all queues are stopped.
   *
   * @param uuid 16 bytes
   */
  async addSharedObject(uuid: Uint8Array): Promise<void> {
    await this.#session.requests.send(Id.BACKEND_SHARED_OBJECT_ADD, uuid);
  }

  /** Takes back what `addSharedObject` has told. Rejects as it does. */
  async removeSharedObject(uuid: Uint8Array): Promise<void> {
    await this.#session.requests.send(Id.BACKEND_SHARED_OBJECT_REMOVE, uuid);
  }

  /**
   * Asks for an object of another device: a descriptor, which the caller
   * closes, or null where there is none. Rejects when SHARED_OBJECT is not
   * negotiated, and while all queues are stopped.
   *
   * @param uuid 16 bytes
   */
  async lookUpSharedObject(uuid: Uint8Array): Promise<number | null> {
    return await this.#session.requests.lookUp(uuid);
  }

  /**
   * Has a file mapped into one of the device's shared memory regions
   * (`DeviceOptions.sharedMemory`). Rejects with OPTION when that is outside
   * the region or overlaps another mapping, with PROTOCOL when the front-end
   * refuses. A reset of the device unmaps everything.
   *
   * @param shmid id of the region
   */
  async mapShared(shmid: number, mapping: SharedMapping): Promise<void> {
    await this.#session.sharedMemory.map(shmid, mapping);
  }

  /**
   * Unmaps one whole mapping.
   *
   * @param shmid id of the region
   * @param offset bytes, as it was mapped
   * @param size bytes, as it was mapped
   */
  async unmapShared(
    shmid: number,
    offset: number,
    size: number,
  ): Promise<void> {
    await this.#session.sharedMemory.unmap(shmid, offset, size);
  }
}
