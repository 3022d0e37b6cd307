/**
 * The VIRTIO shared memory regions of a device (SHMEM): what of them is mapped
 * from which file. The front-end does the mapping, we ask for it.
 *
 * @module
 */

import { Vhost2Error } from "../ffi/errors.ts";
import { BackendRequest as Id } from "../protocol/backend_request.ts";
import {
  MMAP_FLAG_READ_WRITE,
  SHMEM_REGION_COUNT,
  type ShmemConfig,
  type ShmemMapping,
} from "../protocol/payloads.ts";
import type { BackendRequests } from "./backend_requests.ts";

/** Bytes; regions are whole pages. */
const pageSize = 4096;

/** What is to be mapped into a shared memory region. */
export interface SharedMapping {
  /** The file; it stays the caller's and may be closed afterwards. */
  readonly fd: number;
  /** Bytes from the start of the file; 0 unless given. */
  readonly fdOffset?: number;
  /** Bytes from the start of the shared memory region. */
  readonly offset: number;
  /** Bytes. */
  readonly size: number;
  /** Whether the guest may write there; false unless given. */
  readonly isWritable?: boolean;
}

/** A range that is mapped, or about to be, or about not to be. */
interface Range {
  readonly shmid: number;
  readonly offset: number;
  readonly size: number;
  isMapped: boolean;
}

/** Why the sizes cannot be an option; null if they can. */
export function refusalOfSizes(sizes: readonly number[]): string | null {
  if (sizes.length > SHMEM_REGION_COUNT) {
    return `${sizes.length} regions (at most ${SHMEM_REGION_COUNT})`;
  }
  const wrong = sizes.find((size) =>
    !Number.isSafeInteger(size) || size < 0 || size % pageSize !== 0
  );
  return wrong === undefined
    ? null
    : `${wrong} bytes (a multiple of ${pageSize}, 0 for no region)`;
}

export class SharedMemory {
  readonly #sizes: readonly number[];
  readonly #requests: BackendRequests;
  readonly #ranges = new Set<Range>();

  /** @param sizes bytes of each region by its id; 0 where there is none */
  constructor(sizes: readonly number[], requests: BackendRequests) {
    this.#sizes = sizes;
    this.#requests = requests;
  }

  /** What GET_SHMEM_CONFIG says; it never changes. */
  get config(): ShmemConfig {
    const sizes = Array.from(
      { length: SHMEM_REGION_COUNT },
      (_, shmid) => BigInt(this.#sizes[shmid] ?? 0),
    );
    return { regionCount: sizes.filter((size) => size > 0n).length, sizes };
  }

  /** SHMEM_MAP; the range is taken from here on, until it turns out not so. */
  async map(shmid: number, mapping: SharedMapping): Promise<void> {
    const { fd, fdOffset = 0, offset, size, isWritable = false } = mapping;
    const what = `${size} bytes at ${offset} of shared memory ${shmid}`;
    const refuse = (reason: string) =>
      new Vhost2Error("OPTION", `Cannot map ${what}: ${reason}`);
    if (
      ![fdOffset, offset, size].every((n) => Number.isSafeInteger(n) && n >= 0)
    ) throw refuse("offsets and sizes are whole numbers from 0");
    const limit = this.#sizes[shmid] ?? 0;
    if (size === 0 || offset + size > limit) {
      throw refuse(`the region has ${limit} bytes`);
    }
    for (const other of this.#ranges) {
      if (
        other.shmid === shmid && offset < other.offset + other.size &&
        other.offset < offset + size
      ) throw refuse(`${other.size} bytes at ${other.offset} are mapped`);
    }
    const range: Range = { shmid, offset, size, isMapped: false };
    this.#ranges.add(range);
    try {
      const flags = isWritable ? MMAP_FLAG_READ_WRITE : 0n;
      const message = describe(range, fdOffset, flags);
      await this.#requests.send(Id.BACKEND_SHMEM_MAP, message, [fd]);
      range.isMapped = true;
    } catch (error) {
      this.#ranges.delete(range);
      throw error;
    }
  }

  /** SHMEM_UNMAP of one whole mapping, as it was made. */
  async unmap(shmid: number, offset: number, size: number): Promise<void> {
    const range = [...this.#ranges].find((range) =>
      range.isMapped && range.shmid === shmid && range.offset === offset &&
      range.size === size
    );
    if (range === undefined) {
      throw new Vhost2Error(
        "OPTION",
        `Cannot unmap ${size} bytes at ${offset} of shared memory ${shmid}: that is no whole mapping`,
      );
    }
    range.isMapped = false;
    try {
      const message = describe(range, 0, 0n);
      await this.#requests.send(Id.BACKEND_SHMEM_UNMAP, message);
      this.#ranges.delete(range);
    } catch (error) {
      range.isMapped = true;
      throw error;
    }
  }

  /** The device was reset: the front-end has unmapped everything. */
  forget(): void {
    this.#ranges.clear();
  }
}

function describe(
  { shmid, offset, size }: Range,
  fdOffset: number,
  flags: bigint,
): ShmemMapping {
  return {
    shmid,
    fdOffset: BigInt(fdOffset),
    shmOffset: BigInt(offset),
    size: BigInt(size),
    flags,
  };
}
