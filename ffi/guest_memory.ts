/**
 * Guest memory: a device's regions, mapped by the core, and the views over
 * them.
 *
 * A region is mapped once and is one external `ArrayBuffer`. Hot paths address
 * it by (view, offset): a view is a window of at most 2 GiB, so that an offset
 * is a small integer. When a region goes away its buffer is detached, which
 * empties every view that anybody kept, and is unmapped only then; where a
 * runtime cannot detach (Node 20) the core puts zero pages in its place and
 * never uses the addresses again.
 *
 * @module
 */

import { constants, layouts } from "./abi.gen.ts";
import { binding, core } from "./core.ts";
import { DirtyLog } from "./dirty_log.ts";
import { check, Errno, errnoName, Vhost2Error } from "./errors.ts";
import { eventLoop } from "./event_loop.ts";
import { Iotlb } from "./iotlb.ts";
import {
  readTranslation,
  type Translation,
  translationOut,
} from "./translation.ts";

/** One region as the front-end describes it. */
export interface RegionDescription {
  readonly gpa: bigint;
  readonly uva: bigint;
  /** Bytes. */
  readonly size: bigint;
  readonly mmapOffset: bigint;
  /** Where it comes from: a file, or memory that is mapped already (a BAR). */
  readonly source: { fd: number } | { address: bigint };
}

/** One region of the published table. */
export interface MappedRegion {
  readonly gpa: bigint;
  readonly uva: bigint;
  /** Bytes. */
  readonly size: number;
  /** Number of the region's first view. */
  readonly viewFirst: number;
  /** Of its first byte in this process: what postcopy tells the front-end. */
  readonly address: bigint;
  /** The region's buffers: one, or several of `maxViewSize` (Node 20). */
  readonly buffers: readonly ArrayBuffer[];
}

/** What a change of the table does to the regions that exist. */
export interface PreparedChange {
  readonly kept: number;
  readonly added: number;
  readonly removed: number;
}

export type { Translation };
/** An iova is translated by the IOTLB. */
export type AddressSpace = "gpa" | "uva" | "iova";
export type MemoryState = "ok" | "faulted" | "revoked" | "starved";

const spaces = { gpa: constants.spaceGpa, uva: constants.spaceUva };
const kinds = {
  replace: constants.prepareReplace,
  add: constants.prepareAdd,
  remove: constants.prepareRemove,
};

const canDetach = typeof ArrayBuffer.prototype.transfer === "function";
const canViewLarge = binding.maxViewSize > constants.viewSize * 2;

const prepareResult = new DataView(
  new ArrayBuffer(layouts.PrepareResult.byteSize),
);
const translation = translationOut();

/** Why a table was refused, as one clause. */
function refusal(region: RegionDescription | undefined): string {
  const field = layouts.PrepareResult;
  const value = prepareResult.getBigUint64(field.value, true);
  const limit = prepareResult.getBigUint64(field.limit, true);
  const size = region?.size ?? 0n;
  switch (prepareResult.getUint32(field.reason, true)) {
    case constants.refuseSizeZero:
      return "its size is 0";
    case constants.refuseAddressWraps:
      return `gpa 0x${region?.gpa.toString(16)} or uva 0x${
        region?.uva.toString(16)
      } with size ${size} passes the end of the address space`;
    case constants.refuseFileOffsetWraps:
      return `file offset ${region?.mmapOffset} with size ${size} passes 2^64`;
    case constants.refuseFileTooSmall:
      return `its file holds ${value} bytes, the region needs ${limit}`;
    case constants.refuseFileKind:
      return "its descriptor is neither shared memory nor a file that can safely be mapped";
    case constants.refuseOverlapGpa:
      return "its guest addresses overlap another region's";
    case constants.refuseOverlapUva:
      return "its front-end addresses overlap another region's";
    case constants.refuseTooMany:
      return `the table would pass ${limit} regions`;
    case constants.refuseNotFound:
      return "there is no such region";
    case constants.refuseMmap:
      return `mmap failed with ${errnoName(Number(value))}`;
    case constants.refuseQuarantine:
      return `${value} bytes of old mappings are in quarantine (limit ${limit}; Node 22 or Deno need none)`;
    case constants.refuseMappings:
      return "this process holds too many mappings";
    case constants.refuseAddress:
      return `nothing is mapped at 0x${value.toString(16)}`;
    case constants.refuseUserfault:
      return `its pages cannot be watched for postcopy (${
        errnoName(Number(value))
      }): only memfd, tmpfs and hugetlbfs can be`;
    default:
      return "the core refused it";
  }
}

