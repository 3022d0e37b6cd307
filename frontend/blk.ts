/**
 * A small virtio-blk driver over a vhost-user device (VIRTIO 1.3 section 5.2).
 *
 * @module
 */

import { Vhost2Error } from "../ffi/errors.ts";
import { BlkFeature } from "../protocol/blk.ts";
import { featureMask, hasFeature } from "../protocol/features.ts";
import { VhostUserDevice } from "./device.ts";
import {
  type RingFormatOptions,
  supportedFeatures,
  type VhostUserDeviceOptions,
} from "./negotiation.ts";
import type { QueueDriver } from "../driver/queue_driver.ts";

export { BlkFeature };

/** What this client can do: no zones, lifetimes or secure erase. */
const knownFeatures = featureMask(...Object.values(BlkFeature)) &
  ~featureMask(
    BlkFeature.LIFETIME,
    BlkFeature.SECURE_ERASE,
    BlkFeature.ZONED,
  );

/** VIRTIO_BLK_T_*. */
export const BlkRequestType = {
  IN: 0,
  OUT: 1,
  FLUSH: 4,
  GET_ID: 8,
  DISCARD: 11,
  WRITE_ZEROES: 13,
} as const;

/** VIRTIO_BLK_S_*. */
export const BlkStatus = { OK: 0, IOERR: 1, UNSUPP: 2 } as const;

/** Bytes; all offsets and sizes of requests are in this unit. */
export const SECTOR_SIZE = 512;
const ID_SIZE = 20;
/** VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP. */
const FLAG_UNMAP = 1;
/** struct virtio_blk_config up to write_zeroes_may_unmap and its padding. */
const CONFIG_SIZE = 60;
/** Status before the device has written one. */
const NO_STATUS = 0xff;

/** struct virtio_blk_config; a field counts if its feature is negotiated. */
export interface BlkConfig {
  /** Sectors of 512 bytes. */
  readonly capacity: bigint;
  /** Bytes of one data buffer at most (SIZE_MAX). */
  readonly sizeMax: number;
  /** Data buffers of one request at most (SEG_MAX). */
  readonly segMax: number;
  /** Bytes (BLK_SIZE). */
  readonly blockSize: number;
  /** Logical blocks to a physical one, as a power of two (TOPOLOGY). */
  readonly physicalBlockExponent: number;
  readonly alignmentOffset: number;
  /** Logical blocks. */
  readonly minIoSize: number;
  /** Logical blocks. */
  readonly optIoSize: number;
  /** Writeback rather than write-through (CONFIG_WCE). */
  readonly isWriteback: boolean;
  /** MQ. */
  readonly queueCount: number;
  /** Sectors (DISCARD). */
  readonly maxDiscardSectors: number;
  readonly maxDiscardSegments: number;
  /** Sectors. */
  readonly discardSectorAlignment: number;
  /** Sectors (WRITE_ZEROES). */
  readonly maxWriteZeroesSectors: number;
  readonly maxWriteZeroesSegments: number;
  readonly mayWriteZeroesUnmap: boolean;
}

/** Reads struct virtio_blk_config. */
export function decodeBlkConfig(bytes: Uint8Array): BlkConfig {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return {
    capacity: view.getBigUint64(0, true),
    sizeMax: view.getUint32(8, true),
    segMax: view.getUint32(12, true),
    blockSize: view.getUint32(20, true),
    physicalBlockExponent: view.getUint8(24),
    alignmentOffset: view.getUint8(25),
    minIoSize: view.getUint16(26, true),
    optIoSize: view.getUint32(28, true),
    isWriteback: view.getUint8(32) !== 0,
    queueCount: view.getUint16(34, true),
    maxDiscardSectors: view.getUint32(36, true),
    maxDiscardSegments: view.getUint32(40, true),
    discardSectorAlignment: view.getUint32(44, true),
    maxWriteZeroesSectors: view.getUint32(48, true),
    maxWriteZeroesSegments: view.getUint32(52, true),
    mayWriteZeroesUnmap: view.getUint8(56) !== 0,
  };
}

/** struct virtio_blk_outhdr: type, reserved, sector. */
export function encodeBlkHeader(type: number, sector: bigint): Uint8Array {
  const header = new Uint8Array(16);
  const view = new DataView(header.buffer);
  view.setUint32(0, type, true);
  view.setBigUint64(8, BigInt.asUintN(64, sector), true);
  return header;
}

