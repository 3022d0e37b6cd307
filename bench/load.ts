/**
 * The load generator's front: a vhost-user front-end set up in TypeScript,
 * whose hot loop, the driver side of the ring, is in the core.
 *
 * @module
 */

import { constants, layouts } from "../ffi/abi.gen.ts";
import { core } from "../ffi/core.ts";
import { check } from "../ffi/errors.ts";
import {
  type DirtyLog,
  type QueueDriver,
  VhostUserDevice,
} from "../frontend/mod.ts";
import { featureMask, VirtioFeature } from "../protocol/features.ts";

/** What to do, and how much of it. */
export interface Load {
  readonly operation: "read" | "write";
  /** Requests outstanding. */
  readonly depth: number;
  readonly requestBytes: number;
  readonly durationMs?: number;
  readonly requestCount?: number;
  readonly isRandom?: boolean;
  /** Looks at the used ring all the time instead of sleeping. */
  readonly spins?: boolean;
  /** Writes a pattern and compares what it reads back. */
  readonly verifies?: boolean;
}

/** What came of it. */
export interface LoadFigures {
  readonly requests: number;
  readonly errors: number;
  readonly perSecond: number;
  readonly kicks: number;
  readonly calls: number;
  /** Nanoseconds, at depth 1. */
  readonly p50: number;
  readonly p99: number;
}

/** How the ring is. */
export interface LoadOptions {
  /** Tables for requests; true unless given. */
  readonly indirect?: boolean;
  /** 256 unless given. */
  readonly queueSize?: number;
  /** A packed ring; a split one unless given. */
  readonly packed?: boolean;
  /** Protocol features that are acked; all that are known unless given. */
  readonly protocolFeatures?: bigint;
  /** Has requests tracked in an inflight region. */
  readonly recovers?: boolean;
}

/** VIRTIO_BLK_F_FLUSH. */
const blkFlush = 9;
export const dataBytes = 32 << 20;

/** A connection to a vhost-user-blk back-end for running loads on. */
export class LoadGenerator {
  readonly #device: VhostUserDevice<QueueDriver>;
  readonly #sectors: bigint;
  readonly #data: bigint;

  #log: DirtyLog | undefined;
  /** Where a packed ring goes on. */
  #position = 0x8000;

  private constructor(device: VhostUserDevice<QueueDriver>, sectors: bigint) {
    this.#device = device;
    this.#sectors = sectors;
    this.#data = device.ram.allocate(dataBytes, 4096);
  }

  /** Connects; the rings are split, indirect and of 256 unless told. */
  static async open(
    path: string,
    options: LoadOptions = {},
  ): Promise<LoadGenerator> {
    const features = featureMask(
      VirtioFeature.VERSION_1,
      VirtioFeature.PROTOCOL_FEATURES,
      VirtioFeature.RING_EVENT_IDX,
      // Who cannot flush has every write made durable before it completes.
      blkFlush,
      ...(options.indirect === false ? [] : [VirtioFeature.RING_INDIRECT_DESC]),
    );
    const device = await VhostUserDevice.open({
      path,
      features,
      queueSize: options.queueSize ?? 256,
      ramSize: 64 << 20,
      usesCalls: false,
      packed: options.packed ?? false,
      protocolFeatures: options.protocolFeatures,
      recovers: options.recovers ?? false,
    });
    const config = await device.getConfig(0, 8);
    return new LoadGenerator(
      device,
      new DataView(config.buffer, config.byteOffset).getBigUint64(0, true),
    );
  }

  /** As a migration begins: all is logged; call `takeDirty` now and then. */
  async startLog(): Promise<void> {
    this.#log = await this.#device.startLog();
  }

  /** As a migration that looks at the log: how many pages were marked. */
  takeDirty(): number {
    return this.#log?.take().length ?? 0;
  }

  /** Blocks until the load is done. */
  run(load: Load): LoadFigures {
    const [queue] = this.#device.queues;
    const config = loadConfig(load, {
      queue,
      data: this.#data,
      sectors: this.#sectors,
      kickFd: queue.kickFd,
      position: this.#position,
    });
    const out = new BigUint64Array(layouts.LoadResult.byteSize / 8);
    const code = core.loadRun(config, out);
    this.#position = Number(out[layouts.LoadResult.position / 8]);
    check(code, `Cannot run a load of depth ${load.depth}`);
    return loadFigures(out);
  }

  close(): Promise<void> {
    return this.#device.close();
  }
}

/** What a load is run on. */
export interface LoadPlace {
  readonly queue: QueueDriver;
  /** Guest address of the data, `dataBytes` of it. */
  readonly data: bigint;
  readonly sectors: bigint;
  readonly kickFd: number;
  /** Where a packed ring goes on; 0x8000 at first. */
  readonly position: number;
}

/** The configuration of the core's load generator. */
export function loadConfig(load: Load, place: LoadPlace): DataView {
  const field = layouts.LoadConfig;
  const config = new DataView(new ArrayBuffer(field.byteSize));
  const { queue } = place;
  const [region] = queue.ram.regions;
  const { addresses } = queue.ring;
  const set64 = (offset: number, value: bigint | number) =>
    config.setBigUint64(offset, BigInt(value), true);
  const set32 = (offset: number, value: number) =>
    config.setUint32(offset, value, true);
  set64(field.memoryAddress, region.address);
  set64(field.memorySize, region.size);
  set64(field.memoryGpa, region.gpa);
  set64(field.descriptorOffset, addresses.descriptor - region.gpa);
  set64(field.availableOffset, addresses.available - region.gpa);
  set64(field.usedOffset, addresses.used - region.gpa);
  set64(field.dataOffset, place.data - region.gpa);
  set64(field.features, queue.features);
  set64(field.diskSectors, place.sectors);
  set64(field.requestCount, load.requestCount ?? 0);
  set64(field.seed, 42);
  set32(field.queueSize, queue.queueSize);
  set32(field.depth, load.depth);
  set32(field.requestBytes, load.requestBytes);
  set32(field.segmentCount, 1);
  set32(field.durationMs, load.durationMs ?? 0);
  set32(field.timeoutMs, 10_000);
  set32(
    field.operation,
    load.operation === "write" ? constants.loadWrite : constants.loadRead,
  );
  set32(
    field.flags,
    (load.isRandom ? constants.flagLoadRandom : 0) |
      (load.spins ? constants.flagLoadSpin : 0) |
      (load.verifies ? constants.flagLoadVerify : 0),
  );
  config.setInt32(field.kickFd, place.kickFd, true);
  config.setInt32(field.callFd, queue.callFd, true);
  set32(field.position, place.position);
  return config;
}

/** What the load generator found. */
export function loadFigures(out: BigUint64Array): LoadFigures {
  const result = layouts.LoadResult;
  const value = (offset: number) => Number(out[offset / 8]);
  const requests = value(result.requests);
  return {
    requests,
    errors: value(result.errors),
    perSecond: requests / (value(result.elapsedNs) / 1e9),
    kicks: value(result.kicks),
    calls: value(result.calls),
    p50: value(result.p50Ns),
    p99: value(result.p99Ns),
  };
}