/** Who has to know which regions there are, such as a device's IOMMU. */
export interface RegionWatcher {
  /** A region is in the table. Throwing takes it out again. */
  added(region: MappedRegion): void;
  /** It has left the table, and is about to be unmapped. */
  removing(region: MappedRegion): void;
}

/** A memory as other isolates attach to it: structured-cloneable. */
export interface SharedMemoryHandle {
  readonly handle: number;
  readonly version: SharedArrayBuffer;
}

/**
 * The memory of one device. One isolate keeps its table; others may attach to
 * it, with views of their own, while the first counts them as holders.
 */
export class GuestMemory {
  /** The core's handle. */
  readonly handle: number;
  /** What is written is logged here for a front-end that migrates. */
  readonly log: DirtyLog;
  /** Translations of IOVAs. */
  readonly iotlb: Iotlb;
  /** Windows by view number; a hole where no region is. */
  readonly views: (Uint8Array<ArrayBuffer> | undefined)[] = [];
  /** The same windows for reading wider fields. */
  readonly dataViews: (DataView | undefined)[] = [];
  #regions: readonly MappedRegion[] = Object.freeze([]);
  readonly #stopWatching: () => void;
  #isClosed = false;
  /**
   * Called once when the memory is taken away under the device: a file became
   * shorter, or a page that this isolate waited for did not come.
   */
  onFault: ((state: "faulted" | "starved") => void) | undefined;
  /** Told of regions in the isolate that keeps the table. */
  watcher: RegionWatcher | undefined;
  /** Changes before the table does, and again after. */
  readonly #version: Int32Array;
  #seenVersion = 0;
  /** Isolates that have views of their own. */
  readonly holders = new Set<unknown>();

