// Rings of a hostile guest. Rows are those of the catalogue of hostile inputs.
import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import {
  DescriptorFlag,
  type SplitDriver,
  type VhostUserDevice,
} from "../../frontend/mod.ts";
import { memoryBacking, nullBacking } from "../../mod.ts";
import type { Request } from "../../mod.ts";
import { test } from "../harness.ts";
import { Events } from "../support/wait.ts";
import { holding } from "./holding.ts";
import { blkHeader, diskSize, withBystander, type World } from "./world.ts";

const { NEXT, WRITE, INDIRECT } = DescriptorFlag;
const rounds = 20;
const unmapped = 0xdead_0000_0000n;

/** What an attack works with. */
interface Attack {
  readonly world: World;
  readonly device: VhostUserDevice;
  readonly driver: SplitDriver;
  /** Memory to play with. */
  readonly buffer: bigint;
}

/**
 * Breaks queue 0 of a new device each round, and requires that the reason is
 * told once and the error event comes; that queue 1 of the same device goes
 * on, and so does queue 0 after it was set up again.
 */
function assertBreaks(
  name: string,
  reason: RegExp,
  attack: (attack: Attack) => void,
): void {
  test(name, () =>
    withBystander(async (world) => {
      const error = world.errorFd;
      await world.repeat(rounds, async () => {
        const device = await world.open({ queueCount: 2 });
        const { connection, queues: [driver, sound] } = device;
        await connection.setVringErr(0, error, { ack: true });
        const buffer = device.ram.allocate(65536, 16);
        const used = driver.usedIndex;
        attack({ world, device, driver, buffer });
        driver.kick();
        const told = await world.reported(reason);
        assert.match(told, /Cannot go on with queue 0 of/);
        await world.signalled(error);
        assert.equal(driver.usedIndex, used, "nothing was completed");
        const count = world.errors.length;
        for (let i = 0; i < 3; i++) driver.kick();
        assert.equal(await read(sound), 0);
        assert.equal(world.errors.length, count, "told once");
        assert.equal(core.eventfdTake(error), 0);
        await world.other.serve();
        await device.stopQueue(0);
        driver.reset();
        await device.startQueue(0, { base: 0 });
        assert.equal(await read(driver), 0);
        await device.close();
      });
    }));
}

/** Reads a sector; the status. */
async function read(driver: SplitDriver): Promise<number> {
  const { data } = await driver.submit({
    readable: [blkHeader(0)],
    writable: [512, 1],
  });
  return data[1][0];
}

/** Publishes head 0 with descriptors as they are. */
function publish(
  driver: SplitDriver,
  ...descriptors: [
    address: bigint,
    length: number,
    flags: number,
    next: number,
  ][]
): void {
  descriptors.forEach(([address, length, flags, next], index) =>
    driver.descriptor(index, { address, length, flags, next })
  );
  driver.publish(0);
}

/** An indirect table at `buffer`, of one descriptor after the other. */
function indirect(
  { device, driver, buffer }: Attack,
  count: number,
  each: (i: number) => [bigint, number, number, number],
  length = 16 * count,
): void {
  const bytes = device.ram.bytes(buffer, 16 * count);
  const table = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  for (let i = 0; i < count; i++) {
    const [address, size, flags, next] = each(i);
    table.setBigUint64(16 * i, address, true);
    table.setUint32(16 * i + 8, size, true);
    table.setUint16(16 * i + 12, flags, true);
    table.setUint16(16 * i + 14, next, true);
  }
  publish(driver, [buffer, length, INDIRECT, 0]);
}

assertBreaks(
  "row 37: an available index that jumps by more than the queue size",
  /more entries ahead than the queue has/,
  ({ driver }) => driver.setAvailableIndex(driver.availableIndex + 129),
);

assertBreaks(
  "row 37: an available index that goes backwards",
  /more entries ahead than the queue has/,
  ({ driver }) => driver.setAvailableIndex(driver.availableIndex - 1),
);

assertBreaks(
  "row 37: a head outside the descriptor table",
  /head 65535 is outside the descriptor table/,
  ({ driver }) => driver.publish(65535),
);

assertBreaks(
  "row 37: a head that is one past the descriptor table",
  /head 128 is outside the descriptor table/,
  ({ driver }) => driver.publish(128),
);

assertBreaks(
  "row 38: a chain that comes back to itself and sums up beyond 2^32 bytes",
  /4 GiB or more|more than 128 descriptors|too many pieces/,
  ({ driver, buffer }) => publish(driver, [buffer, 65536, NEXT, 0]),
);

