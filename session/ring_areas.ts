/**
 * The three areas of a ring in memory, by whatever kind of address the
 * front-end gives.
 *
 * @module
 */

import type { AddressSpace, GuestMemory } from "../ffi/guest_memory.ts";
import type { Access, IotlbMiss } from "../ffi/iotlb.ts";
import type { VringAddress } from "../protocol/payloads.ts";

/** The areas by their names in a split ring. */
export type AreaName = "descriptor" | "available" | "used";
export const areaNames: readonly AreaName[] = [
  "descriptor",
  "available",
  "used",
];

/**
 * Bytes of the three areas of a ring (virtio 1.3, sections 2.7 and 2.8): in a
 * packed one the latter two are event suppression structures.
 */
export function ringAreaSizes(
  queueSize: number,
  isPacked: boolean,
): Record<AreaName, number> {
  if (isPacked) return { descriptor: 16 * queueSize, available: 4, used: 4 };
  return {
    descriptor: 16 * queueSize,
    available: 6 + 2 * queueSize,
    used: 6 + 8 * queueSize,
  };
}

/** What the device does there, as the core asks of the IOTLB too. */
const splitAccesses: Record<AreaName, Access> = {
  descriptor: "read",
  available: "read",
  used: "readWrite",
};
const packedAccesses: Record<AreaName, Access> = {
  descriptor: "readWrite",
  available: "read",
  used: "write",
};

export type RingAreas = Record<AreaName, Uint8Array<ArrayBuffer>>;

/** Where a ring is. */
export interface RingPlace {
  readonly memory: GuestMemory;
  readonly space: AddressSpace;
  readonly addresses: Pick<VringAddress, AreaName>;
  readonly size: number;
  readonly isPacked: boolean;
}

/**
 * The areas as views; a list of what the IOTLB lacks; or null when one of
 * them is not whole in one region.
 */
export function findRingAreas(
  place: RingPlace,
): RingAreas | readonly IotlbMiss[] | null {
  const misses: IotlbMiss[] = [];
  const views: Partial<RingAreas> = {};
  for (const name of areaNames) {
    const found = findArea(place, name);
    if (found === null) return null;
    if (found instanceof Uint8Array) views[name] = found;
    else misses.push(found);
  }
  return misses.length > 0 ? misses : views as RingAreas;
}

/** The areas of a ring at IOVAs, from now on; null while they are not mapped. */
export function movingRingAreas(
  place: RingPlace,
  first: RingAreas,
): () => RingAreas | null {
  const { iotlb } = place.memory;
  let { version } = iotlb;
  let areas: RingAreas | null = first;
  return () => {
    if (version !== iotlb.version) {
      version = iotlb.version;
      const found = findRingAreas(place);
      areas = found !== null && "used" in found ? found : null;
    }
    return areas;
  };
}

function findArea(
  { memory, space, addresses, size, isPacked }: RingPlace,
  name: AreaName,
): Uint8Array<ArrayBuffer> | IotlbMiss | null {
  const length = ringAreaSizes(size, isPacked)[name];
  const address = BigInt.asUintN(64, addresses[name]);
  if (space !== "iova") return memory.whole(space, address, length);
  const access = (isPacked ? packedAccesses : splitAccesses)[name];
  if (address + BigInt(length) > 1n << 64n) return null;
  const first = memory.iotlb.translate(address, length, access);
  if (typeof first === "string") {
    return { iova: address, access, reason: first };
  }
  if (first.contiguous === length) return memory.viewOf(first, length);
  const rest = address + BigInt(first.contiguous);
  const next = memory.iotlb.translate(rest, 1, access);
  // Mapped, but elsewhere: that cannot become a whole.
  return typeof next === "string" ? { iova: rest, access, reason: next } : null;
}
