/**
 * An IOMMU between a device and the guest's memory (ACCESS_PLATFORM): the
 * driver maps what the device may reach, and the front-end tells the back-end
 * page by page, as it asks.
 *
 * @module
 */

import { Vhost2Error } from "../ffi/errors.ts";
import { type Access, permissionOf } from "../ffi/iotlb.ts";
import {
  formatAddress,
  type Gpa,
  gpa,
  type Iova,
  iova,
  uva,
} from "../protocol/address.ts";
import { FrontendRequest as Request } from "../protocol/frontend_request.ts";
import { type IotlbMessage, IotlbType } from "../protocol/payloads.ts";
import type { FrontendConnection } from "./connection.ts";
import type { GuestRam } from "../driver/guest_ram.ts";
import type { AddressMap } from "../driver/queue_driver.ts";

/** How an IOMMU maps. */
export interface IommuOptions {
  /**
   * `strict` maps each buffer for one request, at addresses that are used
   * again: the device can reach nothing else. `passthrough` maps all memory
   * for good. Strict unless given.
   */
  readonly mode?: "strict" | "passthrough";
  /** Bytes of a page; 4096 unless given. */
  readonly pageSize?: number;
  /** The first address given out; far from the guest's unless given. */
  readonly firstIova?: bigint;
}

/** Where a page of IOVAs leads. */
export interface IommuPage {
  readonly gpa: Gpa;
  /** 1 read, 2 write, 3 both. */
  readonly permission: number;
}

const defaultFirstIova = 0xff_0000_0000n;

/** The IOMMU of one device. */
export class Iommu implements AddressMap {
  readonly ram: GuestRam;
  readonly mode: "strict" | "passthrough";
  readonly pageSize: number;
  /** Misses that the back-end has sent. */
  misses = 0;
  /** What the back-end says that it could not access (access-fail). */
  readonly failures: IotlbMessage[] = [];
  /**
   * Asked before a miss is answered; a bigint is the answer instead (the u64
   * of its ack), for tests that answer later or not at all.
   */
  onMiss:
    | ((miss: IotlbMessage) => bigint | void | Promise<bigint | void>)
    | undefined;
  readonly #pages = new Map<bigint, IommuPage>();
  /** Ranges to use again, by their number of pages. */
  readonly #free = new Map<number, bigint[]>();
  readonly #firstIova: bigint;
  #nextIova: bigint;
  #connection: FrontendConnection | undefined;
  /** Targets are gpas (GPA_ADDRESSES). */
  #isGpa = false;

  constructor(ram: GuestRam, options: IommuOptions = {}) {
    this.ram = ram;
    this.mode = options.mode ?? "strict";
    this.pageSize = options.pageSize ?? 4096;
    this.#firstIova = options.firstIova ?? defaultFirstIova;
    this.#nextIova = this.#firstIova;
  }

  /** Whose back-end is told; for `VhostUserDevice`. */
  connect(connection: FrontendConnection, options: { isGpa: boolean }): void {
    this.#connection = connection;
    this.#isGpa = options.isGpa;
  }

  /** Lets the device reach `length` bytes of guest memory, by what returns. */
  map(address: bigint, length: number, access: Access = "readWrite"): Iova {
    if (this.mode === "passthrough") return iova(this.#firstIova + address);
    const { first, count } = this.#span(address, length);
    const start = this.#free.get(count)?.pop() ?? this.#nextIova;
    const size = BigInt(this.pageSize);
    if (start === this.#nextIova) this.#nextIova += BigInt(count) * size;
    this.mapAt(start, first, count * this.pageSize, access);
    return iova(start + (address - first));
  }

  /** Maps whole pages to where one likes, or changes where they lead. */
  mapAt(
    start: bigint,
    address: bigint,
    length: number,
    access: Access = "readWrite",
  ): void {
    const size = BigInt(this.pageSize);
    if (start % size !== 0n || address % size !== 0n) {
      throw new Vhost2Error(
        "OPTION",
        `Cannot map ${formatAddress(start)} to ${
          formatAddress(address)
        }: both must be multiples of ${this.pageSize}`,
      );
    }
    for (let at = 0n; at < length; at += size) {
      this.#pages.set(start + at, {
        gpa: gpa(address + at),
        permission: permissionOf(access),
      });
    }
  }