assertBreaks(
  "row 38: a descriptor of 4 GiB in a chain that comes back to itself",
  /4 GiB or more|is not mapped guest memory/,
  ({ driver, buffer }) => publish(driver, [buffer, 0xffffffff, NEXT, 0]),
);

assertBreaks(
  "row 40: a loop of two descriptors",
  /more than 128 descriptors/,
  ({ driver, buffer }) =>
    publish(driver, [buffer, 1, NEXT, 1], [buffer, 1, NEXT, 0]),
);

assertBreaks(
  "row 40: a loop inside an indirect table",
  /more than 8 descriptors/,
  (attack) => indirect(attack, 8, (i) => [attack.buffer, 1, NEXT, (i + 1) % 8]),
);

assertBreaks(
  "row 40: an indirect table longer than the queue and than any driver's",
  /an indirect table has 16400 bytes/,
  (attack) => indirect(attack, 1025, (i) => [attack.buffer, 1, NEXT, i + 1]),
);

assertBreaks(
  "row 40: a next outside the table",
  /next 128 is outside the descriptor table/,
  ({ driver, buffer }) => publish(driver, [buffer, 16, NEXT, 128]),
);

assertBreaks(
  "row 40: a next outside the indirect table",
  /next 2 is outside the descriptor table/,
  (attack) => indirect(attack, 2, () => [attack.buffer, 16, NEXT, 2]),
);

for (const length of [0, 1, 15, 17, 0xffffffff, 0xfffffff0]) {
  assertBreaks(
    `row 48: an indirect table of ${length} bytes`,
    /an indirect table has \d+ bytes|is not mapped guest memory/,
    (attack) => indirect(attack, 2, () => [attack.buffer, 16, 0, 0], length),
  );
}

assertBreaks(
  "row 40: an indirect table inside an indirect table",
  /an indirect table is nested/,
  (attack) => indirect(attack, 1, () => [attack.buffer, 16, INDIRECT, 0]),
);

assertBreaks(
  "row 40: an indirect table in a chain that goes on",
  /an indirect table where none is allowed/,
  ({ driver, buffer }) =>
    publish(driver, [buffer, 16, INDIRECT | NEXT, 1], [buffer, 16, 0, 0]),
);

assertBreaks(
  "row 13: a buffer outside guest memory",
  /0xdead00000000 is not mapped guest memory/,
  ({ driver }) => publish(driver, [unmapped, 16, 0, 0]),
);

assertBreaks(
  "row 13: a buffer that begins in guest memory and ends outside",
  /is not mapped guest memory/,
  ({ driver, device }) =>
    publish(driver, [BigInt(device.ram.regions[0].size) - 8n, 16, 0, 0]),
);

assertBreaks(
  "row 13: a buffer that wraps around 2^64",
  /is not mapped guest memory/,
  ({ driver }) => publish(driver, [2n ** 64n - 8n, 16, 0, 0]),
);

assertBreaks(
  "row 13: an indirect table outside guest memory",
  /is not mapped guest memory/,
  ({ driver }) => publish(driver, [unmapped, 16, INDIRECT, 0]),
);

assertBreaks(
  "row 44: a status byte outside guest memory",
  /0xdead00000000 is not mapped guest memory/,
  ({ driver, buffer }) =>
    publish(driver, [buffer, 16, NEXT, 1], [unmapped, 1, WRITE, 0]),
);

assertBreaks(
  "a readable buffer after a writable one",
  /a readable descriptor follows a writable one/,
  ({ driver, buffer }) =>
    publish(driver, [buffer, 16, WRITE | NEXT, 1], [buffer, 16, 0, 0]),
);

assertBreaks(
  "a chain without a byte in it",
  /a chain is empty/,
  ({ driver, buffer }) =>
    publish(driver, [buffer, 0, NEXT, 1], [buffer, 0, WRITE, 0]),
);

assertBreaks(
  "row 25: descriptors that are unmapped and without a byte, alone",
  /a chain is empty/,
  ({ driver }) =>
    publish(driver, [unmapped, 0, NEXT, 1], [unmapped, 0, WRITE, 0]),
);

