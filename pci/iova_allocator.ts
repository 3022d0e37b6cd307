/**
 * Hands out I/O addresses from the ranges that an IOMMU allows.
 *
 * @module
 */

import { GuestAllocator } from "../driver/guest_allocator.ts";
import { Vhost2Error } from "../ffi/errors.ts";

/** A range that the device can reach; `last` is inclusive. */
export interface IovaRange {
  readonly start: bigint;
  readonly last: bigint;
}

/** Above this no address is needed: offsets stay exact as numbers. */
const highest = 1n << 46n;
/** Addresses near 0 are more often a mistake than meant. */
const lowest = 1n << 20n;

export class IovaAllocator {
  readonly #ranges: { start: bigint; size: number; free: GuestAllocator }[] =
    [];
  readonly #pageSize: number;

  constructor(ranges: readonly IovaRange[], pageSize: number) {
    this.#pageSize = pageSize;
    for (const range of ranges) {
      const start = range.start < lowest ? lowest : range.start;
      const end = range.last + 1n > highest ? highest : range.last + 1n;
      if (end <= start) continue;
      const size = Number(end - start);
      this.#ranges.push({ start, size, free: new GuestAllocator(size) });
    }
  }

  /**
   * The start of `size` free bytes; the last ones where they must not be in the
   * way of `claim`. Throws MEMORY when there are none.
   */
  reserve(size: number, isLast = false): bigint {
    const ranges = isLast ? [...this.#ranges].reverse() : this.#ranges;
    for (const { start, free } of ranges) {
      const offset = isLast
        ? free.allocateLast(size, this.#pageSize)
        : free.allocate(size, this.#pageSize);
      if (offset !== null) return start + BigInt(offset);
    }
    throw new Vhost2Error(
      "MEMORY",
      `Cannot reserve ${size} bytes of I/O addresses: the IOMMU has no such range free`,
    );
  }

  release(iova: bigint, size: number): void {
    const range = this.#ranges.find(({ start, size }) =>
      iova >= start && iova < start + BigInt(size)
    );
    range?.free.free(Number(iova - range.start), size);
  }

  /**
   * Keeps addresses that somebody else has chosen from being handed out, where
   * they could be; null when some of them have been. Returns the undo.
   */
  claim(iova: bigint, size: number): (() => void) | null {
    const undos: (() => void)[] = [];
    const undo = () => undos.splice(0).forEach((one) => one());
    for (const { start, size: length, free } of this.#ranges) {
      const first = Number(iova > start ? iova - start : 0n);
      const end = iova + BigInt(size) - start;
      const last = end > BigInt(length) ? length : Number(end);
      if (last <= first) continue;
      if (!free.take(first, last - first)) {
        undo();
        return null;
      }
      undos.push(() => free.free(first, last - first));
    }
    return undo;
  }
}
