/**
 * C structs as data: a struct is its fields in order, offsets follow from the
 * fields' natural alignment as in the C compiler, and the size that the wire
 * has is stated beside each struct and must come out the same.
 */

import {
  formatAddress,
  type Gpa,
  type Iova,
  type RingAddress,
  type Uva,
} from "./address.ts";

/** A value, or why the bytes are not one: hostile input is no exception. */
export type Decoded<T> =
  | { readonly ok: true; readonly value: T }
  | { readonly ok: false; readonly reason: string };

/** What changes the layout of payloads. */
export interface WireContext {
  /** XEN_MMAP negotiated: memory regions carry two more u32. */
  readonly xenMmap: boolean;
}

/** The layout of every front-end outside Xen. */
export const plainWire: WireContext = { xenMmap: false };

/** How one kind of payload is read, written and shown. */
export interface Codec<T> {
  /** The specification's name of the payload. */
  readonly name: string;
  /** Bytes; the least and the most that any value of it takes. */
  readonly minSize: number;
  readonly maxSize: number;
  /** Never throws, whatever the bytes. */
  decode(bytes: Uint8Array, context: WireContext): Decoded<T>;
  /** Throws RangeError for a value that the layout cannot hold. */
  encode(value: T, context: WireContext): Uint8Array;
  /** `index=0 num=128`. */
  describe(value: T): string;
}

/** One member of a struct. `specName` is the specification's word for it. */
export interface Field<T> {
  readonly specName: string;
  readonly size: number;
  readonly align: number;
  read(view: DataView, offset: number): T;
  write(view: DataView, offset: number, value: T): void;
  format(value: T): string;
}

function numberField(specName: string, size: 1 | 2 | 4): Field<number> {
  return {
    specName,
    size,
    align: size,
    read: (view, offset) =>
      size === 1
        ? view.getUint8(offset)
        : size === 2
        ? view.getUint16(offset, true)
        : view.getUint32(offset, true),
    write(view, offset, value) {
      if (size === 1) view.setUint8(offset, value);
      else if (size === 2) view.setUint16(offset, value, true);
      else view.setUint32(offset, value, true);
    },
    format: (value) => `${value}`,
  };
}

function bigField<T extends bigint>(
  specName: string,
  format: (value: bigint) => string,
): Field<T> {
  return {
    specName,
    size: 8,
    align: 8,
    read: (view, offset) => view.getBigUint64(offset, true) as T,
    write: (view, offset, value) => view.setBigUint64(offset, value, true),
    format,
  };
}

export const u8 = (specName: string) => numberField(specName, 1);
export const u16 = (specName: string) => numberField(specName, 2);
export const u32 = (specName: string) => numberField(specName, 4);
export const u64 = (specName: string) =>
  bigField<bigint>(specName, (value) => `${value}`);
export const gpaField = (specName: string) =>
  bigField<Gpa>(specName, formatAddress);
export const uvaField = (specName: string) =>
  bigField<Uva>(specName, formatAddress);
export const iovaField = (specName: string) =>
  bigField<Iova>(specName, formatAddress);
export const ringAddressField = (specName: string) =>
  bigField<RingAddress>(specName, formatAddress);

/** A u32 of flags, shown in hexadecimal. */
export function flags32(specName: string): Field<number> {
  return {
    ...numberField(specName, 4),
    format: (value) => `0x${value.toString(16)}`,
  };
}

type FieldsOf<T> = { readonly [K in keyof T]: Field<T[K]> };

/** A struct of fixed size. */
export interface StructCodec<T> extends Codec<T> {
  readonly size: number;
  /** Where each member lies, in wire order. */
  readonly members: readonly {
    readonly name: string;
    readonly specName: string;
    readonly offset: number;
    readonly size: number;
  }[];
  /** Reads at an offset that the caller has checked to hold `size` bytes. */
  read(view: DataView, offset: number): T;
  write(view: DataView, offset: number, value: T): void;
}

const roundUp = (value: number, align: number) =>
  Math.ceil(value / align) * align;

/** The reason for a payload of the wrong size. */
export function wrongSize(
  name: string,
  got: number,
  expected: number | string,
): { readonly ok: false; readonly reason: string } {
  return {
    ok: false,
    reason: `${name} payload has ${got} bytes, needs ${expected}`,
  };
}

/** A DataView of exactly these bytes. */
export function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** Defines a struct; `size` is the specification's, in bytes. */
export function struct<T extends object>(
  name: string,
  size: number,
  fields: FieldsOf<T>,
): StructCodec<T> {
  const laidOut: { key: keyof T; field: Field<T[keyof T]>; offset: number }[] =
    [];
  let end = 0;
  let structAlign = 1;
  for (const key of Object.keys(fields) as (keyof T)[]) {
    const field = fields[key];
    const offset = roundUp(end, field.align);
    laidOut.push({ key, field, offset });
    end = offset + field.size;
    structAlign = Math.max(structAlign, field.align);
  }
  if (roundUp(end, structAlign) !== size) {
    throw new Error(
      `Cannot lay out ${name}: fields take ${
        roundUp(end, structAlign)
      } bytes, the specification says ${size}`,
    );
  }
  function read(view: DataView, offset: number): T {
    const value: Partial<T> = {};
    for (const { key, field, offset: at } of laidOut) {
      value[key] = field.read(view, offset + at);
    }
    return value as T;
  }
  function write(view: DataView, offset: number, value: T): void {
    for (const { key, field, offset: at } of laidOut) {
      field.write(view, offset + at, value[key]);
    }
  }
  return {
    name,
    size,
    minSize: size,
    maxSize: size,
    members: laidOut.map(({ key, field, offset }) => ({
      name: String(key),
      specName: field.specName,
      offset,
      size: field.size,
    })),
    read,
    write,
    decode(bytes) {
      if (bytes.byteLength !== size) {
        return wrongSize(name, bytes.byteLength, size);
      }
      return { ok: true, value: read(viewOf(bytes), 0) };
    },
    encode(value) {
      const bytes = new Uint8Array(size);
      write(viewOf(bytes), 0, value);
      return bytes;
    },
    describe(value) {
      return laidOut.map(({ key, field }) =>
        `${field.specName.replaceAll(" ", "_")}=${field.format(value[key])}`
      ).join(" ");
    },
  };
}
