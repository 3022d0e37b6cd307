/**
 * A process that serves two devices: the one under attack, and a bystander
 * that must not notice. Whatever a test does, at its end the descriptors and
 * the guest memory of the process are as before.
 *
 * @module
 */

import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import { check } from "../../ffi/errors.ts";
import { FrontendConnection } from "../../frontend/connection.ts";
import { VhostUserDevice } from "../../frontend/device.ts";
import type { VhostUserDeviceOptions } from "../../frontend/negotiation.ts";
import {
  blkDevice,
  type BlkOptions,
  type DeviceOptions,
  featureMask,
  memoryBacking,
  ProtocolFeature,
  registerTarget,
  type Target,
} from "../../mod.ts";
import { pattern } from "../devices/disk_guest.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { eventually, Signal, within } from "../support/wait.ts";
import { assertGuestMemory, guestMemoryBytes } from "./accounting.ts";

export const diskSize = 1 << 20;
/** All that is offered but RING_PACKED: the rings here are split. */
const features = ~((1n << 33n) | (1n << 34n));
const protocolFeatures = featureMask(
  ProtocolFeature.MQ,
  ProtocolFeature.REPLY_ACK,
  ProtocolFeature.BACKEND_REQ,
  ProtocolFeature.CONFIG,
  ProtocolFeature.RESET_DEVICE,
  ProtocolFeature.CONFIGURE_MEM_SLOTS,
  ProtocolFeature.STATUS,
);

/** What is attacked; a disk in memory with two queues unless given. */
export type Victim = DeviceOptions | { readonly disk: BlkOptions };

/** The header of a block request. */
export function blkHeader(type: number, sector = 0): Uint8Array<ArrayBuffer> {
  const view = new DataView(new ArrayBuffer(16));
  view.setUint32(0, type, true);
  view.setBigUint64(8, BigInt(sector), true);
  return new Uint8Array(view.buffer);
}

/** A second device in the process, with a guest of its own. */
export class Bystander {
  /** What its target had to report: nothing, whatever happens beside it. */
  readonly errors: string[] = [];
  #device!: VhostUserDevice;
  #seed = 0;

  async start(path: string): Promise<void> {
    this.#device = await VhostUserDevice.open({ path, features });
  }

  /** Writes to its disk and reads it back. */
  async serve(): Promise<void> {
    const seed = ++this.#seed;
    const sector = seed % 100 * 8;
    const [driver] = this.#device.queues;
    const data = pattern(4096, seed);
    const written = await within(
      driver.submit({ readable: [blkHeader(1, sector), data], writable: [1] }),
      "the bystander's write",
    );
    assert.equal(written.data[0][0], 0);
    const read = await within(
      driver.submit({ readable: [blkHeader(0, sector)], writable: [4096, 1] }),
      "the bystander's read",
    );
    assert.deepEqual(read.data, [data, Uint8Array.of(0)]);
    assert.deepEqual(this.errors, []);
  }

  close(): Promise<void> {
    return this.#device.close();
  }
}

/** What a test of an attack has. */
export class World {
  /** Socket of the target under attack. */
  readonly path: string;
  readonly target: Target;
  readonly other: Bystander;
  /** What the target under attack has reported. */
  readonly errors: string[];
  readonly #reported: Signal;
  readonly #events: number[] = [];
  #seen = 0;
  #errorFd: number | undefined;

  constructor(
    path: string,
    target: Target,
    other: Bystander,
    errors: string[],
    reported: Signal,
  ) {
    this.path = path;
    this.target = target;
    this.other = other;
    this.errors = errors;
    this.#reported = reported;
  }

  /** Awaits a report that fits, among those that no call has taken. */
  async reported(pattern: RegExp): Promise<string> {
    const find = () =>
      this.errors.findIndex((message, i) =>
        i >= this.#seen && pattern.test(message)
      );
    try {
      await this.#reported.until(() => find() >= 0, `a report like ${pattern}`);
    } catch (error) {
      throw new Error(`${error}; reported: ${this.errors.join(" | ")}`);
    }
    const index = find();
    this.#seen = index + 1;
    return this.errors[index];
  }

