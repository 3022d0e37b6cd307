/**
 * The load generator: memory, rings and features come from TypeScript, the hot
 * loop, the driver's side of the rings, is in the core.
 *
 * @module
 */

import { constants, layouts } from "../ffi/abi.gen.ts";
import { core } from "../ffi/core.ts";
import { check } from "../ffi/errors.ts";
import type { QueueDriver, RamRegion } from "../frontend/mod.ts";

/** What to do, and how much of it. */
export interface Load {
  readonly operation: "read" | "write";
  /** Requests outstanding, in each queue. */
  readonly depth: number;
  readonly requestBytes: number;
  /** Buffers that a request's data is in; 1 unless given. */
  readonly segments?: number;
  /** The run ends after so long, or after so many requests in each queue. */
  readonly durationMs?: number;
  readonly requestCount?: number;
  readonly isRandom?: boolean;
  /** Looks at the used ring all the time instead of sleeping. */
  readonly spins?: boolean;
  /** Writes a pattern and compares what it reads back. */
  readonly verifies?: boolean;
}

/** What came of it, of all queues. */
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

/** What the generator works on; it owns none of it. */
export interface LoadTarget {
  readonly region: RamRegion;
  readonly queues: readonly QueueDriver[];
  /** Of 512 bytes. */
  readonly sectors: bigint;
}

/** Guest memory for the buffers of one queue. */
export const dataBytes = 8 << 20;

/** One queue of a target, and where its run goes on. */
interface LoadQueue {
  readonly driver: QueueDriver;
  readonly data: bigint;
  /** Of a packed ring. */
  position: number;
}

/** Puts loads on the queues of a disk. */
export class Loads {
  readonly #target: LoadTarget;
  readonly #queues: readonly LoadQueue[];

  /** The region needs room for `dataBytes` for each queue. */
  constructor(target: LoadTarget) {
    this.#target = target;
    const { allocator, gpa } = target.region;
    this.#queues = target.queues.map((driver) => {
      const offset = allocator.allocate(dataBytes, 4096);
      if (offset === null) throw new Error("The region has no room for data");
      return { driver, data: gpa + BigInt(offset), position: 0x8000 };
    });
  }

  /** Blocks until the load is done, on all queues. */
  run(load: Load): LoadFigures {
    const size = layouts.LoadConfig.byteSize;
    const count = this.#queues.length;
    const configs = new Uint8Array(size * count);
    this.#queues.forEach(({ driver, data, position }, i) => {
      const { sectors } = this.#target;
      const { kickFd } = driver;
      const place = { queue: driver, data, sectors, kickFd, position };
      configs.set(new Uint8Array(loadConfig(load, place).buffer), i * size);
    });
    const stride = layouts.LoadResult.byteSize / 8;
    const out = new BigUint64Array(stride * count);
    const code = count === 1
      ? core.loadRun(configs, out)
      : core.loadRunQueues(configs, count, out);
    const results = this.#queues.map((_, i) =>
      out.subarray(i * stride, (i + 1) * stride)
    );
    this.#queues.forEach((queue, i) => {
      queue.position = Number(results[i][layouts.LoadResult.position / 8]);
    });
    check(code, `Cannot run a load of depth ${load.depth}`);
    const all = results.map(loadFigures);
    const sum = (pick: (figures: LoadFigures) => number) =>
      all.reduce((total, figures) => total + pick(figures), 0);
    return {
      ...all[0],
      requests: sum(({ requests }) => requests),
      errors: sum(({ errors }) => errors),
      perSecond: sum(({ perSecond }) => perSecond),
      kicks: sum(({ kicks }) => kicks),
      calls: sum(({ calls }) => calls),
    };
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
  set32(field.segmentCount, load.segments ?? 1);
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
