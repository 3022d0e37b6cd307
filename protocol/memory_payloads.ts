/**
 * Memory region payloads: SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG. A region
 * takes 32 bytes, or 40 once XEN_MMAP is negotiated.
 */

import type { Gpa, Uva } from "./address.ts";
import { MAX_TABLE_REGIONS } from "./message.ts";
import {
  type Codec,
  flags32,
  gpaField,
  struct,
  type StructCodec,
  u32,
  u64,
  uvaField,
  viewOf,
  type WireContext,
  wrongSize,
} from "./layout.ts";

/** Flags of a Xen mapping. */
export const XenMmapFlag = {
  FOREIGN: 0x1,
  GRANT: 0x2,
  NO_ADVANCE_MAP: 0x100,
} as const;

/** "Memory region description". */
export interface MemoryRegionDescription {
  readonly gpa: Gpa;
  /** Bytes; not checked: zero, wrapping and huge sizes arrive here. */
  readonly size: bigint;
  readonly uva: Uva;
  /** Bytes from the start of the descriptor's file. */
  readonly mmapOffset: bigint;
  /** Null unless XEN_MMAP is negotiated. */
  readonly xen: { readonly flags: number; readonly domid: number } | null;
}

type PlainRegion = Omit<MemoryRegionDescription, "xen">;

const plainFields = {
  gpa: gpaField("guest address"),
  size: u64("size"),
  uva: uvaField("user address"),
  mmapOffset: u64("mmap offset"),
};

/** struct VhostUserMemoryRegion. */
export const memoryRegion: StructCodec<PlainRegion> = struct<PlainRegion>(
  "memory region",
  32,
  plainFields,
);

/** The same with the two fields of XEN_MMAP. */
export const xenMemoryRegion: StructCodec<
  PlainRegion & { xenFlags: number; domid: number }
> = struct("xen memory region", 40, {
  ...plainFields,
  xenFlags: flags32("xen mmap flags"),
  domid: u32("domid"),
});

const regionSize = (context: WireContext) =>
  context.xenMmap ? xenMemoryRegion.size : memoryRegion.size;

function readRegion(
  view: DataView,
  offset: number,
  context: WireContext,
): MemoryRegionDescription {
  if (!context.xenMmap) {
    return { ...memoryRegion.read(view, offset), xen: null };
  }
  const { xenFlags, domid, ...plain } = xenMemoryRegion.read(view, offset);
  return { ...plain, xen: { flags: xenFlags, domid } };
}

function writeRegion(
  view: DataView,
  offset: number,
  region: MemoryRegionDescription,
  context: WireContext,
): void {
  if (!context.xenMmap) return memoryRegion.write(view, offset, region);
  xenMemoryRegion.write(view, offset, {
    ...region,
    xenFlags: region.xen?.flags ?? 0,
    domid: region.xen?.domid ?? 0,
  });
}

function describeRegion(region: MemoryRegionDescription): string {
  return region.xen === null
    ? memoryRegion.describe(region)
    : xenMemoryRegion.describe({
      ...region,
      xenFlags: region.xen.flags,
      domid: region.xen.domid,
    });
}

/** Bytes before the regions: u32 num regions, u32 padding. */
const TABLE_HEADER_SIZE = 8;

/** "Memory regions description": 8 + 32n bytes (40n with XEN_MMAP), n <= 8. */
export const memoryTable: Codec<readonly MemoryRegionDescription[]> = {
  name: "memory table",
  minSize: TABLE_HEADER_SIZE,
  maxSize: TABLE_HEADER_SIZE + MAX_TABLE_REGIONS * xenMemoryRegion.size,
  decode(bytes, context) {
    const got = bytes.byteLength;
    if (got < TABLE_HEADER_SIZE) {
      return wrongSize("memory table", got, "8 or more");
    }
    const view = viewOf(bytes);
    const count = view.getUint32(0, true);
    if (count > MAX_TABLE_REGIONS) {
      return {
        ok: false,
        reason:
          `memory table has ${count} regions, limit is ${MAX_TABLE_REGIONS}`,
      };
    }
    const stride = regionSize(context);
    const expected = TABLE_HEADER_SIZE + count * stride;
    if (got !== expected) {
      return wrongSize(
        "memory table",
        got,
        `${expected} for ${count} regions`,
      );
    }
    const regions = Array.from(
      { length: count },
      (_, i) => readRegion(view, TABLE_HEADER_SIZE + i * stride, context),
    );
    return { ok: true, value: regions };
  },
  encode(regions, context) {
    if (regions.length > MAX_TABLE_REGIONS) {
      throw new RangeError(
        `Cannot encode memory table: ${regions.length} regions, ` +
          `limit is ${MAX_TABLE_REGIONS}`,
      );
    }
    const stride = regionSize(context);
    const bytes = new Uint8Array(TABLE_HEADER_SIZE + regions.length * stride);
    const view = viewOf(bytes);
    view.setUint32(0, regions.length, true);
    regions.forEach((region, i) =>
      writeRegion(view, TABLE_HEADER_SIZE + i * stride, region, context)
    );
    return bytes;
  },
  describe: (regions) =>
    [
      `num_regions=${regions.length}`,
      ...regions.map((region) => `{${describeRegion(region)}}`),
    ].join(" "),
};

/** Bytes of padding before a single region. */
const SINGLE_HEADER_SIZE = 8;

/** "Single memory region description": u64 padding, one region. */
export const singleMemoryRegion: Codec<MemoryRegionDescription> = {
  name: "single memory region",
  minSize: SINGLE_HEADER_SIZE + memoryRegion.size,
  maxSize: SINGLE_HEADER_SIZE + xenMemoryRegion.size,
  decode(bytes, context) {
    const expected = SINGLE_HEADER_SIZE + regionSize(context);
    if (bytes.byteLength !== expected) {
      return wrongSize("single memory region", bytes.byteLength, expected);
    }
    return {
      ok: true,
      value: readRegion(viewOf(bytes), SINGLE_HEADER_SIZE, context),
    };
  },
  encode(region, context) {
    const bytes = new Uint8Array(SINGLE_HEADER_SIZE + regionSize(context));
    writeRegion(viewOf(bytes), SINGLE_HEADER_SIZE, region, context);
    return bytes;
  },
  describe: describeRegion,
};