  /** An eventfd that is closed with the world. */
  eventfd(): number {
    const fd = check(core.eventfdCreate(), "Cannot make an eventfd");
    this.#events.push(fd);
    return fd;
  }

  /** One eventfd for the err descriptors of all attacks. */
  get errorFd(): number {
    return this.#errorFd ??= this.eventfd();
  }

  /** Awaits that an eventfd of ours was signalled. */
  async signalled(fd: number): Promise<void> {
    await eventually(() => core.eventfdTake(fd) > 0, "an event is signalled");
  }

  /** An open device with two started queues. */
  open(options: VhostUserDeviceOptions = {}): Promise<VhostUserDevice> {
    return VhostUserDevice.open({
      path: this.path,
      features,
      protocolFeatures,
      acksAll: true,
      ramSize: 4 << 20,
      ...options,
    });
  }

  /** A connection with the features above negotiated, nothing set up. */
  async connect(): Promise<FrontendConnection> {
    const connection = await FrontendConnection.connect(this.path);
    const offered = await connection.getFeatures();
    await connection.setProtocolFeatures(
      protocolFeatures & await connection.getProtocolFeatures(),
    );
    await connection.setOwner({ ack: true });
    await connection.setFeatures(offered & features, { ack: true });
    return connection;
  }

  /** Ends a connection of ours, and awaits that its device has gone too. */
  async leave(connection: FrontendConnection): Promise<void> {
    connection.close();
    await this.ended(connection);
  }

  /** Awaits that the back-end has ended a connection and let go of it. */
  async ended(connection: FrontendConnection): Promise<void> {
    await within(connection.closed, "the end of the connection");
    await eventually(
      () => this.target.devices.length === 0,
      "the device is gone",
    );
  }

  /** Repeats an attack; it leaves neither descriptors nor memory behind. */
  async repeat(
    count: number,
    attack: (round: number) => Promise<void>,
  ): Promise<void> {
    const before = guestMemoryBytes();
    await withoutDescriptorLeak(async () => {
      for (let round = 0; round < count; round++) await attack(round);
    });
    assertGuestMemory(before);
  }

  close(): void {
    for (const fd of this.#events.splice(0)) core.descriptorClose(fd);
  }
}

function deviceOptions(
  victim: Victim,
  onError: (error: Error) => void,
): { options: DeviceOptions; close: () => Promise<void> } {
  if (!("disk" in victim)) {
    return { options: victim, close: () => Promise.resolve() };
  }
  const disk = blkDevice({ onError, ...victim.disk });
  return { options: disk, close: () => disk.close() };
}

/** Runs an attack beside a device that must go on as if nothing was. */
export async function withBystander(
  attack: (world: World) => Promise<void>,
  victim: Victim | (() => Victim) = {
    disk: { backing: memoryBacking(diskSize), numQueues: 2 },
  },
): Promise<void> {
  const before = guestMemoryBytes();
  await withoutDescriptorLeak(async () => {
    using folder = new TemporaryFolder();
    const other = new Bystander();
    await using quiet = blkDevice({ backing: memoryBacking(diskSize) });
    const beside = folder.file("beside");
    await using _besideTarget = await registerTarget({
      transport: "vhost-user",
      address: beside,
      onError: (error) => void other.errors.push(error.message),
      ...quiet,
    });
    const path = folder.file("victim");
    const errors: string[] = [];
    const reported = new Signal();
    const onError = (error: Error) => {
      errors.push(error.message);
      reported.notify();
    };
    const { options, close } = deviceOptions(
      typeof victim === "function" ? victim() : victim,
      onError,
    );
    const target = await registerTarget({
      transport: "vhost-user",
      address: path,
      onError,
      ...options,
    });
    const world = new World(path, target, other, errors, reported);
    try {
      await other.start(beside);
      try {
        await other.serve();
        await attack(world);
        await other.serve();
      } finally {
        await other.close();
      }
    } finally {
      await target.unregister();
      await close();
      world.close();
    }
  });
  assertGuestMemory(before);
}
