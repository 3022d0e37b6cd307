// Packed rings of a hostile guest: the rows of ring_test.ts again, as far as
// they are about the ring. Rows are those of the catalogue of hostile inputs.
import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import {
  DescriptorFlag,
  type PackedDriver,
  PackedFlag,
  VhostUserDevice,
  type VhostUserDeviceOptions,
} from "../../frontend/mod.ts";
import { nullBacking } from "../../mod.ts";
import type { Request } from "../../mod.ts";
import { test } from "../harness.ts";
import { Events } from "../support/wait.ts";
import { holding } from "./holding.ts";
import { blkHeader, diskSize, withBystander, type World } from "./world.ts";

const { NEXT, WRITE, INDIRECT } = DescriptorFlag;
const rounds = 10;
const unmapped = 0xdead_0000_0000n;
const queueSize = 128;

type PackedDevice = VhostUserDevice<PackedDriver>;
type Descriptor = [address: bigint, length: number, flags: number];

interface Attack {
  readonly device: PackedDevice;
  readonly driver: PackedDriver;
  /** Memory to play with. */
  readonly buffer: bigint;
}

function openPacked(
  world: World,
  options: VhostUserDeviceOptions = {},
): Promise<PackedDevice> {
  return VhostUserDevice.open({
    path: world.path,
    features: ~0n,
    acksAll: true,
    ramSize: 4 << 20,
    queueSize,
    ...options,
    packed: true,
  });
}

/** Reads a sector; the status. */
async function read(driver: PackedDriver): Promise<number> {
  const { data } = await driver.submit({
    readable: [blkHeader(0)],
    writable: [512, 1],
  });
  return data[1][0];
}

function publish(driver: PackedDriver, ...chain: Descriptor[]): void {
  driver.publish(
    chain.map(([address, length, flags]) => ({
      address,
      length,
      id: 0,
      flags,
    })),
  );
}

/** An indirect table at `buffer`. */
function indirect(
  { device, driver, buffer }: Attack,
  entries: readonly Descriptor[],
  length = 16 * entries.length,
): void {
  const bytes = device.ram.bytes(buffer, 16 * entries.length);
  const table = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  entries.forEach(([address, size, flags], i) => {
    table.setBigUint64(16 * i, address, true);
    table.setUint32(16 * i + 8, size, true);
    table.setUint16(16 * i + 14, flags, true);
  });
  publish(driver, [buffer, length, INDIRECT]);
}

/** As in ring_test.ts: queue 0 breaks and heals, nobody else notices. */
function assertBreaks(
  name: string,
  reason: RegExp,
  attack: (attack: Attack) => void,
): void {
  test(`packed, ${name}`, () =>
    withBystander(async (world) => {
      const error = world.errorFd;
      await world.repeat(rounds, async () => {
        const device = await openPacked(world, { queueCount: 2 });
        const { connection, queues: [driver, sound] } = device;
        await connection.setVringErr(0, error, { ack: true });
        const buffer = device.ram.allocate(65536, 16);
        attack({ device, driver, buffer });
        driver.kick();
        const told = await world.reported(reason);
        assert.match(told, /Cannot go on with queue 0 of/);
        await world.signalled(error);
        const count = world.errors.length;
        for (let i = 0; i < 3; i++) driver.kick();
        assert.equal(await read(sound), 0);
        assert.deepEqual(driver.strays, [], "nothing was completed");
        assert.equal(world.errors.length, count, "told once");
        assert.equal(core.eventfdTake(error), 0);
        await world.other.serve();
        await device.stopQueue(0);
        driver.reset();
        await device.startQueue(0, { base: driver.firstBase });
        assert.equal(await read(driver), 0);
        await device.close();
      });
    }));
}

assertBreaks(
  "row 13: a buffer outside guest memory",
  /0xdead00000000 is not mapped guest memory/,
  ({ driver }) => publish(driver, [unmapped, 16, 0]),
);

assertBreaks(
  "row 13: a buffer that begins in guest memory and ends outside",
  /is not mapped guest memory/,
  ({ driver, device }) =>
    publish(driver, [BigInt(device.ram.regions[0].size) - 8n, 16, 0]),
);

assertBreaks(
  "row 13: a buffer that wraps around 2^64",
  /is not mapped guest memory/,
  ({ driver }) => publish(driver, [2n ** 64n - 8n, 16, 0]),
);

assertBreaks(
  "row 13: an indirect table outside guest memory",
  /is not mapped guest memory/,
  ({ driver }) => publish(driver, [unmapped, 16, INDIRECT]),
);

assertBreaks(
  "row 25: descriptors that are unmapped and without a byte, alone",
  /a chain is empty/,
  ({ driver }) => publish(driver, [unmapped, 0, NEXT], [unmapped, 0, WRITE]),
);

assertBreaks(
  "row 37: a buffer id beyond the queue",
  /head 65535 is outside the descriptor table/,
  ({ driver, buffer }) =>
    driver.publish([{ address: buffer, length: 1, id: 0xffff, flags: 0 }]),
);

