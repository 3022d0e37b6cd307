/**
 * The memory of a guest as the front-end has it: memfds made and mapped by the
 * core, one per region, which a back-end maps a second time.
 *
 * @module
 */

import { binding, core } from "../ffi/core.ts";
import { check, Vhost2Error } from "../ffi/errors.ts";
import { type Gpa, gpa, type Uva, uva } from "../protocol/address.ts";
import type { MemoryRegionDescription } from "../protocol/memory_payloads.ts";
import { GuestAllocator } from "./guest_allocator.ts";

/** Where a region is and how large. */
export interface RamRegionOptions {
  /** Bytes; need not be a multiple of the page size. */
  readonly size: number;
  /** Guest physical address; behind the region before unless given. */
  readonly gpa?: bigint;
  /**
   * What stands for the front-end's own virtual address; it need not be a real
   * one. Unless given, far from the gpa, so that a mix-up is noticed.
   */
  readonly uva?: bigint;
  /** Offset in bytes of the region in its file; 0 unless given. */
  readonly mmapOffset?: number;
}

/** Addresses of the regions that name none. */
const defaultGpa = 0n;
const uvaDistance = 0x7f00_0000_0000n;
const canDetach = typeof ArrayBuffer.prototype.transfer === "function";

/** One region: a memfd, mapped here, with its own allocator. */
export class RamRegion {
  readonly gpa: Gpa;
  readonly uva: Uva;
  /** Bytes. */
  readonly size: number;
  readonly mmapOffset: number;
  /** The memfd. */
  readonly fd: number;
  /** The region's memory; empty after `close`. */
  readonly bytes: Uint8Array<ArrayBuffer>;
  readonly allocator: GuestAllocator;
  readonly #address: bigint;
  readonly #mappedSize: number;
  #isOpen = true;

