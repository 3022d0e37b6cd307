/**
 * Loads on a vhost-user disk: a front-end, and the load generator on its
 * queues.
 *
 * @module
 */

import {
  type DirtyLog,
  featureMask,
  type QueueDriver,
  type RamRegion,
  uva,
  VhostUserDevice,
  VirtioFeature,
} from "../frontend/mod.ts";
import { dataBytes, type Load, type LoadFigures, Loads } from "./load.ts";

/** How the front-end is. */
export interface GeneratorOptions {
  /** Tables for requests; true unless given. */
  readonly indirect?: boolean;
  /** 256 unless given. */
  readonly queueSize?: number;
  /** 1 unless given. */
  readonly queues?: number;
  /** How many of them have loads, the others are idle; all unless given. */
  readonly driven?: number;
  /** Packed rings; split ones unless given. */
  readonly packed?: boolean;
  /** Protocol features that are acked; all that are known unless given. */
  readonly protocolFeatures?: bigint;
  /** Has requests tracked in an inflight region. */
  readonly recovers?: boolean;
  /** Parts in which the back-end is told of the guest's memory; 1 unless given. */
  readonly regions?: number;
}

/** VIRTIO_BLK_F_FLUSH and VIRTIO_BLK_F_MQ. */
const blkFlush = 9;
const blkMq = 12;
/** Beside the data: rings, which lie at the beginning. */
const ringBytes = 1 << 20;

/** Features that the generator negotiates. */
export function wantedFeatures(options: GeneratorOptions): bigint {
  return featureMask(
    VirtioFeature.VERSION_1,
    VirtioFeature.PROTOCOL_FEATURES,
    VirtioFeature.RING_EVENT_IDX,
    // Who cannot flush has every write made durable before it completes.
    blkFlush,
    blkMq,
    ...(options.indirect === false ? [] : [VirtioFeature.RING_INDIRECT_DESC]),
  );
}

/** A connection to a vhost-user-blk back-end for running loads on. */
export class LoadGenerator {
  readonly #device: VhostUserDevice<QueueDriver>;
  readonly #loads: Loads;
  #log: DirtyLog | undefined;

  private constructor(
    device: VhostUserDevice<QueueDriver>,
    sectors: bigint,
    driven: number,
  ) {
    this.#device = device;
    const [region] = device.ram.regions;
    const queues = device.queues.slice(0, driven);
    this.#loads = new Loads({ region, queues, sectors });
  }

  /** Connects; the rings are split, indirect and of 256 unless told. */
  static async open(
    path: string,
    options: GeneratorOptions = {},
  ): Promise<LoadGenerator> {
    const { queues = 1, driven = queues, regions = 1 } = options;
    const device = await VhostUserDevice.open({
      path,
      features: wantedFeatures(options),
      queueSize: options.queueSize ?? 256,
      queueCount: queues,
      ramSize: ringBytes + driven * (dataBytes + 4096),
      usesCalls: false,
      packed: options.packed ?? false,
      protocolFeatures: options.protocolFeatures,
      recovers: options.recovers ?? false,
      start: regions === 1,
    });
    if (regions > 1) await startIn(device, regions);
    const config = await device.getConfig(0, 8);
    return new LoadGenerator(
      device,
      new DataView(config.buffer, config.byteOffset).getBigUint64(0, true),
      driven,
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

  /** Blocks until the load is done. Throws when a request fails. */
  run(load: Load): LoadFigures {
    const figures = this.#loads.run(load);
    if (figures.errors > 0 && !load.verifies) {
      throw new Error(`${figures.errors} of ${figures.requests} I/O errors`);
    }
    return figures;
  }

  close(): Promise<void> {
    return this.#device.close();
  }
}

/**
 * Starts the device with its memory cut into `count` regions, each a mapping of
 * its own in the back-end, while it stays in one piece here.
 */
async function startIn(
  device: VhostUserDevice<QueueDriver>,
  count: number,
): Promise<void> {
  const { connection } = device;
  const [whole] = device.ram.regions;
  await device.activate();
  await device.removeRegion(whole);
  for (const part of partsOf(whole, count)) {
    await connection.addMemRegion({ description: part, fd: whole.fd }, {
      ack: true,
    });
  }
  for (let i = 0; i < device.queues.length; i++) await device.startQueue(i);
}

/** The rings stay in the first; the others are as small as they may be. */
function partsOf(whole: RamRegion, count: number) {
  const share = Math.floor((whole.size - ringBytes) / (count - 1) / 4096) *
    4096;
  const first = whole.size - share * (count - 1);
  return Array.from({ length: count }, (_, i) => {
    const start = BigInt(i === 0 ? 0 : first + share * (i - 1));
    return {
      ...whole.description,
      gpa: whole.gpa + start as typeof whole.gpa,
      uva: uva(whole.uva + start),
      size: BigInt(i === 0 ? first : share),
      mmapOffset: start,
    };
  });
}