assertBreaks(
  "row 38: an indirect table that sums up beyond 2^32 bytes",
  /4 GiB or more|is not mapped guest memory/,
  (attack) =>
    indirect(
      attack,
      Array.from({ length: 64 }, () => [attack.buffer, 0xffffffff, 0]),
    ),
);

assertBreaks(
  "row 40: NEXT all the way round",
  /more than 128 descriptors/,
  ({ driver, buffer }) =>
    publish(
      driver,
      ...Array.from({ length: queueSize }, (): Descriptor => [buffer, 1, NEXT]),
    ),
);

assertBreaks(
  "row 40: an indirect table longer than the queue and than any driver's",
  /an indirect table has 16400 bytes/,
  (attack) =>
    indirect(attack, Array.from({ length: 1025 }, () => [attack.buffer, 1, 0])),
);

for (const length of [0, 1, 15, 17, 0xffffffff, 0xfffffff0]) {
  assertBreaks(
    `row 48: an indirect table of ${length} bytes`,
    /an indirect table has \d+ bytes|is not mapped guest memory/,
    (attack) => indirect(attack, [[attack.buffer, 16, 0]], length),
  );
}

assertBreaks(
  "row 44: a status byte outside guest memory",
  /0xdead00000000 is not mapped guest memory/,
  ({ driver, buffer }) =>
    publish(driver, [buffer, 16, NEXT], [unmapped, 1, WRITE]),
);

test("packed, row 13: a buffer over two regions that touch only in guest addresses is cut there", () =>
  withBystander(async (world) => {
    const half = 1 << 20;
    const device = await openPacked(world, {
      regions: [
        { size: half, gpa: 0n, uva: 1n << 44n },
        { size: half, gpa: BigInt(half), uva: 1n << 40n },
      ],
    });
    const [driver] = device.queues;
    const [first, second] = device.ram.regions;
    const header = device.ram.allocate(17);
    device.ram.write(header, blkHeader(0));
    first.bytes.fill(0xff, half - 1536);
    second.bytes.fill(0xff, 0, 8192);
    await driver.submitChain([
      { address: header, length: 16, isWritable: false },
      { address: BigInt(half) - 1536n, length: 4096, isWritable: true },
      { address: header + 16n, length: 1, isWritable: true },
    ]);
    assert.ok(first.bytes.subarray(half - 1536).every((byte) => byte === 0));
    assert.ok(second.bytes.subarray(0, 2560).every((byte) => byte === 0));
    assert.equal(second.bytes[2560], 0xff);
    await device.close();
  }));

for (const name of ["descriptor", "available", "used"] as const) {
  test(`packed, rows 13, 14: a ${name} area over two regions, or past the end of one, is refused`, () =>
    withBystander(async (world) => {
      const half = 1 << 20;
      const device = await openPacked(world, {
        start: false,
        regions: [
          { size: half, gpa: 0n, uva: 1n << 40n },
          { size: half, gpa: BigInt(half), uva: (1n << 40n) + BigInt(half) },
        ],
      });
      await device.activate();
      const { connection } = device;
      await connection.setVringNum(0, queueSize, { ack: true });
      const address = device.vringAddress(0);
      const base = 1n << 40n;
      // The event areas have 4 bytes, and are aligned: they end where a region
      // does, or begin outside.
      const places = name === "descriptor"
        ? [base + BigInt(half) - 32n, base + 2n * BigInt(half) - 32n]
        : [base + 2n * BigInt(half), base - 4n];
      for (const place of places) {
        await assert.rejects(connection.setVringAddr(
          { ...address, [name]: place } as typeof address,
          { ack: true },
        ));
        await world.reported(
          new RegExp(`${name} area .*not inside one memory`),
        );
      }
      await device.close();
    }));
}

test("packed, row 25: unmapped descriptors without a byte, among others, are not looked at", () =>
  withBystander(async (world) => {
    const device = await openPacked(world);
    const [driver] = device.queues;
    const buffer = device.ram.allocate(1024);
    device.ram.write(buffer, blkHeader(0));
    device.ram.bytes(buffer + 600n, 1).fill(0xff);
    const nothing = (isWritable: boolean) => ({
      address: unmapped,
      length: 0,
      isWritable,
    });
    await driver.submitChain([
      nothing(false),
      { address: buffer, length: 16, isWritable: false },
      nothing(false),
      nothing(true),
      { address: buffer + 64n, length: 512, isWritable: true },
      { address: buffer + 600n, length: 1, isWritable: true },
      nothing(true),
    ]);
    assert.equal(device.ram.bytes(buffer + 600n, 1)[0], 0);
    assert.deepEqual(world.errors, []);
    await device.close();
  }));

