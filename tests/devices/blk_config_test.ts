// Configuration space, the write cache, resizing.
import assert from "node:assert/strict";
import { statSync, writeFileSync } from "node:fs";
import {
  BlkFeature,
  type BlkOptions,
  type DiskObject,
  fileBacking,
  memoryBacking,
} from "../../devices/mod.ts";
import { RefusedError } from "../../frontend/refused_error.ts";
import { BackendRequest } from "../../protocol/backend_request.ts";
import { featureMask } from "../../protocol/features.ts";
import { virtqueueFeatures } from "../../virtqueue/mod.ts";
import { test } from "../harness.ts";
import {
  arrayDisk,
  assertBytes,
  DiskGuest,
  IOERR,
  OK,
  pattern,
  range,
  ServedDisk,
  TemporaryFolder,
  Type,
} from "./disk_guest.ts";

const diskSize = 1 << 20;

/** A disk that keeps what it was told, in order. */
function spyDisk(): { disk: DiskObject; calls: string[] } {
  const calls: string[] = [];
  const plain = arrayDisk(diskSize);
  const disk: DiskObject = {
    ...plain,
    async write(offset, data, signal) {
      await plain.write!(offset, data, signal);
      calls.push("write");
    },
    async flush(signal) {
      await plain.flush!(signal);
      calls.push("flush");
    },
    async writeZeroes(offset, length, signal) {
      await plain.writeZeroes!(offset, length, signal);
      calls.push("zero");
    },
  };
  return { disk, calls };
}

test("configuration space says what the disk is", async () => {
  await using served = await ServedDisk.start({
    backing: memoryBacking(diskSize),
    numQueues: 3,
    segMax: 30,
    sizeMax: 65536,
    physicalBlockSize: 4096,
    maxRangeSectors: 2048,
    maxRangeCount: 5,
  });
  const config = await served.guest.config();
  assert.deepEqual(
    {
      capacity: config.getBigUint64(0, true),
      sizeMax: config.getUint32(8, true),
      segMax: config.getUint32(12, true),
      blockSize: config.getUint32(20, true),
      physicalBlockExponent: config.getUint8(24),
      minIoBlocks: config.getUint16(26, true),
      writeback: config.getUint8(32),
      queues: config.getUint16(34, true),
      discard: [36, 40, 44].map((at) => config.getUint32(at, true)),
      writeZeroes: [48, 52].map((at) => config.getUint32(at, true)),
      mayUnmap: config.getUint8(56),
    },
    {
      capacity: BigInt(diskSize / 512),
      sizeMax: 65536,
      segMax: 30,
      blockSize: 512,
      physicalBlockExponent: 3,
      minIoBlocks: 8,
      writeback: 1,
      queues: 3,
      discard: [2048, 5, 1],
      writeZeroes: [2048, 5],
      mayUnmap: 1,
    },
  );
  assert.equal(await served.guest.connection.getQueueNum(), 3);
});

test("in writeback mode only a flush flushes", async () => {
  const { disk, calls } = spyDisk();
  await using served = await ServedDisk.start({ backing: disk });
  const { guest } = served;
  await guest.write(0, pattern(512));
  await guest.request(Type.WRITE_ZEROES, 0, { data: range(1, 1) });
  assert.deepEqual(calls, ["write", "zero"]);
  await guest.request(Type.FLUSH, 0);
  assert.deepEqual(calls, ["write", "zero", "flush"]);
});

test("the driver's cache byte changes between write-through and writeback, while the queue runs", async () => {
  const { disk, calls } = spyDisk();
  await using served = await ServedDisk.start({ backing: disk });
  const { guest } = served;
  const { connection } = guest;
  await connection.setConfig(32, Uint8Array.of(0), { ack: true });
  assert.equal((await guest.config()).getUint8(32), 0);
  await guest.write(0, pattern(512));
  await guest.request(Type.WRITE_ZEROES, 0, { data: range(1, 1) });
  assert.deepEqual(calls, ["write", "flush", "zero", "flush"]);
  await connection.setConfig(32, Uint8Array.of(1), { ack: true });
  await guest.write(0, pattern(512));
  assert.deepEqual(calls.slice(4), ["write"]);
});

