/** Bytes of messages, and how a back-end may answer the bad ones. */

import assert from "node:assert/strict";
import type { FrontendConnection } from "../../frontend/connection.ts";
import type { RamRegion } from "../../driver/guest_ram.ts";
import type { World } from "./world.ts";

/** u32s, little-endian. */
export function words(...values: number[]): Uint8Array<ArrayBuffer> {
  return new Uint8Array(Uint32Array.from(values).buffer);
}

/** u64s, little-endian. */
export function longs(...values: bigint[]): Uint8Array<ArrayBuffer> {
  const numbers = values.map((value) => BigInt.asUintN(64, value));
  return new Uint8Array(BigUint64Array.from(numbers).buffer);
}

/** One after the other. */
export function join(...parts: Uint8Array[]): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(parts.reduce((sum, p) => sum + p.length, 0));
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

/** A region as the messages carry it. */
export interface WireRegion {
  readonly gpa: bigint;
  readonly size: bigint;
  readonly uva: bigint;
  readonly mmapOffset: bigint;
}

/** The true description of a region. */
export function wireRegion(region: RamRegion): WireRegion {
  const { gpa, uva, size, mmapOffset } = region.description;
  return { gpa, uva, size, mmapOffset };
}

function regionBytes({ gpa, size, uva, mmapOffset }: WireRegion) {
  return longs(gpa, size, uva, mmapOffset);
}

/** The payload of ADD_MEM_REG and REM_MEM_REG. */
export function singleRegion(region: WireRegion): Uint8Array<ArrayBuffer> {
  return join(longs(0n), regionBytes(region));
}

/** The payload of SET_MEM_TABLE; `count` lies if it is given. */
export function memoryTable(
  regions: readonly WireRegion[],
  count = regions.length,
): Uint8Array<ArrayBuffer> {
  return join(words(count, 0), ...regions.map(regionBytes));
}

/** A message that is acked with an error; the connection stays. */
export async function assertRefused(
  world: World,
  connection: FrontendConnection,
  request: number,
  payload: Uint8Array,
  reason: RegExp,
  fds: readonly number[] = [],
): Promise<void> {
  const ack = await connection.acknowledged(request, payload, { fds });
  assert.notEqual(ack, 0n, `request ${request} was accepted`);
  await world.reported(reason);
  await connection.barrier();
}

/** A message that ends the connection, and the device with it. */
export async function assertEnds(
  world: World,
  connection: FrontendConnection,
  send: () => void,
  reason: RegExp,
): Promise<void> {
  send();
  await world.ended(connection);
  await world.reported(reason);
}
