/**
 * A guest with a block device, for tests: negotiation, then requests with one
 * line each.
 *
 * @module
 */

import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import {
  type Blk,
  blkDevice,
  type BlkOptions,
  type DiskObject,
} from "../../devices/mod.ts";
import { FrontendConnection } from "../../frontend/connection.ts";
import { GuestRam } from "../../driver/guest_ram.ts";
import { SplitDriver } from "../../driver/split_driver.ts";
import { type DeviceOptions, registerTarget, type Target } from "../../mod.ts";
import { gpa, ringAddress } from "../../protocol/address.ts";

export const sectorSize = 512;
/** Status bytes. */
export const OK = 0;
export const IOERR = 1;
export const UNSUPP = 2;
/** Request types. */
export const Type = {
  IN: 0,
  OUT: 1,
  FLUSH: 4,
  GET_ID: 8,
  DISCARD: 11,
  WRITE_ZEROES: 13,
} as const;

/** PROTOCOL_FEATURES (30). */
/** Its rings are split, and it has no IOMMU. */
const packedBit = 1n << 34n;
const accessPlatformBit = 1n << 33n;
const protocolFeaturesBit = 1n << 30n;
/** MQ, REPLY_ACK, BACKEND_REQ, CONFIG. */
const protocolFeatures = (1n << 0n) | (1n << 3n) | (1n << 5n) | (1n << 9n);

/** The header of a request. */
export function header(type: number, sector: number | bigint): Uint8Array {
  const view = new DataView(new ArrayBuffer(16));
  view.setUint32(0, type, true);
  view.setBigUint64(8, BigInt.asUintN(64, BigInt(sector)), true);
  return new Uint8Array(view.buffer);
}

/** A range of a discard or write zeroes. */
export function range(sector: number | bigint, count: number, flags = 0) {
  const view = new DataView(new ArrayBuffer(16));
  view.setBigUint64(0, BigInt.asUintN(64, BigInt(sector)), true);
  view.setUint32(8, count, true);
  view.setUint32(12, flags, true);
  return new Uint8Array(view.buffer);
}

/** `parts` one after the other. */
export function concat(parts: readonly Uint8Array[]): Uint8Array<ArrayBuffer> {
  const size = parts.reduce((sum, part) => sum + part.length, 0);
  const all = new Uint8Array(size);
  let position = 0;
  for (const part of parts) {
    all.set(part, position);
    position += part.length;
  }
  return all;
}

/** Bytes that differ from place to place and from seed to seed. */
export function pattern(size: number, seed = 1): Uint8Array<ArrayBuffer> {
  return Uint8Array.from(
    { length: size },
    (_, i) => (i * 31 + (i >> 8) * 7 + seed * 101) & 0xff,
  );
}

/** As deepEqual, which takes minutes to describe how large arrays differ. */
export function assertBytes(actual: Uint8Array, expected: Uint8Array): void {
  assert.equal(actual.length, expected.length, "bytes");
  const at = actual.findIndex((byte, i) => byte !== expected[i]);
  assert.equal(at, -1, `byte ${at}: ${actual[at]}, not ${expected[at]}`);
}

/** How a request is cut into descriptors. */
export type Framing = "apart" | "together" | "bytes" | "indirect";

function cut(bytes: Uint8Array, framing: Framing): Uint8Array[] {
  if (framing !== "bytes") return [bytes];
  return Array.from(bytes, (_, i) => bytes.subarray(i, i + 1));
}

export interface Answer {
  readonly status: number;
  /** Everything writable, without the status. */
  readonly data: Uint8Array<ArrayBuffer>;
  readonly written: number;
}

export interface GuestOptions {
  readonly queueSize?: number;
  readonly queueCount?: number;
  /** Features that the driver knows; all unless given. */
  readonly knows?: bigint;
}

/** A guest on a disk's socket. */
export class DiskGuest {
  readonly connection: FrontendConnection;
  readonly ram: GuestRam;
  readonly drivers: readonly SplitDriver[];
  readonly features: bigint;

  private constructor(
    connection: FrontendConnection,
    ram: GuestRam,
    drivers: readonly SplitDriver[],
    features: bigint,
  ) {
    this.connection = connection;
    this.ram = ram;
    this.drivers = drivers;
    this.features = features;
  }

  static async connect(
    path: string,
    options: GuestOptions = {},
  ): Promise<DiskGuest> {
    const { queueSize = 128, queueCount = 1, knows = ~0n } = options;
    const connection = await FrontendConnection.connect(path);
    const offered = await connection.getFeatures();
    const features = offered & (knows | protocolFeaturesBit | (1n << 32n)) &
      ~packedBit & ~accessPlatformBit;
    await connection.setProtocolFeatures(
      protocolFeatures & await connection.getProtocolFeatures(),
    );
    await connection.setOwner();
    await connection.setBackendChannel({ ack: true });
    await connection.setFeatures(features, { ack: true });
    // Two regions, so that data and ring need not be in the same.
    const ram = new GuestRam([
      { size: 1 << 20 },
      { size: 16 << 20, gpa: 1n << 32n },
    ]);
    await connection.setMemTable(ram.regions, { ack: true });
    const drivers: SplitDriver[] = [];
    for (let index = 0; index < queueCount; index++) {
      const driver = new SplitDriver(ram, { queueSize, features });
      drivers.push(driver);
      const { addresses } = driver.ring;
      const uvaOf = (address: bigint) => ringAddress(ram.toUva(address));
      await connection.setVringNum(index, queueSize);
      await connection.setVringBase(index, 0);
      await connection.setVringAddr({
        index,
        flags: 0,
        descriptor: uvaOf(addresses.descriptor),
        used: uvaOf(addresses.used),
        available: uvaOf(addresses.available),
        log: gpa(0n),
      });
      await connection.setVringCall(index, driver.callFd);
      await connection.setVringKick(index, driver.kickFd);
      await connection.setVringEnable(index, true, { ack: true });
    }
    return new DiskGuest(connection, ram, drivers, features);
  }

