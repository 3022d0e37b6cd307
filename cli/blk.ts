/**
 * `vhost2 blk`: a disk, served until a signal comes.
 *
 * @module
 */

import process from "node:process";
import {
  type Backing,
  type Blk,
  blkDevice,
  fileBacking,
  memoryBacking,
  nullBacking,
} from "../devices/mod.ts";
import type { Vhost2Error } from "../ffi/errors.ts";
import { registerTarget, type Target } from "../mod.ts";
import type { BlkArguments } from "./arguments.ts";
import { describePlace, stopSignal, transportOf } from "./serving.ts";

/** The back-end program conventions of the vhost-user specification. */
export const capabilities = {
  type: "block",
  features: ["read-only", "blk-file"],
} as const;

function openBacking(options: BlkArguments): Backing {
  const { source } = options;
  switch (source.kind) {
    case "file":
      return fileBacking(source.path, {
        readOnly: options.isReadOnly,
        direct: options.isDirect,
      });
    case "memory":
      return memoryBacking(source.size);
    case "null":
      return nullBacking(source.size);
  }
}

/** `64 MiB`; bytes where no larger unit is exact. */
export function formatSize(size: number): string {
  for (const [index, unit] of ["TiB", "GiB", "MiB", "KiB"].entries()) {
    const bytes = 1024 ** (4 - index);
    if (size >= bytes && size % bytes === 0) return `${size / bytes} ${unit}`;
  }
  return `${size} bytes`;
}

function readyLine(place: string, options: BlkArguments, disk: Blk): string {
  const { source, numQueues } = options;
  const what = source.kind === "file" ? source.path : source.kind;
  const queues = numQueues === 1 ? "1 queue" : `${numQueues} queues`;
  return `vhost2: ${place} (${formatSize(disk.size)}, ${what}, ${queues})`;
}

/**
 * Serves a disk until it is to stop: by a signal, or because the one
 * connection that was inherited has ended.
 *
 * @throws Vhost2Error when it cannot be served
 */
export async function serveBlk(options: BlkArguments): Promise<void> {
  const place = describePlace(options.place);
  const backing = openBacking(options);
  const report = (error: Vhost2Error) =>
    process.stderr.write(`vhost2: ${error.message}\n`);
  let disk: Blk | undefined;
  let target: Target | undefined;
  try {
    disk = blkDevice({
      backing,
      readOnly: options.isReadOnly,
      serial: options.serial,
      logicalBlockSize: options.logicalBlockSize,
      numQueues: options.numQueues,
      onError: report,
    });
    const { device, features, protocolFeatures, queueCount, deviceType } = disk;
    target = await registerTarget({
      ...transportOf(options.place),
      features,
      protocolFeatures,
      queueCount,
      deviceType,
      postcopy: options.hasPostcopy,
      workers: options.workers,
      pollMicroseconds: options.pollMicroseconds,
      device,
      onError: report,
      trace: options.isVerbose
        ? (line) => process.stderr.write(`${line}\n`)
        : undefined,
    });
    const stopped = stopSignal();
    console.log(readyLine(place, options, disk));
    await Promise.race([stopped, target.closed]);
  } finally {
    await target?.unregister();
    await (disk ?? backing).close();
  }
}