  /**
   * Takes back what `map` returned for the same length. Fulfilled when the
   * device cannot reach it any more.
   */
  async unmap(address: bigint, length: number): Promise<void> {
    if (this.mode === "passthrough") return;
    const { first, count } = this.#span(address, length);
    await this.unmapAt(first, count * this.pageSize);
    let free = this.#free.get(count);
    if (free === undefined) this.#free.set(count, free = []);
    free.push(first);
  }

  /** Takes whole pages away, and has the back-end forget them. */
  async unmapAt(start: bigint, length: number): Promise<void> {
    this.drop(start, length);
    await this.invalidate(start, BigInt(length));
  }

  /** Takes whole pages away; the back-end is not told. */
  drop(start: bigint, length: number): void {
    for (let at = 0; at < length; at += this.pageSize) {
      this.#pages.delete(start + BigInt(at));
    }
  }

  /** Has the back-end forget a range, whatever is mapped. */
  async invalidate(start: bigint, size: bigint): Promise<void> {
    await this.#tell({
      iova: iova(start),
      size,
      uva: uva(0n),
      permission: 0,
      type: IotlbType.INVALIDATE,
    });
  }

  /** Tells the back-end of a mapped page; false when it is not mapped. */
  async update(address: bigint): Promise<boolean> {
    const start = address - address % BigInt(this.pageSize);
    const page = this.lookUp(address);
    if (page === null) return false;
    await this.#tell({
      iova: iova(start),
      size: BigInt(this.pageSize),
      uva: this.#isGpa ? uva(page.gpa) : this.ram.toUva(page.gpa),
      permission: page.permission,
      type: IotlbType.UPDATE,
    });
    return true;
  }

  /** Where an address leads; null when it is not mapped. */
  lookUp(address: bigint): IommuPage | null {
    const start = address - address % BigInt(this.pageSize);
    if (this.mode === "strict") return this.#pages.get(start) ?? null;
    const target = start - this.#firstIova;
    const isThere = this.ram.regions.some((one) => one.contains(target, 1));
    return isThere
      ? { gpa: gpa(target), permission: permissionOf("readWrite") }
      : null;
  }

  /** Answers BACKEND_IOTLB_MSG: the u64 of its ack. */
  async answer(message: IotlbMessage): Promise<bigint> {
    if (message.type === IotlbType.ACCESS_FAIL) {
      this.failures.push(message);
      return 0n;
    }
    if (message.type !== IotlbType.MISS) return 1n;
    this.misses++;
    const answer = await this.onMiss?.(message);
    if (answer !== undefined) return answer;
    const page = this.lookUp(message.iova);
    // As a real one: a fault, and nothing is sent.
    if (page === null || (message.permission & ~page.permission) !== 0) {
      return 1n;
    }
    return await this.update(message.iova) ? 0n : 1n;
  }

  async #tell(message: IotlbMessage): Promise<void> {
    const connection = this.#connection;
    if (connection === undefined || !connection.isOpen) return;
    const refusal = await connection.exchange(Request.IOTLB_MSG, message);
    if (refusal === 0n) return;
    throw new Vhost2Error(
      "PROTOCOL",
      `Cannot change the back-end's IOTLB at ${
        formatAddress(message.iova)
      }: it answers ${refusal}`,
    );
  }

  /** The pages that a range touches. */
  #span(address: bigint, length: number): { first: bigint; count: number } {
    const size = BigInt(this.pageSize);
    const first = address - address % size;
    const end = address + BigInt(Math.max(1, length));
    return { first, count: Number((end - first + size - 1n) / size) };
  }
}