test("row 25: unmapped descriptors without a byte, among others, are not looked at", () =>
  withBystander(async (world) => {
    const device = await world.open();
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

test("row 37: one head made available twice is processed once", () => {
  const requests = new Events<Request>();
  return withBystander(async (world) => {
    const device = await world.open();
    const [driver] = device.queues;
    const buffer = device.ram.allocate(64);
    driver.descriptor(0, {
      address: buffer,
      length: 64,
      flags: WRITE,
      next: 0,
    });
    driver.publish(0);
    driver.publish(0);
    driver.kick();
    const request = await requests.next();
    await world.reported(/head 0 was made available again before it was used/);
    assert.equal(requests.pending.length, 0);
    request.complete(0);
    await world.other.serve();
    await device.close();
  }, holding(requests));
});

test("row 39: a ring that is stopped or not set up again is not looked at", () => {
  const requests = new Events<Request>();
  return withBystander(async (world) => {
    const device = await world.open();
    const { connection } = device;
    const [driver] = device.queues;
    const buffer = device.ram.allocate(64);
    const offer = () => {
      driver.descriptor(5, {
        address: buffer,
        length: 64,
        flags: WRITE,
        next: 0,
      });
      driver.publish(5);
      driver.kick();
    };
    const stops: (() => Promise<unknown>)[] = [
      () => connection.getVringBase(0),
      () => connection.setVringEnable(0, false, { ack: true }),
      () => connection.resetDevice({ ack: true }),
      () => connection.setStatus(0, { ack: true }),
    ];
    for (const stop of stops) {
      await stop();
      offer();
      await connection.barrier();
      await world.other.serve();
      assert.equal(requests.pending.length, 0);
      driver.reset();
      await device.startQueue(0, { base: 0 });
    }
    await device.close();
  }, holding(requests));
});

test("row 39: a request of an earlier run cannot be completed into the new one", () => {
  const requests = new Events<Request>();
  return withBystander(async (world) => {
    const device = await world.open();
    const [driver] = device.queues;
    driver.submit({ writable: [64] }).catch(() => {});
    const old = await requests.next();
    await device.stopQueue(0);
    driver.reset();
    await device.startQueue(0, { base: 0 });
    assert.equal(old.complete(64), false);
    const done = driver.submit({ writable: [64] });
    const request = await requests.next();
    assert.equal(old.complete(64), false);
    assert.equal(driver.usedIndex, 0);
    request.complete(64);
    assert.equal((await done).written, 64);
    await device.close();
  }, holding(requests));
});

test("row 41: DISCARD with more ranges than offered is unsupported and costs nothing", () =>
  withBystander(async (world) => {
    const device = await world.open({ ramSize: 32 << 20 });
    const [driver] = device.queues;
    for (const type of [11, 13]) {
      const answer = await driver.submit({
        readable: [blkHeader(type), new Uint8Array(16 << 20)],
        writable: [1],
      });
      assert.deepEqual(answer.data[0], Uint8Array.of(2));
    }
    await device.close();
  }));

test("row 43: the used index goes on in steps over 65536 requests", () =>
  withBystander(async (world) => {
    const device = await world.open({ queueSize: 128, usesCalls: true });
    const [driver] = device.queues;
    const header = device.ram.allocate(17);
    device.ram.write(header, blkHeader(0));
    const chain = [
      { address: header, length: 16, isWritable: false },
      { address: header + 16n, length: 1, isWritable: true },
    ];
    let last = driver.usedIndex;
    driver.onUsed = () => {
      // It is a whole index at each look: never behind, never far ahead.
      const now = driver.usedIndex;
      assert.ok(((now - last) & 0xffff) <= 128);
      last = now;
    };
    for (let round = 0; round < 1100; round++) {
      const batch = Array.from(
        { length: 64 },
        () => driver.submitChain(chain, { kick: false }),
      );
      driver.notify();
      await Promise.all(batch);
    }
    assert.equal(driver.usedCount, 70400);
    assert.equal(driver.usedIndex, 70400 & 0xffff);
    assert.deepEqual(driver.strays, []);
    await device.close();
  }, { disk: { backing: nullBacking(diskSize), numQueues: 2 } }));

test("row 44: buffers that are too small, read-only or missing come back as they are", () =>
  withBystander(async (world) => {
    const device = await world.open();
    const [driver] = device.queues;
    // No room for a status at all.
    assert.equal(
      (await driver.submit({ readable: [blkHeader(0)] })).written,
      0,
    );
    // Room for the status only, a header cut short, a buffer that is no sector.
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
  }, { disk: { backing: memoryBacking(diskSize), numQueues: 2 } }));
