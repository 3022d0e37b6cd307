/**
 * Block devices (virtio 1.3, section 5.2).
 *
 * @module
 */

import { Vhost2Error } from "../../ffi/errors.ts";
import type { Device } from "../../session/device.ts";
import type { DeviceModule } from "../../session/device_module.ts";
import type { TargetOps } from "../../session/target_ops.ts";
import {
  recoveryProtocolFeatures,
  virtqueueProtocolFeatures,
} from "../../virtqueue/mod.ts";
import { requireInteger } from "../limits.ts";
import type { Backing } from "./backings/backing.ts";
import { type DiskObject, objectBacking } from "./backings/object.ts";
import {
  blkFeatures,
  type BlkGeometry,
  capacityOf,
  sectorSize,
} from "./config.ts";
import { BlkDevice, type Disk, sharedBytes } from "./device.ts";
import { idBytes } from "./requests.ts";
import { BlkStatistics } from "./statistics.ts";
import { type PortableDisk, portableModule } from "./portable.ts";

export {
  type Backing,
  type BackingClient,
  type BackingQueue,
  type PortableBacking,
  Status as BlkStatus,
} from "./backings/backing.ts";
export { fileBacking, type FileOptions } from "./backings/file.ts";
export { memoryBacking } from "./backings/memory.ts";
export { nullBacking } from "./backings/null.ts";
export { type DiskObject, objectBacking } from "./backings/object.ts";
export { BlkFeature } from "./config.ts";
export { type BlkCounts, BlkStatistics } from "./statistics.ts";

/** A disk's options. */
export interface BlkOptions {
  /** Where its bytes are: one of the backings, or an object of one's own. */
  readonly backing: Backing | DiskObject;
  /** Refuses writes; also what a backing that cannot write implies. */
  readonly readOnly?: boolean;
  /** At most 20 bytes; what Linux shows in /sys/block/vda/serial. */
  readonly serial?: string;
  /**
   * Bytes in the smallest request: 512 or 4096; the least that the backing can
   * serve (512, but for O_DIRECT on some disks) unless given.
   */
  readonly logicalBlockSize?: 512 | 4096;
  /** Bytes that are best written at once; 4096 unless given. */
  readonly physicalBlockSize?: number;
  /** Queues at most, 1 to 256; 1 unless given. */
  readonly numQueues?: number;
  /** Pieces of one request at most; 126 (QEMU's queue of 128) unless given. */
  readonly segMax?: number;
  /** Bytes of one piece at most; no limit unless given. */
  readonly sizeMax?: number;
  /**
   * Whether a front-end that can flush finds the disk in writeback mode (true
   * unless given); it may change that. In write-through mode, and for a
   * front-end that cannot flush, a write is durable when it completes.
   */
  readonly writeback?: boolean;
  /** Sectors of 512 bytes in one range of a discard or write zeroes. */
  readonly maxRangeSectors?: number;
  /** Ranges in one discard or write zeroes; 32 unless given. */
  readonly maxRangeCount?: number;
  /** Milliseconds that a stop waits for open requests; 30000 unless given. */
  readonly stopTimeoutMs?: number;
  /**
   * Microseconds to look for more after the last work; the target's
   * `pollMicroseconds` unless given.
   */
  readonly pollMicroseconds?: number;
  /**
   * Told why a request failed, where it was not the guest's fault. Unless
   * given such errors are written to the console. Of requests that Workers
   * serve the target's `onError` is told.
   */
  readonly onError?: (error: Vhost2Error, device: Device) => void;
}

/** A disk: spread it into the options of `registerTarget`. */
export interface Blk {
  /** Virtio features that it offers. */
  readonly features: bigint;
  /** Protocol features beside the library's: for migration and crash recovery. */
  readonly protocolFeatures: bigint;
  readonly queueCount: number;
  readonly deviceType: "block";
  /** Makes the device of a front-end, in Workers too. */
  readonly device: DeviceModule & { create(device: Device): TargetOps };
  /** What it has served. */
  readonly statistics: BlkStatistics;
  /** Bytes that the driver sees now. */
  readonly size: number;
  /**
   * Gives the disk another size, while guests use it, and tells their drivers.
   *
   * @param size bytes, a multiple of the logical block
   */
  resize(size: number): Promise<void>;
  /** Closes the backing: after the targets were unregistered. */
  close(): Promise<void>;
  [Symbol.asyncDispose](): Promise<void>;
}

/** 1 GiB, so that one request does not keep a disk for long. */
const defaultRangeSectors = 2 ** 30 / sectorSize;

function geometryOf(options: BlkOptions, backing: Backing): BlkGeometry {
  const {
    logicalBlockSize = backing.blockSize ?? 512,
    maxRangeSectors = defaultRangeSectors,
  } = options;
  if (logicalBlockSize < (backing.blockSize ?? 512)) {
    throw new Vhost2Error(
      "OPTION",
      `Cannot use logicalBlockSize: ${logicalBlockSize} (${backing.name} serves blocks of ${backing.blockSize})`,
    );
  }
  if (logicalBlockSize !== 512 && logicalBlockSize !== 4096) {
    throw new Vhost2Error(
      "OPTION",
      `Cannot use logicalBlockSize: ${logicalBlockSize} (512 or 4096)`,
    );
  }
  const { physicalBlockSize = 4096 } = options;
  const blocks = physicalBlockSize / logicalBlockSize;
  if (!Number.isInteger(Math.log2(blocks)) || blocks < 1 || blocks > 32768) {
    throw new Vhost2Error(
      "OPTION",
      `Cannot use physicalBlockSize: ${physicalBlockSize} (the logical block, ${logicalBlockSize}, times a power of two)`,
    );
  }
  const isReadOnly = options.readOnly === true || backing.isReadOnly;
  return {
    isReadOnly,
    logicalBlockSize,
    physicalBlockSize,
    numQueues: requireInteger("numQueues", options.numQueues ?? 1, 1, 256),
    segMax: requireInteger("segMax", options.segMax ?? 126, 1, 1022),
    sizeMax: requireInteger("sizeMax", options.sizeMax ?? 0, 0, 2 ** 32 - 1),
    canDiscard: backing.canDiscard && !isReadOnly,
    canWriteZeroes: backing.canWriteZeroes && !isReadOnly,
    maxRangeSectors: requireInteger(
      "maxRangeSectors",
      maxRangeSectors,
      logicalBlockSize / sectorSize,
      2 ** 32 - 1,
    ),
    maxRangeCount: requireInteger(
      "maxRangeCount",
      options.maxRangeCount ?? 32,
      1,
      256,
    ),
  };
}

