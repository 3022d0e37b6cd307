// Every request type of a block device, on every kind of backing.
import assert from "node:assert/strict";
import { truncateSync, writeFileSync } from "node:fs";
import {
  type Backing,
  blkDevice,
  BlkFeature,
  fileBacking,
  memoryBacking,
  nullBacking,
  objectBacking,
} from "../../devices/mod.ts";
import { virtqueueFeatures } from "../../virtqueue/mod.ts";
import { test } from "../harness.ts";
import {
  arrayDisk,
  assertBytes,
  concat,
  DiskGuest,
  type Framing,
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

const diskSize = 4 << 20;

const backings: Record<string, (folder: TemporaryFolder) => Backing> = {
  memory: () => memoryBacking(diskSize),
  file(folder) {
    const path = folder.file("disk");
    writeFileSync(path, "");
    truncateSync(path, diskSize);
    return fileBacking(path);
  },
  object: () => objectBacking(arrayDisk(diskSize)),
};

const framings: Framing[] = ["apart", "together", "bytes", "indirect"];

for (const [name, make] of Object.entries(backings)) {
  for (const framing of framings) {
    test(`a ${name} disk reads back what was written, descriptors ${framing}`, async () => {
      using folder = new TemporaryFolder();
      await using served = await ServedDisk.start(
        { backing: make(folder) },
        { queueSize: 2048 },
      );
      const { guest } = served;
      const size = framing === "bytes" ? 512 : 8192;
      const data = pattern(size);
      assert.equal((await guest.write(7, data, framing)).status, OK);
      const read = await guest.read(7, size, framing);
      assert.equal(read.status, OK);
      assertBytes(read.data, data);
      assert.equal(read.written, size + 1);
      const before = await guest.read(6, 512, framing);
      assertBytes(before.data, new Uint8Array(512));
    });
  }

  test(`a ${name} disk serves its last sector and no further`, async () => {
    using folder = new TemporaryFolder();
    await using served = await ServedDisk.start({ backing: make(folder) });
    const { guest } = served;
    const last = diskSize / 512 - 1;
    assert.equal((await guest.write(last, pattern(512))).status, OK);
    assertBytes((await guest.read(last, 512)).data, pattern(512));
    assert.equal((await guest.read(last, 1024)).status, IOERR);
    assert.equal((await guest.write(last, pattern(1024))).status, IOERR);
    assert.equal((await guest.read(last + 1, 512)).status, IOERR);
    assert.deepEqual(served.errors, []);
  });

  test(`a ${name} disk flushes`, async () => {
    using folder = new TemporaryFolder();
    await using served = await ServedDisk.start({ backing: make(folder) });
    const answer = await served.guest.request(Type.FLUSH, 0);
    assert.deepEqual([answer.status, answer.written], [OK, 1]);
    assert.equal(served.disk.statistics.snapshot().flushes, 1);
  });

  test(`a ${name} disk zeroes every range of a write zeroes, and nothing beside`, async () => {
    using folder = new TemporaryFolder();
    await using served = await ServedDisk.start({ backing: make(folder) });
    const { guest } = served;
    const data = pattern(64 << 10);
    await guest.write(0, data);
    const unmap = 1;
    const ranges = concat([range(1, 2), range(100, 8, unmap), range(50, 0)]);
    const answer = await guest.request(Type.WRITE_ZEROES, 0, { data: ranges });
    assert.equal(answer.status, OK);
    data.fill(0, 512, 512 * 3).fill(0, 512 * 100, 512 * 108);
    assertBytes((await guest.read(0, data.length)).data, data);
    const { zeroedBytes, writeZeroes } = served.disk.statistics.snapshot();
    assert.deepEqual([zeroedBytes, writeZeroes], [10 * 512, 1]);
  });

  test(`a ${name} disk takes a discard, cut into single bytes too`, async () => {
    using folder = new TemporaryFolder();
    await using served = await ServedDisk.start({ backing: make(folder) });
    const { guest } = served;
    await guest.write(0, pattern(8192));
    for (const framing of ["apart", "bytes"] as const) {
      const answer = await guest.request(Type.DISCARD, 0, {
        data: concat([range(0, 8), range(2048, 16)]),
        framing,
      });
      assert.equal(answer.status, OK);
    }
    const rest = await guest.read(8, 4096);
    assertBytes(rest.data, pattern(8192).subarray(4096));
  });

  test(`a ${name} disk serves one guest what another has written, on any queue`, async () => {
    using folder = new TemporaryFolder();
    await using served = await ServedDisk.start(
      { backing: make(folder), numQueues: 3 },
      { queueCount: 3 },
    );
    await using other = await DiskGuest.connect(served.path, { queueCount: 2 });
    const data = pattern(4096, 9);
    await served.guest.request(Type.OUT, 16, { data, queue: 2 });
    const read = await other.request(Type.IN, 16, { size: 4096, queue: 1 });
    assertBytes(read.data, data);
  });

  test(`a ${name} disk answers hundreds of requests at once, each with its own data`, async () => {
    using folder = new TemporaryFolder();
    await using served = await ServedDisk.start({ backing: make(folder) }, {
      queueSize: 1024,
    });
    const { guest } = served;
    const blocks = Array.from({ length: 300 }, (_, i) => pattern(1024, i));
    await Promise.all(blocks.map((data, i) => guest.write(i * 2, data)));
    const reads = await Promise.all(
      blocks.map((_, i) => guest.read(i * 2, 1024)),
    );
    reads.forEach((read, i) => assertBytes(read.data, blocks[i]));
  });
}

test("a null disk answers every request and copies nothing", async () => {
  await using served = await ServedDisk.start({
    backing: nullBacking(diskSize),
  });
  const { guest } = served;
  const read = await guest.read(0, 4096);
  assert.deepEqual([read.status, read.written], [OK, 4097]);
  assertBytes(read.data, new Uint8Array(4096));
  assert.equal((await guest.write(0, pattern(4096))).status, OK);
  assert.equal((await guest.request(Type.FLUSH, 0)).status, OK);
  const data = range(0, 8);
  assert.equal((await guest.request(Type.DISCARD, 0, { data })).status, OK);
  assert.equal(
    (await guest.request(Type.WRITE_ZEROES, 0, { data })).status,
    OK,
  );
  assert.equal((await guest.read(diskSize / 512, 512)).status, IOERR);
});

test("GET_ID answers the serial, padded with zeros, cut where there is no room", async () => {
  await using served = await ServedDisk.start({
    backing: memoryBacking(diskSize),
    serial: "vhost2-0001",
  });
  const { guest } = served;
  const whole = await guest.request(Type.GET_ID, 0, { size: 20 });
  const padded = concat([
    new TextEncoder().encode("vhost2-0001"),
    new Uint8Array(9),
  ]);
  assert.deepEqual([whole.status, whole.written], [OK, 21]);
  assertBytes(whole.data, padded);
  const bytewise = await guest.request(Type.GET_ID, 0, {
    size: 20,
    framing: "bytes",
  });
  assertBytes(bytewise.data, padded);
  const short = await guest.request(Type.GET_ID, 0, { size: 4 });
  assert.equal(new TextDecoder().decode(short.data), "vhos");
  const long = await guest.request(Type.GET_ID, 0, { size: 64 });
  assert.equal(long.written, 21);
});

test("a request of unknown type is unsupported", async () => {
  await using served = await ServedDisk.start({
    backing: memoryBacking(diskSize),
  });
  // Legacy SCSI, GET_LIFETIME, SECURE_ERASE, and one that nobody knows.
  for (const type of [2, 10, 14, 0xffffffff]) {
    const answer = await served.guest.request(type, 0, { size: 512 });
    assert.deepEqual([answer.status, answer.written], [UNSUPP, 1]);
  }
  assert.equal(served.disk.statistics.snapshot().unsupported, 4);
});

test("a disk of 4096-byte blocks refuses what is not whole blocks", async () => {
  await using served = await ServedDisk.start({
    backing: memoryBacking(diskSize),
    logicalBlockSize: 4096,
  });
  const { guest } = served;
  assert.equal((await guest.config()).getUint32(20, true), 4096);
  assert.equal((await guest.write(8, pattern(4096))).status, OK);
  assertBytes((await guest.read(8, 4096)).data, pattern(4096));
  assert.equal((await guest.read(1, 4096)).status, IOERR);
  assert.equal((await guest.read(8, 512)).status, IOERR);
  assert.equal((await guest.write(8, pattern(512))).status, IOERR);
  const data = range(4, 8);
  assert.equal(
    (await guest.request(Type.WRITE_ZEROES, 0, { data })).status,
    IOERR,
  );
  assert.throws(
    () => memoryDisk4096(512 * 9),
    /Cannot use a disk of 4608 bytes: the size must be a multiple of the logical block of 4096 bytes/,
  );
});

function memoryDisk4096(size: number) {
  return blkDevice({ backing: memoryBacking(size), logicalBlockSize: 4096 });
}

test("a read-only disk fails every request that would change it", async () => {
  await using served = await ServedDisk.start({
    backing: memoryBacking(diskSize),
    readOnly: true,
  });
  const { guest } = served;
  const has = (bit: number) => (guest.features >> BigInt(bit) & 1n) === 1n;
  assert.ok(has(BlkFeature.RO));
  assert.ok(!has(BlkFeature.DISCARD) && !has(BlkFeature.WRITE_ZEROES));
  assert.equal((await guest.write(0, pattern(512))).status, IOERR);
  const data = range(0, 8);
  assert.equal((await guest.request(Type.DISCARD, 0, { data })).status, IOERR);
  assert.equal(
    (await guest.request(Type.WRITE_ZEROES, 0, { data })).status,
    IOERR,
  );
  assert.equal((await guest.request(Type.FLUSH, 0)).status, OK);
  assertBytes((await guest.read(0, 512)).data, new Uint8Array(512));
});

test("a driver that did not accept DISCARD and WRITE_ZEROES finds them unsupported", async () => {
  await using served = await ServedDisk.start(
    { backing: memoryBacking(diskSize) },
    { knows: virtqueueFeatures },
  );
  const data = range(0, 8);
  for (const type of [Type.DISCARD, Type.WRITE_ZEROES]) {
    const answer = await served.guest.request(type, 0, { data });
    assert.equal(answer.status, UNSUPP);
  }
});

test("the header alone, and no data, is a read of nothing", async () => {
  await using served = await ServedDisk.start({
    backing: memoryBacking(diskSize),
  });
  const answer = await served.guest.send([header(Type.IN, 3)], [1]);
  assert.deepEqual([answer.status, answer.written], [OK, 1]);
});