/** struct virtio_blk_discard_write_zeroes: sector, num_sectors, flags. */
export function encodeBlkRange(
  sector: bigint,
  sectorCount: number,
  flags: number,
): Uint8Array {
  const range = new Uint8Array(16);
  const view = new DataView(range.buffer);
  view.setBigUint64(0, BigInt.asUintN(64, sector), true);
  view.setUint32(8, sectorCount, true);
  view.setUint32(12, flags, true);
  return range;
}

/** The device answered a request with a status other than OK. */
export class BlkError extends Vhost2Error {
  override readonly name: string = "BlkError";
  /** VIRTIO_BLK_S_*, or 255 when the device wrote none. */
  readonly status: number;

  constructor(what: string, status: number) {
    const word = status === BlkStatus.IOERR
      ? "I/O error"
      : status === BlkStatus.UNSUPP
      ? "not supported"
      : `status ${status}`;
    super("OP", `Cannot ${what}: ${word}`);
    this.status = status;
  }
}

/** Options of one request. */
export interface BlkRequestOptions {
  /** The queue; in turns unless given. */
  readonly queue?: number;
  /** Whether the descriptors go into an indirect table. */
  readonly indirect?: boolean;
}

/** What a raw request brings back. */
export interface BlkAnswer {
  readonly status: number;
  /** Bytes that the device says it wrote, the status byte included. */
  readonly written: number;
  readonly data: Uint8Array<ArrayBuffer>;
}

/**
 * A disk that some vhost-user back-end serves.
 *
 * @example
 * ```ts
 * import { blkDevice, memoryBacking, registerTarget } from "vhost2";
 * import { BlkClient } from "vhost2/frontend";
 *
 * // Any vhost-user disk will do; here is one.
 * const path = `${Deno.makeTempDirSync()}/disk.sock`;
 * await using target = await registerTarget({
 *   transport: "vhost-user",
 *   address: path,
 *   ...blkDevice({ backing: memoryBacking(1 << 20) }),
 * });
 * const disk = await BlkClient.open({ path });
 * await disk.write(0, new Uint8Array(512).fill(7));
 * const [first] = await disk.read(0, 512);
 * if (first !== 7) throw new Error(`${target.name}: not what was written`);
 * await disk.close();
 * ```
 */
export class BlkClient {
  readonly device: VhostUserDevice<QueueDriver>;
  #config: BlkConfig;
  #turn = 0;

  private constructor(device: VhostUserDevice<QueueDriver>, config: BlkConfig) {
    this.device = device;
    this.#config = config;
  }

  /** Opens the device with all features that this client uses. */
  static async open(
    options: VhostUserDeviceOptions & Partial<RingFormatOptions>,
  ): Promise<BlkClient> {
    const device = await VhostUserDevice.open({
      features: supportedFeatures | knownFeatures,
      packed: false,
      ...options,
    });
    try {
      const config = await device.getConfig(0, CONFIG_SIZE);
      return new BlkClient(device, decodeBlkConfig(config));
    } catch (error) {
      await device.close();
      throw error;
    }
  }

  /** Configuration space as it was when last read. */
  get config(): BlkConfig {
    return this.#config;
  }

