// A disk's queues in Workers: the same disk, the same answers.
import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import {
  type Backing,
  fileBacking,
  memoryBacking,
  nullBacking,
} from "../../devices/mod.ts";
import { registerTarget } from "../../mod.ts";
import { blkDevice } from "../../devices/mod.ts";
import { test } from "../harness.ts";
import { eventually } from "../support/wait.ts";
import {
  arrayDisk,
  assertBytes,
  type DiskGuest,
  IOERR,
  OK,
  pattern,
  ServedDisk,
  TemporaryFolder,
  Type,
} from "./disk_guest.ts";

const MiB = 1 << 20;

/** Every queue writes, every other one reads, in Workers and out of them. */
async function exercise(guest: DiskGuest, queueCount: number): Promise<void> {
  const blocks = Array.from({ length: 32 }, (_, i) => pattern(4096, i + 1));
  await Promise.all(blocks.map(async (data, i) => {
    const queue = i % queueCount;
    const answer = await guest.request(Type.OUT, i * 8, { data, queue });
    assert.equal(answer.status, OK);
  }));
  await Promise.all(blocks.map(async (data, i) => {
    const queue = (i + 1) % queueCount;
    const answer = await guest.request(Type.IN, i * 8, { size: 4096, queue });
    assert.equal(answer.status, OK);
    assertBytes(answer.data, data);
  }));
  assert.equal((await guest.request(Type.FLUSH, 0)).status, OK);
}

const backings: [string, (folder: TemporaryFolder) => Backing][] = [
  ["memory", () => memoryBacking(MiB)],
  ["file", (folder) => {
    const path = folder.file("disk.img");
    writeFileSync(path, new Uint8Array(MiB));
    return fileBacking(path);
  }],
];
for (const [name, open] of backings) {
  for (const workers of [0, 2]) {
    test(`four queues of a ${name} disk over ${workers} Workers: data is what was written, and all is counted`, async () => {
      using folder = new TemporaryFolder();
      await using served = await ServedDisk.start(
        { backing: open(folder), numQueues: 4, serial: "in a Worker" },
        { queueCount: 4 },
        { workers },
      );
      const { guest, disk } = served;
      await exercise(guest, 4);
      const id = await guest.request(Type.GET_ID, 0, { size: 20, queue: 3 });
      assert.equal(
        new TextDecoder().decode(id.data).replace(/\0+$/, ""),
        "in a Worker",
      );
      const outside = await guest.request(Type.IN, MiB / 512, { size: 512 });
      assert.equal(outside.status, IOERR);
      const counts = disk.statistics.snapshot();
      assert.deepEqual(
        [counts.reads, counts.writes, counts.flushes, counts.getIds],
        [32, 32, 1, 1],
      );
      assert.equal(counts.writtenBytes, 32 * 4096);
      assert.equal(counts.ioErrors, 1);
      assert.deepEqual(served.errors, []);
    });
  }
}

test("a null disk answers in Workers", async () => {
  await using served = await ServedDisk.start(
    { backing: nullBacking(MiB), numQueues: 2 },
    { queueCount: 2 },
    { workers: 2, pollMicroseconds: 0 },
  );
  for (let i = 0; i < 100; i++) {
    const answer = await served.guest.request(Type.IN, 0, {
      size: 512,
      queue: i % 2,
    });
    assert.equal(answer.status, OK);
  }
  assert.equal(served.disk.statistics.snapshot().reads, 100);
});

test("requests longer than a turn are served in slices in a Worker too", async () => {
  await using served = await ServedDisk.start(
    { backing: memoryBacking(8 * MiB) },
    {},
    { workers: 1 },
  );
  const data = pattern(6 * MiB, 3);
  assert.equal((await served.guest.write(0, data)).status, OK);
  assertBytes((await served.guest.read(0, data.length)).data, data);
});

for (const [name, open] of backings.slice(1)) {
  test(`a ${name} disk that grows does so in its Workers`, async () => {
    using folder = new TemporaryFolder();
    await using served = await ServedDisk.start(
      { backing: open(folder) },
      {},
      { workers: 1 },
    );
    await grows(served);
  });
}

