/** A guest in postcopy: rings in its first region, missing pages in the second. */

import assert from "node:assert/strict";
import {
  ProtocolFeature,
  supportedFeatures,
  supportedProtocolFeatures,
  type VhostUserDevice,
} from "../../frontend/mod.ts";
import { featureMask } from "../../mod.ts";
import { pageSize } from "./page_source.ts";

const size = 1 << 20;
export const dataPages = size / pageSize;

/** How a front-end opens a device that it will migrate to. */
export const postcopyOptions = {
  start: false,
  queueSize: 16,
  features: supportedFeatures,
  protocolFeatures: supportedProtocolFeatures |
    featureMask(ProtocolFeature.PAGEFAULT),
  regions: [{ size }, { size }],
};

/** Guest address of a page that nobody has touched here. */
export function dataPage(guest: VhostUserDevice, page: number): bigint {
  assert.ok(page < dataPages);
  return guest.ram.regions[1].gpa + BigInt(page * pageSize);
}

/** ADVISE and LISTEN; returns the userfaultfd. */
export async function adviseAndListen(
  { connection }: VhostUserDevice,
): Promise<number> {
  const fd = await connection.advisePostcopy();
  await connection.listenPostcopy({ ack: true });
  return fd;
}

/** The regions, the ack, and a running queue 0; returns the bases. */
export async function mapAndStart(guest: VhostUserDevice): Promise<bigint[]> {
  const { connection, ram } = guest;
  await connection.setFeatures(guest.features);
  const bases = await connection.mapPostcopy(ram.regions);
  connection.acknowledgePostcopyMap();
  await guest.startQueue(0);
  return bases;
}
