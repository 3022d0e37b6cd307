/**
 * The address spaces of the protocol as distinct types. All are bigint: a
 * hostile front-end sends any of 2^64 values, and a JavaScript number is
 * exact to 2^53 only. Addresses of our own process never cross the wire and
 * have no type here.
 */

/** Guest physical address. */
export type Gpa = bigint & { readonly __brand: "gpa" };
/** User address: a virtual address in the front-end's process. */
export type Uva = bigint & { readonly __brand: "uva" };
/** I/O virtual address, translated by the IOTLB (ACCESS_PLATFORM). */
export type Iova = bigint & { readonly __brand: "iova" };
/**
 * An address in SET_VRING_ADDR before it is known which of the three it is:
 * a uva, or a gpa (GPA_ADDRESSES), or an iova (ACCESS_PLATFORM).
 */
export type RingAddress = bigint & { readonly __brand: "ring" };

const mask64 = (1n << 64n) - 1n;

/** Takes the low 64 bits, as the wire does. */
export function gpa(value: bigint): Gpa {
  return (value & mask64) as Gpa;
}

/** Takes the low 64 bits, as the wire does. */
export function uva(value: bigint): Uva {
  return (value & mask64) as Uva;
}

/** Takes the low 64 bits, as the wire does. */
export function iova(value: bigint): Iova {
  return (value & mask64) as Iova;
}

/** Takes the low 64 bits, as the wire does. */
export function ringAddress(value: bigint): RingAddress {
  return (value & mask64) as RingAddress;
}

/** `0x`-prefixed hexadecimal, for messages to people. */
export function formatAddress(value: bigint): string {
  return `0x${value.toString(16)}`;
}