test("a memory disk that has room grows in its Workers, one that has none refuses", async () => {
  await using served = await ServedDisk.start(
    { backing: memoryBacking(MiB, { maxSize: 2 * MiB }) },
    {},
    { workers: 1 },
  );
  await grows(served);
  await assert.rejects(served.disk.resize(4 * MiB), { code: "OPTION" });
  assert.equal(served.disk.size, 2 * MiB);
  assert.equal((await served.guest.read(MiB / 512, 512)).status, OK);
});

async function grows({ guest, disk }: ServedDisk): Promise<void> {
  const beyond = MiB / 512;
  const data = pattern(512, 9);
  assert.equal((await guest.read(beyond, 512)).status, IOERR);
  await disk.resize(2 * MiB);
  assert.equal((await guest.config()).getBigUint64(0, true), 4096n);
  assertBytes((await guest.read(beyond, 512)).data, new Uint8Array(512));
  assert.equal((await guest.write(beyond, data)).status, OK);
  assertBytes((await guest.read(beyond, 512)).data, data);
  await disk.resize(MiB);
  assert.equal((await guest.read(beyond, 512)).status, IOERR);
  await disk.resize(2 * MiB);
}

test("the driver's cache byte reaches the Workers", async () => {
  using folder = new TemporaryFolder();
  await using served = await ServedDisk.start(
    { backing: backings[1][1](folder) },
    {},
    { workers: 1 },
  );
  const { guest, target } = served;
  const [device] = target.devices;
  const shared = new Int32Array(device.shared);
  const setWriteback = (value: number) =>
    guest.connection.setConfig(32, Uint8Array.of(value), { ack: true });
  for (const value of [0, 1, 0]) {
    await setWriteback(value);
    assert.equal(shared[0], value);
    assert.equal((await guest.config()).getUint8(32), value);
    assert.equal((await guest.write(0, pattern(512, value))).status, OK);
  }
  assertBytes(
    new Uint8Array(readFileSync(folder.file("disk.img"))).subarray(0, 512),
    pattern(512, 0),
  );
});

test("errors of a file in a Worker reach the target's onError", async () => {
  using folder = new TemporaryFolder();
  await using served = await ServedDisk.start(
    { backing: fileBacking(fullImage(folder)) },
    {},
    { workers: 1 },
  );
  // The disk says that it is larger than its file: it became shorter since.
  writeFileSync(folder.file("full.img"), new Uint8Array(0));
  const answer = await served.guest.read(0, 4096);
  assert.equal(answer.status, IOERR);
  await eventually(() => served.errors.length > 0, "an error is told");
  assert.match(served.errors[0], /Cannot read .*full\.img/);
});

function fullImage(folder: TemporaryFolder): string {
  writeFileSync(folder.file("full.img"), new Uint8Array(MiB));
  return folder.file("full.img");
}

test("a disk in an object of this isolate is refused in Workers", async () => {
  using folder = new TemporaryFolder();
  await using disk = blkDevice({ backing: arrayDisk(MiB) });
  await assert.rejects(
    registerTarget({
      transport: "vhost-user",
      address: folder.file("socket"),
      ...disk,
      workers: 1,
    }),
    { code: "OPTION", message: /Cannot serve this disk in Workers/ },
  );
});

test("memory that the front-end takes away while Workers copy ends that device and no other", async () => {
  await using served = await ServedDisk.start(
    { backing: memoryBacking(4 * MiB), numQueues: 2 },
    { queueCount: 2 },
    { workers: 2 },
  );
  const { DiskGuest: Guest } = await import("./disk_guest.ts");
  for (let round = 0; round < 5; round++) {
    const victim = await Guest.connect(served.path, { queueCount: 2 });
    const data = pattern(MiB, round);
    for (let i = 0; i < 8; i++) {
      victim.request(Type.OUT, 0, { data, queue: i % 2 }).catch(() => {});
      if (i === 3) victim.ram.regions[1].resizeFile(0);
    }
    await victim.connection.closed;
    await victim.close();
    await exercise(served.guest, 2);
  }
  assert.equal(
    served.errors.filter((text) => /took guest memory away/.test(text)).length,
    5,
  );
});
