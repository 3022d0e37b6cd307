/**
 * A disk in a Worker: made of what can travel there.
 *
 * @module
 */

import type { Device } from "../../session/device.ts";
import type { TargetOps } from "../../session/target_ops.ts";
import type { Backing, PortableBacking } from "./backings/backing.ts";
import { sharedFileBacking } from "./backings/file.ts";
import { sharedMemoryBacking } from "./backings/memory.ts";
import { nullBacking } from "./backings/null.ts";
import type { BlkGeometry } from "./config.ts";
import { BlkDevice, type Disk } from "./device.ts";
import { BlkStatistics } from "./statistics.ts";

/** A disk on its way to a Worker. */
export interface PortableDisk {
  readonly geometry: BlkGeometry;
  readonly id: Uint8Array<ArrayBuffer>;
  readonly stopTimeoutMs: number | undefined;
  readonly pollMicroseconds: number | undefined;
  readonly isWriteback: boolean;
  readonly capacity: Float64Array;
  readonly counts: SharedArrayBuffer;
  readonly backing: PortableBacking;
}

/** What a Worker imports. */
export const portableModule = {
  module: import.meta.url,
  name: "portableDevice",
} as const;

function open(backing: PortableBacking): Backing {
  switch (backing.kind) {
    case "null":
      return nullBacking(backing.size);
    case "memory":
      return sharedMemoryBacking(backing);
    case "file":
      return sharedFileBacking(
        backing.path,
        backing.fd,
        backing.isReadOnly,
        backing.use,
      );
  }
}

/** A disk that this isolate has opened, while devices of it are here. */
interface OpenDisk {
  readonly disk: Disk;
  readonly statistics: BlkStatistics;
  users: number;
}

const opened = new Map<PortableDisk, OpenDisk>();

function openDisk(portable: PortableDisk): OpenDisk {
  const statistics = new BlkStatistics(portable.counts);
  const { counts: _, ...rest } = portable;
  return {
    statistics,
    users: 0,
    disk: {
      ...rest,
      backing: open(portable.backing),
      counts: statistics.counts,
      report: (error, device) => device.report(error),
    },
  };
}

/** The instance of a disk's device in a Worker. */
export function portableDevice(
  device: Device,
  portable: PortableDisk,
): TargetOps {
  const found = opened.get(portable) ?? openDisk(portable);
  opened.set(portable, found);
  found.users++;
  device.signal.addEventListener("abort", () => {
    if (--found.users > 0) return;
    opened.delete(portable);
    found.statistics.leave();
    found.disk.backing.close();
  }, { once: true });
  return new BlkDevice(device, found.disk, () => {});
}
