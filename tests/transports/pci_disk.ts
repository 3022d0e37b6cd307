/** A disk behind a model of a virtio-vhost-user device, and its guest. */

import assert from "node:assert/strict";
import type { QueueDriver } from "../../driver/queue_driver.ts";
import { VhostUserDevice } from "../../frontend/mod.ts";
import { blkDevice, type DeviceOptions, memoryBacking } from "../../mod.ts";
import { pattern } from "../devices/disk_guest.ts";
import { within } from "../support/wait.ts";
import {
  type GuestOptions,
  type PciServed,
  type PciServeOptions,
  servingPci,
} from "./pci_served.ts";

/** All but packed rings. */
const features = ~(1n << 34n);

/** Serves a disk of 1 MiB with two queues. */
export async function withDisk(
  options: PciServeOptions,
  body: (served: PciServed) => Promise<void>,
  more: Partial<DeviceOptions> = {},
): Promise<void> {
  const disk = blkDevice({ backing: memoryBacking(1 << 20), numQueues: 2 });
  try {
    await servingPci(options, { ...disk, ...more }, body);
  } finally {
    await disk.close();
  }
}

/** A front-end with two queues that work. */
export function openGuest(
  { attach }: PciServed,
  options: GuestOptions = {},
): Promise<VhostUserDevice> {
  return within(
    VhostUserDevice.open({
      fd: attach(),
      features,
      queueCount: 2,
      regions: [{ size: 1 << 20 }, { size: 1 << 20, gpa: 1n << 32n }],
      ...options,
    }),
    "the handshake",
  );
}

function header(type: number, sector: number): Uint8Array {
  const view = new DataView(new ArrayBuffer(16));
  view.setUint32(0, type, true);
  view.setBigUint64(8, BigInt(sector), true);
  return new Uint8Array(view.buffer);
}

/** Writes 4 KiB and reads them back through a queue. */
export async function exerciseQueue(
  queue: QueueDriver,
  seed: number,
): Promise<void> {
  const data = pattern(4096, seed);
  const sector = seed % 200 * 8;
  const wrote = await within(
    queue.submit({ readable: [header(1, sector), data], writable: [1] }),
    "a write",
  );
  assert.equal(wrote.data[0][0], 0);
  const read = await within(
    queue.submit({ readable: [header(0, sector)], writable: [4096, 1] }),
    "a read",
  );
  assert.deepEqual(read.data, [data, Uint8Array.of(0)]);
}

let seed = 0;

/** All queues work. */
export async function exercise(
  guest: VhostUserDevice<QueueDriver>,
  count = 4,
): Promise<void> {
  for (let i = 0; i < count; i++) {
    await exerciseQueue(guest.queues[i % guest.queues.length], seed++);
  }
}