  /** Sends what a driver sends, and takes the answer apart. */
  async send(
    readable: readonly Uint8Array[],
    writable: readonly number[],
    options: { queue?: number; indirect?: boolean } = {},
  ): Promise<Answer> {
    const driver = this.drivers[options.queue ?? 0];
    const { written, data } = await driver.submit({
      readable,
      writable,
      indirect: options.indirect ?? false,
    });
    const all = concat(data);
    return {
      status: all[all.length - 1],
      data: all.slice(0, -1),
      written,
    };
  }

  request(
    type: number,
    sector: number | bigint,
    {
      data = new Uint8Array(0),
      size = 0,
      framing = "apart" as Framing,
      queue = 0,
    } = {},
  ): Promise<Answer> {
    const head = header(type, sector);
    const indirect = framing === "indirect";
    if (framing === "together") {
      return this.send([concat([head, data])], [size + 1], { queue });
    }
    const readable = data.length === 0
      ? cut(head, framing)
      : [...cut(head, framing), ...cut(data, framing)];
    const writable = framing === "bytes"
      ? Array.from({ length: size + 1 }, () => 1)
      : size === 0
      ? [1]
      : [size, 1];
    return this.send(readable, writable, { queue, indirect });
  }

  read(
    sector: number | bigint,
    size: number,
    framing?: Framing,
  ): Promise<Answer> {
    return this.request(Type.IN, sector, { size, framing });
  }

  write(
    sector: number | bigint,
    data: Uint8Array<ArrayBuffer>,
    framing?: Framing,
  ): Promise<Answer> {
    return this.request(Type.OUT, sector, { data, framing });
  }

  /** Configuration space, as the driver reads it. */
  async config(): Promise<DataView> {
    const bytes = await this.connection.getConfig(0, 60);
    return new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  }

  async close(): Promise<void> {
    for (const driver of this.drivers) driver.close();
    this.connection.close();
    await this.connection.closed;
    this.ram.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

/** A whole disk in an array, with every method asynchronous. */
export function arrayDisk(size: number): DiskObject & { bytes: Uint8Array } {
  const bytes = new Uint8Array(size);
  const later = () => new Promise<void>((resolve) => setImmediate(resolve));
  return {
    bytes,
    size,
    async read(offset, into) {
      await later();
      into.set(bytes.subarray(offset, offset + into.length));
    },
    async write(offset, data) {
      await later();
      bytes.set(data, offset);
    },
    flush: later,
    async discard(offset, length) {
      await later();
      bytes.fill(0, offset, offset + length);
    },
    async writeZeroes(offset, length) {
      await later();
      bytes.fill(0, offset, offset + length);
    },
  };
}

/** A folder of its own, for sockets and files. */
export class TemporaryFolder {
  readonly path: string = mkdtempSync(join(tmpdir(), "vhost2-test-"));

  file(name: string): string {
    return join(this.path, name);
  }

  [Symbol.dispose](): void {
    rmSync(this.path, { recursive: true, force: true });
  }
}

/** A disk being served, and its first guest. */
export class ServedDisk {
  readonly disk: Blk;
  readonly target: Target;
  readonly guest: DiskGuest;
  readonly path: string;
  /** What went wrong with the back-end. */
  readonly errors: string[];
  readonly #folder: TemporaryFolder;

  private constructor(
    disk: Blk,
    target: Target,
    guest: DiskGuest,
    folder: TemporaryFolder,
    errors: string[],
  ) {
    this.disk = disk;
    this.target = target;
    this.guest = guest;
    this.path = folder.file("disk.sock");
    this.errors = errors;
    this.#folder = folder;
  }

  static async start(
    options: BlkOptions,
    guestOptions: GuestOptions = {},
    targetOptions: Pick<DeviceOptions, "workers" | "pollMicroseconds"> = {},
  ): Promise<ServedDisk> {
    const folder = new TemporaryFolder();
    const address = folder.file("disk.sock");
    const errors: string[] = [];
    const onError = (error: Error) => void errors.push(error.message);
    const disk = blkDevice({ onError, ...options });
    const target = await registerTarget({
      transport: "vhost-user",
      address,
      ...disk,
      ...targetOptions,
      onError,
    });
    const guest = await DiskGuest.connect(address, guestOptions);
    return new ServedDisk(disk, target, guest, folder, errors);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.guest.close();
    await this.target.unregister();
    await this.disk.close();
    this.#folder[Symbol.dispose]();
  }
}