  /** @param shared that of another isolate, to attach to */
  constructor(shared?: SharedMemoryHandle) {
    this.#version = new Int32Array(
      shared?.version ?? new SharedArrayBuffer(4),
    );
    if (shared !== undefined) {
      this.handle = shared.handle;
      this.log = new DirtyLog(this.handle);
      this.iotlb = new Iotlb(this.handle);
      this.#stopWatching = () => {};
      this.#isClosed = true;
      return;
    }
    this.handle = check(
      core.memoryCreate(eventLoop.handle),
      "Cannot make a guest memory",
    );
    this.log = new DirtyLog(this.handle);
    this.iotlb = new Iotlb(this.handle);
    this.#stopWatching = eventLoop.onFault(() => {
      const { state } = this;
      if (state !== "faulted" && state !== "starved") return;
      const handler = this.onFault;
      this.onFault = undefined;
      handler?.(state);
    });
  }

  /** For an isolate that is to attach to this memory. */
  get shared(): SharedMemoryHandle {
    const version = this.#version.buffer as SharedArrayBuffer;
    return { handle: this.handle, version };
  }

  /**
   * In an isolate that is attached: makes views of what was added since. To be
   * called after each pop, which sees a new table at once. In the isolate that
   * keeps the table there is never anything to do.
   */
  refresh(): void {
    const version = Atomics.load(this.#version, 0);
    if (version === this.#seenVersion || this.#isClosed) return;
    this.#list(new Map(this.#regions.map((r) => [r.viewFirst, r])));
    this.#seenVersion = version;
  }

  /** In an isolate that is attached and counted as a holder: makes views. */
  attach(): void {
    this.#isClosed = false;
    this.#seenVersion = -1;
    this.refresh();
  }

  /**
   * In an isolate that is attached: empties all its views, before the memory
   * may change. False where the runtime cannot (Node 20).
   */
  detach(): boolean {
    let isDetached = true;
    for (const region of this.#regions) {
      isDetached = this.#empty(region) && isDetached;
    }
    this.#regions = Object.freeze([]);
    this.#isClosed = true;
    return isDetached;
  }

  /** The published regions, in gpa order; a new frozen list at each change. */
  get regions(): readonly MappedRegion[] {
    this.refresh();
    return this.#regions;
  }

  get state(): MemoryState {
    if (this.#isClosed) return "revoked";
    switch (core.memoryState(this.handle)) {
      case constants.memoryOk:
        return "ok";
      case constants.memoryFaulted:
        return "faulted";
      case constants.memoryStarved:
        return "starved";
      default:
        return "revoked";
    }
  }

  /**
   * Stages a new table: maps what is new, keeps what is the same. Nothing
   * changes for anybody until `commit`. Throws PROTOCOL with the reason; the
   * old table is then untouched.
   */
  prepare(
    kind: "replace" | "add" | "remove",
    regions: readonly RegionDescription[],
  ): PreparedChange {
    const field = layouts.RegionRequest;
    const requests = new DataView(
      new ArrayBuffer(Math.max(1, regions.length) * field.byteSize),
    );
    regions.forEach((region, index) => {
      const at = index * field.byteSize;
      requests.setBigUint64(at + field.gpa, region.gpa, true);
      requests.setBigUint64(at + field.uva, region.uva, true);
      requests.setBigUint64(at + field.size, region.size, true);
      requests.setBigUint64(at + field.mmapOffset, region.mmapOffset, true);
      if ("fd" in region.source) {
        requests.setInt32(at + field.fd, region.source.fd, true);
      } else {
        requests.setBigUint64(at + field.address, region.source.address, true);
        requests.setUint32(
          at + field.flags,
          constants.flagRegionAddress,
          true,
        );
      }
    });
    const result = core.memoryPrepare(
      this.handle,
      kinds[kind],
      requests,
      regions.length,
      prepareResult,
    );
    const out = layouts.PrepareResult;
    if (result < 0) {
      const index = prepareResult.getUint32(out.region, true);
      throw new Vhost2Error(
        "PROTOCOL",
        `Cannot ${
          kind === "remove" ? "remove" : "map"
        } memory region ${index}: ${refusal(regions[index])}`,
        { errno: -result },
      );
    }
    return {
      kept: prepareResult.getUint32(out.kept, true),
      added: prepareResult.getUint32(out.added, true),
      removed: prepareResult.getUint32(out.removed, true),
    };
  }

  /** Drops what `prepare` staged. */
  abort(): void {
    core.memoryAbort(this.handle);
  }

  /**
   * Publishes what `prepare` staged and lets go of the regions that are no
   * longer in it; their views are empty from here on. Throws what the watcher
   * throws; the region for which it does is then not there.
   */
  commit(): void {
    const retired = new Uint32Array(constants.maxRegions);
    // Twice: who lists the regions in between lists them again.
    Atomics.add(this.#version, 0, 1);
    const count = check(
      core.memoryCommit(this.handle, retired, retired.length),
      "Cannot publish the memory table",
    );
    this.#seenVersion = Atomics.add(this.#version, 0, 1) + 1;
    const old = new Map(this.#regions.map((r) => [r.viewFirst, r]));
    for (const viewFirst of retired.subarray(0, count)) {
      const region = old.get(viewFirst);
      if (region !== undefined) this.watcher?.removing(region);
      this.#release(viewFirst, region);
      old.delete(viewFirst);
    }
    this.#list(old);
    if (this.watcher !== undefined) this.#tellOfAdded(this.watcher, old);
  }

  #tellOfAdded(watcher: RegionWatcher, old: Map<number, MappedRegion>): void {
    for (const region of this.#regions) {
      if (old.has(region.viewFirst)) continue;
      try {
        watcher.added(region);
      } catch (error) {
        // Those after it are not there either: nobody was told of them.
        const rest = this.#regions.slice(this.#regions.indexOf(region))
          .filter(({ viewFirst }) => !old.has(viewFirst));
        this.prepare(
          "remove",
          rest.map(({ gpa, uva, size }) => ({
            gpa,
            uva,
            size: BigInt(size),
            mmapOffset: 0n,
            source: { fd: -1 },
          })),
        );
        this.commit();
        throw error;
      }
    }
  }

  /** Takes over the published table; of `old` what is still there. */
  #list(old: Map<number, MappedRegion>): void {
    const info = layouts.RegionInfo;
    const table = new DataView(
      new ArrayBuffer(constants.maxRegions * info.byteSize),
    );
    const total = check(
      core.memoryRegions(this.handle, table, constants.maxRegions),
      "Cannot list the memory regions",
    );
    const regions: MappedRegion[] = [];
    for (let at = 0; at < total * info.byteSize; at += info.byteSize) {
      const viewFirst = table.getUint32(at + info.viewFirst, true);
      const existing = old.get(viewFirst);
      regions.push(existing ?? this.#adopt(table, at));
    }
    this.#regions = Object.freeze(regions);
  }

  #adopt(table: DataView, at: number): MappedRegion {
    const info = layouts.RegionInfo;
    const size = Number(table.getBigUint64(at + info.size, true));
    const address = table.getBigUint64(at + info.address, true);
    const viewFirst = table.getUint32(at + info.viewFirst, true);
    // A whole number of windows to a buffer, so that no window crosses two.
    const bufferSize = canViewLarge ? size : constants.viewSize;
    const buffers: ArrayBuffer[] = [];
    for (let start = 0; start < size; start += bufferSize) {
      const buffer = binding.view(
        address + BigInt(start),
        Math.min(bufferSize, size - start),
      );
      buffers.push(buffer);
      for (let o = 0; o < buffer.byteLength; o += constants.viewSize) {
        const length = Math.min(constants.viewSize, buffer.byteLength - o);
        const view = viewFirst + (start + o) / constants.viewSize;
        this.views[view] = new Uint8Array(buffer, o, length);
        this.dataViews[view] = new DataView(buffer, o, length);
      }
    }
    return Object.freeze({
      gpa: table.getBigUint64(at + info.gpa, true),
      uva: table.getBigUint64(at + info.uva, true),
      size,
      viewFirst,
      address,
      buffers: Object.freeze(buffers),
    });
  }

  #release(viewFirst: number, region: MappedRegion | undefined): void {
    const isDetached = region === undefined ? canDetach : this.#empty(region);
    // An isolate that could not be made to let go still has its views: zero
    // pages stay there.
    const isGone = isDetached && this.holders.size === 0;
    core.memoryRelease(this.handle, viewFirst, isGone ? 1 : 0);
  }

  /** Empties this isolate's views of a region; false where it cannot. */
  #empty({ viewFirst, size, buffers }: MappedRegion): boolean {
    const end = viewFirst + Math.ceil(size / constants.viewSize);
    for (let view = viewFirst; view < end; view++) {
      this.views[view] = undefined;
      this.dataViews[view] = undefined;
    }
    let isDetached = canDetach;
    for (const buffer of buffers) isDetached = detach(buffer) && isDetached;
    return isDetached;
  }

  /** Where an address is, or null when it is not mapped. */
  translate(
    space: Exclude<AddressSpace, "iova">,
    address: bigint,
    length: number,
  ): Translation | null {
    if (this.#isClosed) return null;
    this.refresh();
    const result = core.memoryTranslate(
      this.handle,
      spaces[space],
      BigInt.asUintN(64, address),
      BigInt(length),
      translation,
    );
    if (result < 0) {
      if (result === -Errno.EFAULT) return null;
      check(result, `Cannot translate address 0x${address.toString(16)}`);
    }
    return readTranslation(translation);
  }

  /**
   * A view of `length` bytes at `address` when they are whole in one region
   * and one buffer; null otherwise.
   */
  whole(
    space: Exclude<AddressSpace, "iova">,
    address: bigint,
    length: number,
  ): Uint8Array<ArrayBuffer> | null {
    const found = this.translate(space, address, length);
    if (found === null || found.contiguous < length) return null;
    return this.viewOf(found, length);
  }

  /**
   * `length` bytes from where a translation begins, which its region has; null
   * when they are not in one buffer.
   */
  viewOf(
    found: Translation,
    length: number,
  ): Uint8Array<ArrayBuffer> | null {
    const region = this.#regions.find((r) =>
      r.viewFirst === found.regionViewFirst
    );
    if (region === undefined) return null;
    const bufferSize = region.buffers.length === 1
      ? region.size
      : constants.viewSize;
    const index = Math.floor(found.regionOffset / bufferSize);
    const offset = found.regionOffset - index * bufferSize;
    const buffer = region.buffers[index];
    if (offset + length > buffer.byteLength) return null;
    return new Uint8Array(buffer, offset, length);
  }

  /**
   * Postcopy: regions that come from here on have their missing pages filled
   * by whoever reads the userfaultfd `fd`, which becomes the memory's. When
   * `hangupFd`, the front-end's socket, hangs up, the memory is revoked; it
   * starves when this isolate has slept for `timeoutMs` (up to 2^32 - 1).
   * Throws when there are regions already.
   */
  listenForPostcopy(fd: number, hangupFd: number, timeoutMs: number): void {
    check(
      core.postcopyListen(this.handle, fd, hangupFd, timeoutMs),
      "Cannot watch the memory for missing pages",
    );
  }

  /**
   * All pages are there; or, with `isGone`, they will never be: then the
   * memory is revoked, and nobody sleeps in it any more.
   */
  endPostcopy(isGone: boolean): void {
    if (!this.#isClosed) core.postcopyEnd(this.handle, isGone ? 1 : 0);
  }

  /** Puts zero pages in the place of all memory: a last resort. */
  revoke(): void {
    if (!this.#isClosed) core.memoryRevoke(this.handle);
  }

  /** Lets go of all regions. Nobody may use the memory any more. */
  close(): void {
    if (this.#isClosed) return;
    this.#stopWatching();
    this.onFault = undefined;
    this.endPostcopy(true);
    core.memoryAbort(this.handle);
    this.prepare("replace", []);
    this.commit();
    this.#isClosed = true;
    check(core.memoryDestroy(this.handle), "Cannot close a guest memory");
  }
}

/** Empties all views of a buffer that is not ours; true when that worked. */
function detach(buffer: ArrayBuffer): boolean {
  if (!canDetach) return false;
  try {
    buffer.transfer();
    return true;
  } catch {
    return false;
  }
}