  constructor(options: Required<RamRegionOptions>) {
    this.gpa = gpa(options.gpa);
    this.uva = uva(options.uva);
    this.size = options.size;
    this.mmapOffset = options.mmapOffset;
    this.allocator = new GuestAllocator(options.size);
    this.#mappedSize = options.mmapOffset + options.size;
    if (this.#mappedSize > binding.maxViewSize) {
      throw new Vhost2Error(
        "OPTION",
        `Cannot view guest memory of ${this.#mappedSize} bytes: this runtime views at most ${binding.maxViewSize} at once`,
      );
    }
    this.fd = check(
      core.memfdCreate(this.#mappedSize),
      `Cannot make guest memory of ${this.#mappedSize} bytes`,
    );
    const address = new BigUint64Array(1);
    const mapped = core.mapShared(this.fd, this.#mappedSize, address);
    if (mapped < 0) {
      core.descriptorClose(this.fd);
      check(mapped, `Cannot map guest memory of ${this.#mappedSize} bytes`);
    }
    this.#address = address[0];
    this.bytes = new Uint8Array(
      binding.view(this.#address, this.#mappedSize),
      this.mmapOffset,
      this.size,
    );
  }

  /** Where the region begins in this process, for the core. */
  get address(): bigint {
    return this.#address + BigInt(this.mmapOffset);
  }

  /** The region as SET_MEM_TABLE and ADD_MEM_REG carry it. */
  get description(): MemoryRegionDescription {
    return {
      gpa: this.gpa,
      uva: this.uva,
      size: BigInt(this.size),
      mmapOffset: BigInt(this.mmapOffset),
      xen: null,
    };
  }

  /**
   * Makes the file `size` bytes long, counted from the region's start: what a
   * hostile front-end does to a back-end that has it mapped. Reads here answer
   * zeros from then on.
   */
  resizeFile(size: number): void {
    check(
      core.memfdResize(this.fd, this.mmapOffset + size),
      `Cannot resize guest memory to ${size} bytes`,
    );
  }

  /** Whether `length` bytes at `address` are in here. */
  contains(address: bigint, length: number): boolean {
    const offset = address - this.gpa;
    return offset >= 0n && offset + BigInt(length) <= BigInt(this.size);
  }

  /** Closes the memfd, empties all views and unmaps. */
  close(): void {
    if (!this.#isOpen) return;
    this.#isOpen = false;
    core.descriptorClose(this.fd);
    // Node 20 cannot empty views: there the mapping stays, so that a view that
    // somebody kept cannot crash the process.
    if (!canDetach) return;
    this.bytes.buffer.transfer();
    check(
      core.unmap(this.#address, this.#mappedSize),
      "Cannot unmap guest memory",
    );
  }
}

/**
 * The memory of one guest: regions and an allocator of guest addresses.
 *
 * @example
 * ```ts
 * import { GuestRam } from "vhost2/frontend";
 * const ram = new GuestRam([{ size: 1 << 20, gpa: 0x1000_0000n }]);
 * const address = ram.allocate(512);
 * ram.write(address, new Uint8Array(512).fill(7));
 * if (ram.read(address, 1)[0] !== 7) throw new Error("not what was written");
 * ram.close();
 * ```
 */
export class GuestRam {
  readonly #regions: RamRegion[] = [];

  /** @param regions at least one; addresses that are left out are chosen */
  constructor(regions: readonly RamRegionOptions[]) {
    try {
      for (const region of regions) this.addRegion(region);
    } catch (error) {
      this.close();
      throw error;
    }
  }

  /** In the order of being added. */
  get regions(): readonly RamRegion[] {
    return this.#regions;
  }

  /** Adds a region; the back-end is told by ADD_MEM_REG or SET_MEM_TABLE. */
  addRegion(options: RamRegionOptions): RamRegion {
    const last = this.#regions.at(-1);
    const address = options.gpa ??
      (last === undefined ? defaultGpa : last.gpa + BigInt(last.size));
    const region = new RamRegion({
      size: options.size,
      gpa: address,
      uva: options.uva ?? address + uvaDistance,
      mmapOffset: options.mmapOffset ?? 0,
    });
    this.#regions.push(region);
    return region;
  }

  /** Takes a region out and closes it. */
  removeRegion(region: RamRegion): void {
    const index = this.#regions.indexOf(region);
    if (index >= 0) this.#regions.splice(index, 1);
    region.close();
  }

  /** The region that holds all of the range. Throws MEMORY if none does. */
  regionOf(address: bigint, length = 1): RamRegion {
    const region = this.#regions.find((r) => r.contains(address, length));
    if (region !== undefined) return region;
    throw new Vhost2Error(
      "MEMORY",
      `Cannot reach ${length} bytes at gpa 0x${
        address.toString(16)
      }: they are not in one region`,
    );
  }

  /** Zero-copy; empty after `close`. Throws MEMORY where there is no memory. */
  bytes(address: bigint, length: number): Uint8Array<ArrayBuffer> {
    const region = this.regionOf(address, length);
    const offset = Number(address - region.gpa);
    return region.bytes.subarray(offset, offset + length);
  }

  /** The bytes of a ring's part, which must be aligned; without a copy. */
  ringPart(
    name: string,
    address: bigint,
    length: number,
    alignment: bigint,
  ): Uint8Array<ArrayBuffer> {
    if (address % alignment === 0n) return this.bytes(address, length);
    throw new Vhost2Error(
      "OPTION",
      `Cannot place the ${name} part at 0x${
        address.toString(16)
      }: it must be aligned to ${alignment} bytes`,
    );
  }

  /** A copy of `length` bytes. */
  read(address: bigint, length: number): Uint8Array<ArrayBuffer> {
    return this.bytes(address, length).slice();
  }

  write(address: bigint, data: Uint8Array): void {
    this.bytes(address, data.length).set(data);
  }

  /** The front-end's virtual address of a guest address. */
  toUva(address: bigint): Uva {
    const region = this.regionOf(address);
    return uva(region.uva + (address - region.gpa));
  }

  /**
   * Zeroed guest memory. Throws MEMORY when no region has room.
   *
   * @param size bytes
   * @param alignment bytes, a power of two; 16 unless given
   * @param region where; any region unless given
   */
  allocate(size: number, alignment = 16, region?: RamRegion): Gpa {
    const regions = region === undefined ? this.#regions : [region];
    for (const candidate of regions) {
      const offset = candidate.allocator.allocate(size || 1, alignment);
      if (offset === null) continue;
      candidate.bytes.fill(0, offset, offset + size);
      return gpa(candidate.gpa + BigInt(offset));
    }
    throw new Vhost2Error(
      "MEMORY",
      `Cannot allocate ${size} bytes of guest memory: no region has room`,
    );
  }

  /** Gives back what `allocate` returned for the same size. */
  free(address: bigint, size: number): void {
    // The region may have been removed in the meantime.
    const region = this.#regions.find((r) => r.contains(address, size));
    region?.allocator.free(Number(address - region.gpa), size || 1);
  }

  /** Closes all regions; views are empty from here on. */
  close(): void {
    for (const region of this.#regions.splice(0)) region.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