function encodeId(serial: string): Uint8Array<ArrayBuffer> {
  const id = new Uint8Array(idBytes);
  const bytes = new TextEncoder().encode(serial);
  if (bytes.length > idBytes) {
    throw new Vhost2Error(
      "OPTION",
      `Cannot use serial: "${serial}" (${bytes.length} bytes, at most ${idBytes})`,
    );
  }
  id.set(bytes);
  return id;
}

/**
 * A disk, for any number of front-ends at once.
 *
 * @param options where its bytes are, and what it says of itself
 * @returns what `registerTarget` needs, and the handle of the disk
 * @throws Vhost2Error OPTION for unusable options
 *
 * @example 64 MiB of memory as a disk
 * ```ts
 * import { blkDevice, memoryBacking, registerTarget } from "vhost2";
 * await using disk = blkDevice({ backing: memoryBacking(64 << 20) });
 * await using target = await registerTarget({
 *   transport: "vhost-user",
 *   address: `${Deno.makeTempDirSync()}/disk.sock`,
 *   ...disk,
 * });
 * if (disk.statistics.snapshot().requests !== 0) throw new Error(target.name);
 * ```
 *
 * @example Four queues in two Workers
 * ```ts
 * import { blkDevice, nullBacking, registerTarget } from "vhost2";
 * await using disk = blkDevice({ backing: nullBacking(1 << 30), numQueues: 4 });
 * await using target = await registerTarget({
 *   transport: "vhost-user",
 *   address: `${Deno.makeTempDirSync()}/disk.sock`,
 *   ...disk,
 *   workers: 2,
 * });
 * if (target.devices.length !== 0) throw new Error("nobody has connected");
 * ```
 */
export function blkDevice(options: BlkOptions): Blk {
  const backing = "openQueue" in options.backing
    ? options.backing
    : objectBacking(options.backing);
  const geometry = geometryOf(options, backing);
  const statistics = new BlkStatistics();
  const connected = new Set<Device>();
  // Changed by a resize, here, and read by whoever serves the disk.
  const capacity = new Float64Array(new SharedArrayBuffer(8));
  capacity[0] = capacityOf(backing.size, geometry.logicalBlockSize);
  const disk: Disk = {
    geometry,
    backing,
    counts: statistics.counts,
    id: encodeId(options.serial ?? ""),
    stopTimeoutMs: options.stopTimeoutMs,
    pollMicroseconds: options.pollMicroseconds,
    isWriteback: options.writeback ?? true,
    capacity,
    report(error, device) {
      try {
        if (options.onError === undefined) console.error(error.message);
        else options.onError(error, device);
      } catch (failure) {
        console.error("onError of a disk failed:", failure);
      }
    },
  };
  const resize = async (size: number) => {
    const before = capacity[0];
    const after = capacityOf(size, geometry.logicalBlockSize);
    // Nobody may reach beyond the backing, neither before nor after.
    capacity[0] = Math.min(before, after);
    try {
      await backing.resize(size);
    } catch (error) {
      capacity[0] = before;
      throw error;
    }
    capacity[0] = after;
    for (const device of connected) device.configChanged();
  };
  let resizing = Promise.resolve();
  let closed: Promise<void> | undefined;
  const close = (): Promise<void> =>
    closed ??= (async () => await backing.close())();
  return {
    features: blkFeatures(geometry),
    // Reads, writes and the rest may all be done twice.
    protocolFeatures: virtqueueProtocolFeatures | recoveryProtocolFeatures,
    queueCount: geometry.numQueues,
    deviceType: "block",
    device: {
      ...portableModule,
      sharedBytes,
      create(device) {
        connected.add(device);
        return new BlkDevice(device, disk, () => connected.delete(device));
      },
      get options(): PortableDisk {
        if (backing.toPortable === undefined) {
          throw new Vhost2Error(
            "OPTION",
            `Cannot serve this disk in Workers: its backing (${backing.name}) is of this isolate`,
          );
        }
        const { id, stopTimeoutMs, pollMicroseconds, isWriteback } = disk;
        return {
          geometry,
          id,
          stopTimeoutMs,
          pollMicroseconds,
          isWriteback,
          capacity,
          counts: statistics.memory,
          backing: backing.toPortable(),
        };
      },
    },
    statistics,
    get size() {
      return capacity[0] * sectorSize;
    },
    resize(size) {
      // One after the other, whether the one before worked or not.
      const resized = resizing.then(() => resize(size));
      resizing = resized.catch(() => {});
      return resized;
    },
    close,
    [Symbol.asyncDispose]: close,
  };
}
