/**
 * The kernel's IOTLB as the session's memory: what the kernel's driver can name
 * by an IOVA becomes a region whose guest and user addresses are those IOVAs.
 * The kernel tells when entries change (UPDATE_IOTLB), and then which there
 * are, so that nothing has to be asked for while a queue runs.
 *
 * - With `virtio_vdpa` all entries lead into memory of the kernel's own, which
 *   is one window: its rings, and the bounce buffer, whose entry comes with the
 *   first request. Pages that nobody uses are not there.
 * - With `vhost_vdpa` they are files of the process behind it (QEMU's memory).
 *   What the guest may not both read and write is left out, as vhost-user
 *   front-ends leave out ROM.
 *
 * @module
 */

import { constants } from "../../ffi/abi.gen.ts";
import { binding, core } from "../../ffi/core.ts";
import { check, Vhost2Error } from "../../ffi/errors.ts";
import { formatAddress, gpa, uva } from "../../protocol/address.ts";
import { FrontendRequest } from "../../protocol/frontend_request.ts";
import type { MemoryRegionDescription } from "../../protocol/memory_payloads.ts";
import type { VduseConnection } from "./connection.ts";
import type { VduseDevice, VduseEntry } from "./kernel.ts";

const lastAddress = (1n << 64n) - 1n;
/** Linux: 1 GiB for bounce buffers at most, and 128 MiB for rings. */
const windowSize = 0x4800_0000;
const readWrite = constants.accessRead | constants.accessWrite;

type Region = MemoryRegionDescription;

function regionOf(start: bigint, size: bigint, offset: bigint): Region {
  return {
    gpa: gpa(start),
    uva: uva(start),
    size,
    mmapOffset: offset,
    xen: null,
  };
}

export class AddressSpace {
  readonly #connection: VduseConnection;
  /** What the session has, by what it is made of. */
  readonly #regions = new Map<string, Region>();

  constructor(connection: VduseConnection) {
    this.#connection = connection;
  }

  /** Throws for a kernel's IOTLB that `update` would refuse. */
  check(device: VduseDevice): void {
    const entries = this.#list(device);
    try {
      for (const entry of entries) this.#keyOf(entry);
    } finally {
      for (const { fd } of entries) core.descriptorClose(fd);
    }
  }

  /** Makes the session's memory what the kernel's IOTLB says now. */
  async update(device: VduseDevice): Promise<void> {
    const entries = this.#list(device);
    try {
      const wanted = new Map<string, VduseEntry>();
      for (const entry of entries) {
        const key = this.#keyOf(entry);
        if (key !== null && !wanted.has(key)) wanted.set(key, entry);
      }
      // First: a place may be somebody else's now.
      for (const [key, region] of [...this.#regions]) {
        if (wanted.has(key)) continue;
        this.#regions.delete(key);
        await this.#connection.ask(FrontendRequest.REM_MEM_REG, region);
      }
      for (const [key, entry] of wanted) {
        if (this.#regions.has(key)) continue;
        const region = entry.isDomain
          ? await this.#addWindow(device, entry)
          : await this.#addFile(entry);
        this.#regions.set(key, region);
      }
    } finally {
      for (const { fd } of entries) core.descriptorClose(fd);
    }
  }

  /** The driver has let go of everything: what it maps next is new memory. */
  async clear(): Promise<void> {
    this.#regions.clear();
    await this.#connection.ask(FrontendRequest.SET_MEM_TABLE, []);
  }

  #list(device: VduseDevice): VduseEntry[] {
    const entries: VduseEntry[] = [];
    try {
      for (let next = 0n; next <= lastAddress;) {
        const entry = device.entry(next, lastAddress);
        if (entry === null) break;
        entries.push(entry);
        const { start, last } = entry;
        if (start > last || start < next) throw misfit(entry, "it is no range");
        if (entries.length > constants.maxRegions) {
          throw misfit(entry, `${constants.maxRegions} are taken at most`);
        }
        next = last + 1n;
      }
      return entries;
    } catch (error) {
      for (const { fd } of entries) core.descriptorClose(fd);
      throw error;
    }
  }

  /** Entries with the same key are one region; null for none. */
  #keyOf(entry: VduseEntry): string | null {
    const { start, last, offset, access, isDomain, fd } = entry;
    if (isDomain) {
      if (offset !== start || last >= windowSize) {
        throw misfit(entry, "it is outside the kernel's own window");
      }
      return "window";
    }
    if (access !== readWrite) return null;
    if (offset + last - start >= BigInt(Math.max(core.fileSize(fd), 0))) {
      throw misfit(entry, "its file is shorter");
    }
    return `${start} ${last} ${offset} ${core.descriptorInode(fd)}`;
  }

  async #addWindow(device: VduseDevice, { fd }: VduseEntry): Promise<Region> {
    const address = device.map(fd, 0n, windowSize);
    const region = regionOf(0n, BigInt(windowSize), 0n);
    try {
      const source = { address };
      await this.#connection.ask(FrontendRequest.ADD_MEM_REG, region, {
        source,
      });
    } finally {
      // The session's memory keeps it.
      core.unmap(address, windowSize);
    }
    return region;
  }

  async #addFile(entry: VduseEntry): Promise<Region> {
    const { start, last, offset, fd } = entry;
    const own = core.descriptorDuplicate(fd);
    if (own < 0) throw misfit(entry, "no descriptor is free");
    const region = regionOf(start, last - start + 1n, offset);
    const fds = [own];
    await this.#connection.ask(FrontendRequest.ADD_MEM_REG, region, { fds });
    return region;
  }
}

/**
 * The index of a split ring's used area at an IOVA: how far a device is that
 * uses requests in their order and has none in flight.
 */
export function usedIndexAt(device: VduseDevice, used: bigint): number {
  const entry = device.entry(used, used);
  if (entry === null) {
    throw new Vhost2Error(
      "MEMORY",
      `Cannot read the ring at ${formatAddress(used)}: it is not mapped`,
    );
  }
  const { fd, isDomain } = entry;
  try {
    // idx: the second u16.
    const at = entry.offset + (used - entry.start) + 2n;
    const page = at & ~4095n;
    const size = isDomain ? 4096 : Number(at + 2n);
    const address = isDomain ? device.map(fd, page, size) : mapFile(fd, size);
    try {
      const offset = isDomain ? at - page : at;
      return new DataView(binding.view(address + offset, 2)).getUint16(0, true);
    } finally {
      core.unmap(address, size);
    }
  } finally {
    core.descriptorClose(fd);
  }
}

function mapFile(fd: number, size: number): bigint {
  const address = new BigUint64Array(1);
  check(core.mapShared(fd, size, address), "Cannot map a ring");
  return address[0];
}

function misfit({ start, last }: VduseEntry, reason: string): Vhost2Error {
  return new Vhost2Error(
    "PROTOCOL",
    `Cannot use the kernel's IOTLB entry ${formatAddress(start)} to ${
      formatAddress(last)
    }: ${reason}`,
  );
}
