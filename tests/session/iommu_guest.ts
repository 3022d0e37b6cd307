/** A front-end with an IOMMU on a target, with rings of either format. */

import {
  type Iommu,
  type QueueDriver,
  VhostUserDevice,
  type VhostUserDeviceOptions,
} from "../../frontend/mod.ts";
import { type Served, type ServeOptions, serving } from "./served.ts";

export type Guest = VhostUserDevice<QueueDriver> & { readonly iommu: Iommu };

export interface IommuGuestOptions extends ServeOptions {
  readonly packed?: boolean;
  readonly guest?: VhostUserDeviceOptions;
}

/** Both formats, for tests of each. */
export const formats = [
  { name: "split", packed: false },
  { name: "packed", packed: true },
] as const;

/** A guest whose queues have not started unless `guest.start` says so. */
export function withIommu(
  options: IommuGuestOptions,
  body: (guest: Guest, served: Served) => Promise<void>,
): Promise<void> {
  return serving(options, async (served) => {
    const guest = await VhostUserDevice.open({
      path: served.path,
      start: false,
      queueCount: 2,
      queueSize: 16,
      ramSize: 1 << 20,
      iommu: true,
      ...options.guest,
      packed: options.packed ?? false,
    });
    try {
      await body(guest as Guest, served);
    } finally {
      guest.connection.close();
      await guest.close();
    }
  });
}

const page = 4096n;

/** The first address of a page. */
export function pageOf(address: bigint): bigint {
  return address - address % page;
}

let sequence = 0;

/** Sends bytes that nobody sent before; resolves when they have come back. */
export async function echo(guest: Guest, index = 0): Promise<void> {
  const text = `request ${sequence++} on ${index}`;
  const bytes = new TextEncoder().encode(text);
  const { written, data } = await guest.queues[index].submit({
    readable: [bytes],
    writable: [64],
  });
  const answer = new TextDecoder().decode(data[0].subarray(0, written));
  if (answer !== text) throw new Error(`${answer} came back, not ${text}`);
}