test("for a driver that cannot flush every write is durable when it completes", async () => {
  const { disk, calls } = spyDisk();
  await using served = await ServedDisk.start(
    { backing: disk },
    { knows: virtqueueFeatures | featureMask(BlkFeature.CONFIG_WCE) },
  );
  await served.guest.write(0, pattern(512));
  assert.deepEqual(calls, ["write", "flush"]);
  assert.equal((await served.guest.config()).getUint8(32), 0);
});

test("the cache byte cannot be written unless CONFIG_WCE was negotiated", async () => {
  await using served = await ServedDisk.start(
    { backing: memoryBacking(diskSize) },
    { knows: virtqueueFeatures | featureMask(BlkFeature.FLUSH) },
  );
  const { connection } = served.guest;
  await assert.rejects(
    connection.setConfig(32, Uint8Array.of(0), { ack: true }),
    RefusedError,
  );
  assert.match(served.errors.join(), /CONFIG_WCE was not negotiated/);
});

test("a file disk in write-through mode serves as one in writeback mode does", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("disk");
  writeFileSync(path, new Uint8Array(diskSize));
  await using served = await ServedDisk.start({
    backing: fileBacking(path),
    writeback: false,
  });
  const { guest } = served;
  assert.equal((await guest.config()).getUint8(32), 0);
  assert.equal((await guest.write(3, pattern(4096))).status, OK);
  const data = range(4, 1);
  const zeroed = await guest.request(Type.WRITE_ZEROES, 0, { data });
  assert.equal(zeroed.status, OK);
  const expected = pattern(4096).fill(0, 512, 1024);
  assertBytes((await guest.read(3, 4096)).data, expected);
});

function resizes(name: string, make: (folder: TemporaryFolder) => BlkOptions) {
  test(`a ${name} disk grows and shrinks under its guests, and tells each`, async () => {
    using folder = new TemporaryFolder();
    await using served = await ServedDisk.start(make(folder));
    await using other = await DiskGuest.connect(served.path);
    const guests = [served.guest, other];
    const { guest } = served;
    await guest.write(0, pattern(512));
    const told = () =>
      Promise.all(
        guests.map(({ connection }) =>
          new Promise<void>((resolve) => {
            connection.onBackendRequest = ({ id }) => {
              const wanted = BackendRequest.BACKEND_CONFIG_CHANGE_MSG;
              if (id === wanted) resolve();
            };
          })
        ),
      );
    let changed = told();
    await served.disk.resize(diskSize * 2);
    await changed;
    for (const one of guests) {
      const capacity = (await one.config()).getBigUint64(0, true);
      assert.equal(Number(capacity), diskSize * 2 / 512);
    }
    const last = diskSize * 2 / 512 - 1;
    assert.equal((await guest.write(last, pattern(512, 2))).status, OK);
    assertBytes((await other.read(last, 512)).data, pattern(512, 2));
    assertBytes((await other.read(0, 512)).data, pattern(512));
    changed = told();
    await served.disk.resize(diskSize / 2);
    await changed;
    assert.equal((await guest.read(diskSize / 1024, 512)).status, IOERR);
    assertBytes((await guest.read(0, 512)).data, pattern(512));
    await assert.rejects(served.disk.resize(1000), /multiple of the logical/);
    assert.equal(served.disk.size, diskSize / 2);
  });
}

resizes("memory", () => ({ backing: memoryBacking(diskSize) }));
resizes("file", (folder) => {
  writeFileSync(folder.file("disk"), new Uint8Array(diskSize));
  return { backing: fileBacking(folder.file("disk")) };
});
resizes("object", () => {
  const disk = arrayDisk(diskSize * 2);
  return { backing: { ...disk, size: diskSize } };
});

test("shrinking a file disk leaves the file as it is", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("disk");
  writeFileSync(path, pattern(diskSize));
  await using served = await ServedDisk.start({ backing: fileBacking(path) });
  await served.disk.resize(4096);
  assert.equal(statSync(path).size, diskSize);
});

test("a resize that the object refuses changes nothing", async () => {
  const disk: DiskObject = {
    ...arrayDisk(diskSize),
    resize: () => Promise.reject(new Error("no room")),
  };
  await using served = await ServedDisk.start({ backing: disk });
  await assert.rejects(served.disk.resize(diskSize * 2), /no room/);
  await assert.rejects(served.disk.resize(diskSize / 2), /no room/);
  assert.equal(served.disk.size, diskSize);
});