test("packed, row 29: descriptors that change after the pop change nothing", () => {
  const requests = new Events<Request>();
  return withBystander(async (world) => {
    const device = await openPacked(world);
    const [driver] = device.queues;
    const buffer = device.ram.allocate(4096, 4096);
    for (const isIndirect of [false, true]) {
      const slot = driver.availablePosition & 0x7fff;
      const done = driver.submitChain(
        [{ address: buffer, length: 64, isWritable: true }],
        { indirect: isIndirect },
      );
      const request = await requests.next();
      const id = driver.ring.descriptor(slot).id;
      driver.ring.setDescriptor(slot, {
        address: unmapped,
        length: 0xffffffff,
        id: 0xffff,
        flags: driver.ring.flags(slot) | NEXT | INDIRECT,
      });
      assert.equal(request.writableBytes, 64);
      request.writable[0].fill(0x42);
      request.complete(64);
      assert.equal(await done, 64);
      // The id that came back is the one that was popped.
      assert.equal(driver.ring.descriptor(slot).id, id);
      const bytes = device.ram.bytes(buffer, 128);
      assert.ok(bytes.subarray(0, 64).every((byte) => byte === 0x42));
      assert.ok(bytes.subarray(64).every((byte) => byte === 0));
      bytes.fill(0);
    }
    assert.deepEqual(world.errors, []);
    await device.close();
  }, holding(requests));
});

test("packed, row 37: all descriptors available at once, and all the same buffer, are one request", () => {
  const requests = new Events<Request>();
  return withBystander(async (world) => {
    const device = await openPacked(world);
    const [driver] = device.queues;
    const address = device.ram.allocate(16);
    const flags = PackedFlag.AVAILABLE | WRITE;
    for (let slot = queueSize - 1; slot >= 0; slot--) {
      driver.ring.setDescriptor(slot, { address, length: 16, id: 0, flags });
    }
    driver.kick();
    await requests.next();
    await world.reported(/head 0 was made available again before it was used/);
    assert.equal(requests.pending.length, 0);
    await world.other.serve();
    await device.close();
  }, holding(requests));
});

test("packed, row 40: flags but WRITE mean nothing in an indirect table, and lead nowhere", () => {
  const requests = new Events<Request>();
  return withBystander(async (world) => {
    const device = await openPacked(world);
    const [driver] = device.queues;
    const buffer = device.ram.allocate(4096, 16);
    indirect({ device, driver, buffer }, [
      [buffer + 1024n, 16, INDIRECT | NEXT],
      [buffer + 2048n, 32, WRITE | INDIRECT],
    ]);
    driver.kick();
    const request = await requests.next();
    assert.equal(request.readableBytes, 16);
    assert.equal(request.writableBytes, 32);
    assert.deepEqual(world.errors, []);
    await device.close();
  }, holding(requests));
});

test("packed, row 39: a ring that is stopped or not set up again is not looked at", () => {
  const requests = new Events<Request>();
  return withBystander(async (world) => {
    const device = await openPacked(world);
    const { connection } = device;
    const [driver] = device.queues;
    const buffer = device.ram.allocate(64);
    const stops: (() => Promise<unknown>)[] = [
      () => connection.getVringBase(0),
      () => connection.setVringEnable(0, false, { ack: true }),
      () => connection.resetDevice({ ack: true }),
      () => connection.setStatus(0, { ack: true }),
    ];
    for (const stop of stops) {
      await stop();
      publish(driver, [buffer, 64, WRITE]);
      driver.kick();
      await connection.barrier();
      await world.other.serve();
      assert.equal(requests.pending.length, 0);
      driver.reset();
      await device.startQueue(0, { base: driver.firstBase });
    }
    await device.close();
  }, holding(requests));
});

test("packed, row 43: used descriptors go on in order over 70000 requests and their wraps", () =>
  withBystander(async (world) => {
    const device = await openPacked(world);
    const [driver] = device.queues;
    const header = device.ram.allocate(17);
    device.ram.write(header, blkHeader(0));
    const chain = [
      { address: header, length: 16, isWritable: false },
      { address: header + 16n, length: 1, isWritable: true },
    ];
    for (let round = 0; round < 1100; round++) {
      const batch = Array.from(
        { length: 64 },
        () => driver.submitChain(chain, { kick: false }),
      );
      driver.notify();
      await Promise.all(batch);
    }
    assert.equal(driver.usedCount, 70400);
    assert.equal(driver.failure, undefined);
    assert.deepEqual(driver.strays, []);
    await device.close();
  }, { disk: { backing: nullBacking(diskSize), numQueues: 2 } }));

test("packed, row 44: buffers that are too small, read-only or missing come back as they are", () =>
  withBystander(async (world) => {
    const device = await openPacked(world);
    const [driver] = device.queues;
    assert.equal(
      (await driver.submit({ readable: [blkHeader(0)] })).written,
      0,
    );
    const cases: [Uint8Array[], number[]][] = [
      [[blkHeader(0).subarray(0, 15)], [512, 1]],
      [[blkHeader(0)], [511, 1]],
      [[], [1]],
      [[blkHeader(99)], [1]],
    ];
    for (const [readable, writable] of cases) {
      const { data } = await driver.submit({ readable, writable });
      assert.notEqual(data.at(-1)!.at(-1), 0);
    }
    assert.equal(await read(driver), 0);
    assert.deepEqual(world.errors, []);
    await device.close();
  }));
