/**
 * The device IOTLB: what the front-end has translated of the I/O virtual
 * addresses that a guest's driver uses (ACCESS_PLATFORM). The entries live in
 * the core, next to the rings that go by them.
 *
 * @module
 */

import { constants, layouts } from "./abi.gen.ts";
import { core } from "./core.ts";
import { check, Errno } from "./errors.ts";
import {
  readTranslation,
  type Translation,
  translationOut,
} from "./translation.ts";

/** What a device does with memory. */
export type Access = "read" | "write" | "readWrite";

const accessBits: Record<Access, number> = {
  read: constants.accessRead,
  write: constants.accessWrite,
  readWrite: constants.accessRead | constants.accessWrite,
};

const accessNames: Record<number, Access> = {
  [accessBits.read]: "read",
  [accessBits.write]: "write",
  [accessBits.readWrite]: "readWrite",
};

/** The access as IOTLB messages carry it: 1 read, 2 write, 3 both. */
export function permissionOf(access: Access): number {
  return accessBits[access];
}

/**
 * Why an IOVA has no translation: no entry; an entry that does not permit the
 * access; an entry that leads to no region of the memory.
 */
export type MissReason = "absent" | "forbidden" | "unmapped";

const missReasons: Record<number, MissReason> = {
  [constants.missAbsent]: "absent",
  [constants.missForbidden]: "forbidden",
  [constants.missUnmapped]: "unmapped",
};

const errnoReasons: Record<number, MissReason> = {
  [-Errno.EAGAIN]: "absent",
  [-Errno.EACCES]: "forbidden",
  [-Errno.EFAULT]: "unmapped",
};

/** An address that could not be used. */
export interface IotlbMiss {
  readonly iova: bigint;
  readonly access: Access;
  readonly reason: MissReason;
}

/** As many as the core tells of one ring at a time. */
const maxMisses = 32;
const missWords = new DataView(
  new ArrayBuffer(maxMisses * layouts.IotlbMiss.byteSize),
);
const translation = translationOut();

/** What a ring lacked when it answered -EAGAIN last. */
export function ringMisses(ring: number): IotlbMiss[] {
  const field = layouts.IotlbMiss;
  const count = core.ringMisses(ring, missWords, maxMisses);
  const misses: IotlbMiss[] = [];
  for (let at = 0; at < count * field.byteSize; at += field.byteSize) {
    misses.push({
      iova: missWords.getBigUint64(at + field.iova, true),
      access: accessNames[missWords.getUint32(at + field.access, true)],
      reason: missReasons[missWords.getUint32(at + field.reason, true)],
    });
  }
  return misses;
}

/** The IOTLB of one guest memory. */
export class Iotlb {
  readonly #memory: number;
  #version = 0;

  /** @param memory the core's handle */
  constructor(memory: number) {
    this.#memory = memory;
  }

  /** Changes whenever a translation may have: what is kept of one is stale. */
  get version(): number {
    return this.#version;
  }

  /**
   * Adds a translation in the place of what was there. False for a range that
   * is empty or passes 2^64, and for no permission.
   */
  update(
    iova: bigint,
    size: bigint,
    target: bigint,
    permission: number,
  ): boolean {
    this.#version++;
    const result = core.iotlbUpdate(
      this.#memory,
      iova,
      size,
      target,
      permission,
    );
    if (result === -Errno.EINVAL) return false;
    check(result, "Cannot add to the IOTLB");
    return true;
  }

  /**
   * Takes all translations of a range away: when this returns no ring
   * operation goes by them, in any thread. False as for `update`.
   */
  invalidate(iova: bigint, size: bigint): boolean {
    this.#version++;
    const result = core.iotlbInvalidate(this.#memory, iova, size);
    if (result === -Errno.EINVAL) return false;
    check(result, "Cannot invalidate the IOTLB");
    return true;
  }

  /** Forgets all; later targets are uvas, or gpas with GPA_ADDRESSES. */
  clear(targets: "gpa" | "uva"): void {
    this.#version++;
    const space = targets === "gpa" ? constants.spaceGpa : constants.spaceUva;
    check(core.iotlbClear(this.#memory, space), "Cannot clear the IOTLB");
  }

  /**
   * Where an IOVA is; `contiguous` counts over entries. A reason when not even
   * its first byte can be used so.
   */
  translate(
    iova: bigint,
    length: number,
    access: Access,
  ): Translation | MissReason {
    // Nothing goes on beyond the last address.
    const left = (1n << 64n) - iova;
    const bytes = BigInt(length) < left ? BigInt(length) : left;
    const result = core.iotlbTranslate(
      this.#memory,
      iova,
      bytes,
      accessBits[access],
      translation,
    );
    const reason = errnoReasons[result];
    if (reason !== undefined) return reason;
    check(result, `Cannot translate IOVA 0x${iova.toString(16)}`);
    return readTranslation(translation);
  }
}
