/**
 * The core's ring of a started queue: made, asked how it is, and what is wrong
 * with it in words.
 *
 * @module
 */

import { constants, layouts } from "../ffi/abi.gen.ts";
import { core } from "../ffi/core.ts";
import { check, Errno, errnoName, Vhost2Error } from "../ffi/errors.ts";
import type { StartedQueue } from "./started_queue.ts";

/** What of each request the core keeps apart. */
export interface RingOptions {
  /** Readable bytes at the start of each request, copied out; 0 unless given. */
  readonly headerBytes?: number;
  /** 1: the last writable byte (a status) is kept apart; 0 unless given. */
  readonly trailerBytes?: number;
  /** A split ring goes on where its used ring ends. */
  readonly isResumed?: boolean;
}

const brokenReasons: Record<number, (value: bigint) => string> = {
  [constants.brokenAvailableIndex]: (v) =>
    `the available index ${v} is more entries ahead than the queue has`,
  [constants.brokenHead]: (v) => `head ${v} is outside the descriptor table`,
  [constants.brokenHeadInFlight]: (v) =>
    `head ${v} was made available again before it was used`,
  [constants.brokenNext]: (v) => `next ${v} is outside the descriptor table`,
  [constants.brokenLoop]: (v) => `a chain has more than ${v} descriptors`,
  [constants.brokenUnmapped]: (v) =>
    `address 0x${v.toString(16)} is not mapped guest memory`,
  [constants.brokenLength]: () => `a chain has 4 GiB or more`,
  [constants.brokenOrder]: () => `a readable descriptor follows a writable one`,
  [constants.brokenIndirectSize]: (v) =>
    `an indirect table has ${v} bytes, not a multiple of 16 in its limits`,
  [constants.brokenIndirectNested]: () => `an indirect table is nested`,
  [constants.brokenIndirectRefused]: () =>
    `an indirect table where none is allowed`,
  [constants.brokenSegments]: () => `a chain has too many pieces`,
  [constants.brokenMemory]: () => `guest memory went away`,
  [constants.brokenEmpty]: () => `a chain is empty`,
  [constants.brokenInflight]: () =>
    `its part of the inflight region is damaged`,
};

const hex = (value: bigint | number) => `0x${value.toString(16)}`;

/** What of a ring the core refused; the errno says in which way. */
const refusedFields: Record<number, (queue: StartedQueue) => string> = {
  [constants.refuseRingSize]: ({ size }) => `its size of ${size}`,
  [constants.refuseRingDescriptorArea]: ({ addresses }) =>
    `its descriptor area at ${hex(addresses.descriptor)}`,
  [constants.refuseRingAvailableArea]: ({ addresses }) =>
    `its driver area at ${hex(addresses.available)}`,
  [constants.refuseRingUsedArea]: ({ addresses }) =>
    `its device area at ${hex(addresses.used)}`,
  [constants.refuseRingConfig]: ({ availableIndex }) =>
    `its base ${hex(availableIndex)}, headerBytes or trailerBytes`,
  [constants.refuseRingInflight]: ({ size }) =>
    `its size of ${size}, which has no part in the inflight region`,
};

const spaces = {
  gpa: constants.spaceGpa,
  uva: constants.spaceUva,
  iova: constants.spaceIova,
};

const stateWords = new DataView(new ArrayBuffer(layouts.RingState.byteSize));
const configWords = new DataView(new ArrayBuffer(layouts.RingConfig.byteSize));
const reasonOut = new Uint32Array(1);

/**
 * The core's ring of a started queue, for those who use the core's other ways
 * of processing one; it is theirs to destroy. `isResumed`: a split ring goes on
 * where its used ring ends, for devices that give back in order.
 *
 * @throws Vhost2Error SYSTEM when the ring cannot be used as it is
 */
export function createRing(
  queue: StartedQueue,
  options: RingOptions,
): number {
  const field = layouts.RingConfig;
  const { addresses } = queue;
  configWords.setBigUint64(field.descriptorAddress, addresses.descriptor, true);
  configWords.setBigUint64(field.availableAddress, addresses.available, true);
  configWords.setBigUint64(field.usedAddress, addresses.used, true);
  configWords.setBigUint64(field.features, queue.features, true);
  configWords.setUint32(
    field.space,
    spaces[addresses.space],
    true,
  );
  configWords.setUint32(field.size, queue.size, true);
  configWords.setUint32(field.base, queue.availableIndex, true);
  configWords.setUint32(field.headerBytes, options.headerBytes ?? 0, true);
  configWords.setUint32(field.trailerBytes, options.trailerBytes ?? 0, true);
  configWords.setUint32(
    field.flags,
    (queue.isLogged ? constants.flagRingLogged : 0) |
      (options.isResumed ? constants.flagRingResumed : 0) |
      (queue.isAnew ? constants.flagRingAnew : 0),
    true,
  );
  configWords.setUint32(field.queueIndex, queue.index, true);
  configWords.setUint32(field.inflight, queue.inflight ?? 0, true);
  const result = core.ringCreate(queue.memory.handle, configWords, reasonOut);
  if (result === -Errno.EUCLEAN) {
    throw new Vhost2Error(
      "PROTOCOL",
      `Cannot process queue ${queue.index}: its inflight region is damaged`,
      { errno: Errno.EUCLEAN },
    );
  }
  const action = `Cannot process queue ${queue.index}`;
  const refused = refusedFields[reasonOut[0]];
  return check(
    result,
    result < 0 && refused !== undefined
      ? `${action}: ${refused(queue)}`
      : action,
  );
}

/** Why the core answered `errno` for a ring, as one clause. */
export function brokenReason(ring: number, errno: number): string {
  const field = layouts.RingState;
  if (core.ringState(ring, stateWords) < 0) return errnoName(-errno);
  const broken = stateWords.getUint32(field.broken, true);
  const value = stateWords.getBigUint64(field.brokenValue, true);
  return brokenReasons[broken]?.(value) ?? errnoName(-errno);
}

/** Where a ring's queue goes on, should it be started again. */
export function lastAvailable(ring: number): number | null {
  if (core.ringState(ring, stateWords) < 0) return null;
  return stateWords.getUint32(layouts.RingState.lastAvailable, true);
}

/** Requests of an earlier run that the next pops bring. */
export function toResubmit(ring: number): number {
  if (core.ringState(ring, stateWords) < 0) return 0;
  return stateWords.getUint32(layouts.RingState.toResubmit, true);
}
