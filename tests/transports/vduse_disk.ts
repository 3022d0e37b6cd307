/** A disk behind a model of the kernel's VDUSE, and its driver. */

import { blkDevice, type DeviceOptions, memoryBacking } from "../../mod.ts";
import { exerciseQueue } from "./pci_disk.ts";
import {
  type ModelDriver,
  servingVduse,
  type VduseServed,
  type VduseServeOptions,
} from "./vduse_served.ts";

/** Serves a disk of 1 MiB with two queues. */
export async function withDisk(
  body: (served: VduseServed) => Promise<void>,
  options: VduseServeOptions = {},
  more: Partial<DeviceOptions> = {},
): Promise<void> {
  const disk = blkDevice({ backing: memoryBacking(1 << 20), numQueues: 2 });
  try {
    await servingVduse(options, { ...disk, ...more }, body);
  } finally {
    await disk.close();
  }
}

/** All queues work. */
export async function exercise(driver: ModelDriver, count = 4): Promise<void> {
  for (let i = 0; i < count; i++) {
    await exerciseQueue(driver.queues[i % driver.queues.length], i);
  }
}
