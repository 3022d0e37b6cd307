// Inputs that broke other block back-ends. The numbers are those of the
// catalogue of hostile inputs.
import assert from "node:assert/strict";
import { readdirSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { fileBacking, memoryBacking } from "../../devices/mod.ts";
import { RefusedError } from "../../frontend/refused_error.ts";
import { test } from "../harness.ts";
import {
  assertBytes,
  concat,
  DiskGuest,
  header,
  IOERR,
  OK,
  pattern,
  range,
  ServedDisk,
  TemporaryFolder,
  Type,
  UNSUPP,
} from "./disk_guest.ts";

const diskSize = 1 << 20;
const sectors = diskSize / 512;

function start() {
  return ServedDisk.start({ backing: memoryBacking(diskSize) });
}

/** The disk still serves. */
async function assertServes(guest: DiskGuest): Promise<void> {
  assert.equal((await guest.write(0, pattern(512))).status, OK);
  assertBytes((await guest.read(0, 512)).data, pattern(512));
}

test("a sector that wraps around 2^64, or 2^55 as bytes, is an I/O error", async () => {
  await using served = await start();
  const { guest } = served;
  const starts = [
    sectors,
    2n ** 32n,
    2n ** 53n,
    2n ** 55n,
    2n ** 55n + 1n,
    2n ** 64n - 1n,
    2n ** 64n - 8n,
  ];
  for (const sector of starts) {
    assert.equal((await guest.read(sector, 512)).status, IOERR, `${sector}`);
    const written = await guest.write(sector, pattern(512));
    assert.equal(written.status, IOERR, `${sector}`);
    for (const type of [Type.DISCARD, Type.WRITE_ZEROES]) {
      const answer = await guest.request(type, 0, { data: range(sector, 8) });
      assert.equal(answer.status, IOERR, `${type} ${sector}`);
    }
  }
  await assertServes(guest);
});

test("data that is not whole sectors is an I/O error", async () => {
  await using served = await start();
  const { guest } = served;
  for (const size of [1, 511, 513, 1023]) {
    assert.equal((await guest.read(0, size)).status, IOERR, `${size}`);
    assert.equal(
      (await guest.write(0, pattern(size))).status,
      IOERR,
      `${size}`,
    );
  }
  await assertServes(guest);
});

test("a header shorter than 16 bytes is an I/O error", async () => {
  await using served = await start();
  const { guest } = served;
  const short = header(Type.IN, 0).subarray(0, 15);
  const answer = await guest.send([short], [512, 1]);
  assert.deepEqual([answer.status, answer.written], [IOERR, 1]);
  // Nothing readable at all.
  assert.equal((await guest.send([], [513])).status, IOERR);
  await assertServes(guest);
});

test("row 44: a request without a byte for the status comes back unanswered, and the queue goes on", async () => {
  await using served = await start();
  const { guest } = served;
  const { written } = await guest.drivers[0].submit({
    readable: [header(Type.IN, 0)],
  });
  assert.equal(written, 0);
  assert.equal(served.disk.statistics.snapshot().malformed, 1);
  await assertServes(guest);
});

test("row 44: a status byte outside guest memory breaks that queue, and no other guest notices", async () => {
  await using served = await start();
  await using other = await DiskGuest.connect(served.path);
  const [driver] = served.guest.drivers;
  const head = served.guest.ram.allocate(16);
  served.guest.ram.write(head, header(Type.IN, 0));
  const lost = driver.submitChain([
    { address: head, length: 16, isWritable: false },
    { address: 0xdead_0000_0000n, length: 1, isWritable: true },
  ]);
  lost.catch(() => {});
  await assertServes(other);
  await served.guest.connection.barrier();
  assert.match(served.errors.join(), /0xdead00000000 is not mapped/);
  await assertServes(other);
});

test("row 41: more ranges than offered are unsupported, and none of them is done", async () => {
  await using served = await start();
  const { guest } = served;
  await guest.write(0, pattern(512));
  const config = await guest.config();
  const most = config.getUint32(52, true);
  assert.equal(most, 32);
  for (const count of [most + 1, 4096, 100_000]) {
    const ranges = new Uint8Array(count * 16);
    ranges.set(range(0, 1));
    for (const type of [Type.DISCARD, Type.WRITE_ZEROES]) {
      const answer = await guest.request(type, 0, { data: ranges });
      assert.equal(answer.status, UNSUPP, `${count}`);
    }
  }
  const full = concat(Array.from({ length: most }, (_, i) => range(i + 1, 1)));
  const answer = await guest.request(Type.WRITE_ZEROES, 0, { data: full });
  assert.equal(answer.status, OK);
  assertBytes((await guest.read(0, 512)).data, pattern(512));
});

test("ranges that are none, cut short, too long or flagged are refused, and none of them is done", async () => {
  await using served = await ServedDisk.start({
    backing: memoryBacking(diskSize),
    maxRangeSectors: 64,
  });
  const { guest } = served;
  await guest.write(0, pattern(512));
  const good = range(0, 1);
  const cases: [string, number, Uint8Array<ArrayBuffer>, number][] = [
    ["no range", Type.DISCARD, new Uint8Array(0), IOERR],
    [
      "half a range",
      Type.WRITE_ZEROES,
      concat([good, new Uint8Array(8)]),
      IOERR,
    ],
    ["too long", Type.WRITE_ZEROES, concat([good, range(0, 65)]), IOERR],
    [
      "past the end",
      Type.WRITE_ZEROES,
      concat([good, range(sectors, 1)]),
      IOERR,
    ],
    ["longest", Type.DISCARD, concat([good, range(0, 0xffffffff)]), IOERR],
    ["unknown flag", Type.WRITE_ZEROES, concat([good, range(0, 1, 2)]), UNSUPP],
    ["high flag", Type.WRITE_ZEROES, range(0, 1, 0x80000000), UNSUPP],
    [
      "discard with unmap",
      Type.DISCARD,
      concat([good, range(0, 1, 1)]),
      UNSUPP,
    ],
  ];
  for (const [name, type, data, status] of cases) {
    assert.equal((await guest.request(type, 0, { data })).status, status, name);
  }
  assertBytes((await guest.read(0, 512)).data, pattern(512));
});

test("row 47: GET_CONFIG beyond the structure reads zeros, never anybody's memory", async () => {
  await using served = await start();
  const { connection } = served.guest;
  const bytes = await connection.getConfig(0, 256);
  assert.equal(bytes.length, 256);
  assertBytes(bytes.subarray(60), new Uint8Array(196));
  const behind = await connection.getConfig(200, 56);
  assertBytes(behind, new Uint8Array(56));
});

test("row 20: SET_CONFIG anywhere but on the cache byte is refused and changes nothing", async () => {
  await using served = await start();
  const { connection } = served.guest;
  const before = await connection.getConfig(0, 60);
  const cases: [number, number][] = [
    [0, 8],
    [31, 1],
    [32, 2],
    [31, 2],
    [33, 1],
    [0, 60],
    [60, 1],
    [255, 1],
    [200, 56],
  ];
  for (const [offset, size] of cases) {
    // Zeros: where the cache byte is among them it would change.
    const data = new Uint8Array(size);
    await assert.rejects(
      connection.setConfig(offset, data, { ack: true }),
      RefusedError,
      `${size} at ${offset}`,
    );
  }
  assert.deepEqual(await connection.getConfig(0, 60), before);
  await assertServes(served.guest);
});

test("row 20: a cache byte that is neither 0 nor 1 is refused", async () => {
  await using served = await start();
  const { connection } = served.guest;
  await assert.rejects(
    connection.setConfig(32, Uint8Array.of(2), { ack: true }),
    RefusedError,
  );
  assert.equal((await connection.getConfig(32, 1))[0], 1);
});

test("row 21: a disk whose file was emptied and removed answers GET_CONFIG, and fails reads", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("disk");
  writeFileSync(path, pattern(diskSize));
  await using served = await ServedDisk.start({ backing: fileBacking(path) });
  const { guest } = served;
  truncateSync(path, 512);
  rmSync(path);
  const config = await guest.config();
  assert.equal(Number(config.getBigUint64(0, true)), sectors);
  assert.equal((await guest.read(8, 4096)).status, IOERR);
  assert.equal((await guest.read(8, 4096)).status, IOERR);
  // Said once: a guest must not fill the log.
  assert.deepEqual(served.errors, [`Cannot read ${path}: EIO`]);
  assertBytes((await guest.read(0, 512)).data, pattern(512));
});

test("a file disk leaves no descriptor behind, whatever was asked of it", async () => {
  const count = () => readdirSync("/proc/self/fd").length;
  using folder = new TemporaryFolder();
  const path = folder.file("disk");
  writeFileSync(path, pattern(diskSize));
  const serve = async () => {
    await using served = await ServedDisk.start({ backing: fileBacking(path) });
    await served.guest.read(sectors, 512);
    await assertServes(served.guest);
  };
  // The first run leaves what an isolate keeps for good.
  await serve();
  const before = count();
  for (let i = 0; i < 3; i++) await serve();
  assert.equal(count(), before);
});