  /** Bytes. */
  get size(): number {
    return Number(this.#config.capacity) * SECTOR_SIZE;
  }

  /** Reads configuration space again, after a change. */
  async refreshConfig(): Promise<BlkConfig> {
    const bytes = await this.device.getConfig(0, CONFIG_SIZE);
    return this.#config = decodeBlkConfig(bytes);
  }

  /** Writes `writeback`; needs CONFIG_WCE. */
  async setWriteback(isWriteback: boolean): Promise<void> {
    await this.device.setConfig(32, Uint8Array.of(isWriteback ? 1 : 0));
    await this.refreshConfig();
  }

  /** Reads `length` bytes at `offset`, both multiples of 512. */
  async read(
    offset: number,
    length: number,
    options?: BlkRequestOptions,
  ): Promise<Uint8Array<ArrayBuffer>> {
    const { IN } = BlkRequestType;
    const sector = sectorOf(offset);
    const answer = await this.request(IN, sector, [], length, options);
    requireOk(`read ${length} bytes at ${offset}`, answer);
    return answer.data;
  }

  /** Writes `data` at `offset`, both multiples of 512 bytes. */
  async write(
    offset: number,
    data: Uint8Array,
    options?: BlkRequestOptions,
  ): Promise<void> {
    const { OUT } = BlkRequestType;
    const sector = sectorOf(offset);
    const answer = await this.request(OUT, sector, [data], 0, options);
    requireOk(`write ${data.length} bytes at ${offset}`, answer);
  }

  /** Makes what was written durable. */
  async flush(options?: BlkRequestOptions): Promise<void> {
    const answer = await this.request(BlkRequestType.FLUSH, 0n, [], 0, options);
    requireOk("flush", answer);
  }

  /** Says that the range is not needed any more. */
  async discard(
    offset: number,
    length: number,
    options?: BlkRequestOptions,
  ): Promise<void> {
    const { DISCARD } = BlkRequestType;
    const range = encodeBlkRange(sectorOf(offset), length / SECTOR_SIZE, 0);
    const answer = await this.request(DISCARD, 0n, [range], 0, options);
    requireOk(`discard ${length} bytes at ${offset}`, answer);
  }

  /** Writes zeroes; with `unmap` the range may lose its storage. */
  async writeZeroes(
    offset: number,
    length: number,
    options: BlkRequestOptions & { readonly unmap?: boolean } = {},
  ): Promise<void> {
    const { WRITE_ZEROES } = BlkRequestType;
    const flags = options.unmap ? FLAG_UNMAP : 0;
    const count = length / SECTOR_SIZE;
    const range = encodeBlkRange(sectorOf(offset), count, flags);
    const answer = await this.request(WRITE_ZEROES, 0n, [range], 0, options);
    requireOk(`write zeroes to ${length} bytes at ${offset}`, answer);
  }

  /** The serial number, at most 20 bytes. */
  async getId(options?: BlkRequestOptions): Promise<string> {
    const { GET_ID } = BlkRequestType;
    const answer = await this.request(GET_ID, 0n, [], ID_SIZE, options);
    requireOk("get the id", answer);
    const end = answer.data.indexOf(0);
    return new TextDecoder().decode(
      end < 0 ? answer.data : answer.data.subarray(0, end),
    );
  }

  /** Any request, checked by nobody; its status is returned, not thrown. */
  async request(
    type: number,
    sector: bigint,
    readable: readonly Uint8Array[],
    writableSize: number,
    options: BlkRequestOptions = {},
  ): Promise<BlkAnswer> {
    const { queues, features } = this.device;
    const driver = queues[options.queue ?? this.#turn++ % queues.length];
    const limit = hasFeature(features, BlkFeature.SIZE_MAX)
      ? this.#config.sizeMax || Infinity
      : Infinity;
    const { written, data } = await driver.submit({
      readable: [
        encodeBlkHeader(type, sector),
        ...readable.flatMap((bytes) => pieces(bytes, limit)),
      ],
      writable: [...sizes(writableSize, limit), 1],
      initial: NO_STATUS,
      indirect: options.indirect,
    });
    const status = data.pop()![0];
    return { status, written, data: joined(data, writableSize) };
  }

  /** Stops the queues and closes the device. */
  close(): Promise<void> {
    return this.device.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

function sectorOf(offset: number): bigint {
  if (Number.isSafeInteger(offset) && offset % SECTOR_SIZE === 0) {
    return BigInt(offset / SECTOR_SIZE);
  }
  throw new Vhost2Error(
    "OPTION",
    `Cannot use offset ${offset}: it is no multiple of ${SECTOR_SIZE}`,
  );
}

function requireOk(what: string, { status }: BlkAnswer): void {
  if (status !== BlkStatus.OK) throw new BlkError(what, status);
}

function sizes(total: number, limit: number): number[] {
  const list: number[] = [];
  for (let rest = total; rest > 0; rest -= limit) {
    list.push(Math.min(rest, limit));
  }
  return list;
}

function pieces(bytes: Uint8Array, limit: number): Uint8Array[] {
  let start = 0;
  return sizes(bytes.length, limit).map((size) =>
    bytes.subarray(start, start += size)
  );
}

function joined(
  parts: readonly Uint8Array<ArrayBuffer>[],
  size: number,
): Uint8Array<ArrayBuffer> {
  if (parts.length === 1) return parts[0];
  const all = new Uint8Array(size);
  let offset = 0;
  for (const part of parts) {
    all.set(part, offset);
    offset += part.length;
  }
  return all;
}
