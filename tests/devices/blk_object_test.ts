// A disk in a user's object: whatever it does, only its own requests suffer.
import assert from "node:assert/strict";
import type { DiskObject } from "../../devices/mod.ts";
import { test } from "../harness.ts";
import {
  arrayDisk,
  assertBytes,
  header,
  IOERR,
  OK,
  pattern,
  ServedDisk,
  Type,
} from "./disk_guest.ts";

const diskSize = 4 << 20;

/** Reads wait until they are let go, by their offset. */
function gatedDisk() {
  const gates = new Map<number, () => void>();
  const arrivals: (() => void)[] = [];
  const buffers = new Map<number, Uint8Array>();
  const signals: AbortSignal[] = [];
  const plain = arrayDisk(diskSize);
  const disk: DiskObject = {
    ...plain,
    async read(offset, into, signal) {
      buffers.set(offset, into);
      signals.push(signal);
      const gate = new Promise<void>((resolve) => gates.set(offset, resolve));
      arrivals.splice(0).forEach((tell) => tell());
      await gate;
      into.fill(offset / 512 + 1);
    },
  };
  const whenWaiting = async (count: number) => {
    while (gates.size < count) {
      await new Promise<void>((resolve) => arrivals.push(resolve));
    }
  };
  return { disk, gates, buffers, signals, whenWaiting };
}

test("requests complete in the order in which the object ends them", async () => {
  const { disk, gates, whenWaiting } = gatedDisk();
  await using served = await ServedDisk.start({ backing: disk });
  const ended: number[] = [];
  const reads = [0, 1, 2, 3].map(async (sector) => {
    const { status, data } = await served.guest.read(sector, 512);
    assert.equal(status, OK);
    assertBytes(data, new Uint8Array(512).fill(sector + 1));
    ended.push(sector);
  });
  await whenWaiting(4);
  for (const sector of [2, 0, 3, 1]) {
    gates.get(sector * 512)!();
    await reads[sector];
  }
  assert.deepEqual(ended, [2, 0, 3, 1]);
});

const failures: Record<string, () => Promise<void>> = {
  "rejects": () => Promise.reject(new Error("the server is on fire")),
  "throws": () => {
    throw new Error("the server is on fire");
  },
  "throws what is no error": () => {
    throw "the server is on fire";
  },
};

for (const [how, fail] of Object.entries(failures)) {
  test(`an object that ${how} fails that request and nothing else, and the user is told`, async () => {
    const plain = arrayDisk(diskSize);
    const disk: DiskObject = {
      ...plain,
      read: (offset, into, signal) =>
        offset === 512 ? fail() : plain.read(offset, into, signal),
      write: (offset, data, signal) =>
        offset === 512 ? fail() : plain.write!(offset, data, signal),
    };
    await using served = await ServedDisk.start({ backing: disk });
    const { guest } = served;
    const [bad, good, written] = await Promise.all([
      guest.read(1, 512),
      guest.read(2, 512),
      guest.write(1, pattern(512)),
    ]);
    assert.deepEqual([bad.status, bad.written], [IOERR, 1]);
    assert.equal(good.status, OK);
    assert.equal(written.status, IOERR);
    assert.deepEqual(served.errors, [
      "Cannot read 512 bytes at 512: the server is on fire",
      "Cannot write 512 bytes at 512: the server is on fire",
    ]);
    assert.equal(served.disk.statistics.snapshot().ioErrors, 2);
  });
}

test("an object that hangs is waited for by a stop for its time, then its requests fail", async () => {
  const { disk, gates, signals, whenWaiting } = gatedDisk();
  await using served = await ServedDisk.start({
    backing: disk,
    stopTimeoutMs: 20,
  });
  const { guest } = served;
  const address = guest.ram.allocate(16 + 513);
  guest.ram.write(address, header(Type.IN, 5));
  const read = guest.drivers[0].submitChain([
    { address, length: 16, isWritable: false },
    { address: address + 16n, length: 513, isWritable: true },
  ]);
  await whenWaiting(1);
  assert.equal(signals[0].aborted, false);
  assert.equal(await guest.connection.getVringBase(0), 1);
  assert.equal(await read, 1);
  assert.equal(guest.ram.read(address + 528n, 1)[0], IOERR);
  assert.equal(signals[0].aborted, true);
  // It ends after all: that reaches nobody.
  gates.forEach((open) => open());
  await guest.connection.barrier();
  assert.equal(guest.drivers[0].usedCount, 1);
  assertBytes(guest.ram.read(address + 16n, 512), new Uint8Array(512));
});

test("what the object writes into its buffer after its request has ended does not reach the guest", async () => {
  const { disk, gates, buffers, whenWaiting } = gatedDisk();
  await using served = await ServedDisk.start({ backing: disk });
  const { guest } = served;
  const address = guest.ram.allocate(512 + 17);
  guest.ram.write(address, header(Type.IN, 6));
  const done = guest.drivers[0].submitChain([
    { address, length: 16, isWritable: false },
    { address: address + 16n, length: 513, isWritable: true },
  ]);
  await whenWaiting(1);
  gates.get(6 * 512)!();
  await done;
  buffers.get(6 * 512)!.fill(0xee);
  const after = guest.ram.read(address + 16n, 512);
  assertBytes(after, new Uint8Array(512).fill(7));
});

test("the guest cannot change what is being written while the object writes it", async () => {
  const plain = arrayDisk(diskSize);
  let open = () => {};
  const gate = new Promise<void>((resolve) => open = resolve);
  let arrived = () => {};
  const arrival = new Promise<void>((resolve) => arrived = resolve);
  const disk: DiskObject = {
    ...plain,
    async write(offset, data, signal) {
      arrived();
      await gate;
      await plain.write!(offset, data, signal);
    },
  };
  await using served = await ServedDisk.start({ backing: disk });
  const { guest } = served;
  const address = guest.ram.allocate(16 + 512 + 1);
  guest.ram.write(address, header(Type.OUT, 0));
  guest.ram.write(address + 16n, pattern(512));
  const done = guest.drivers[0].submitChain([
    { address, length: 528, isWritable: false },
    { address: address + 528n, length: 1, isWritable: true },
  ]);
  await arrival;
  guest.ram.bytes(address + 16n, 512).fill(0);
  open();
  await done;
  assertBytes(plain.bytes.slice(0, 512), new Uint8Array(pattern(512)));
});

test("an object that gives its buffer away fails the request", async () => {
  const disk: DiskObject = {
    size: diskSize,
    read(_offset, into) {
      structuredClone(into, { transfer: [into.buffer] });
    },
  };
  await using served = await ServedDisk.start({ backing: disk });
  assert.equal((await served.guest.read(0, 512)).status, IOERR);
});

test("requests longer than a transfer reach the object in pieces of 1 MiB", async () => {
  const plain = arrayDisk(diskSize);
  const lengths: number[] = [];
  const disk: DiskObject = {
    ...plain,
    read(offset, into, signal) {
      lengths.push(into.length);
      return plain.read(offset, into, signal);
    },
  };
  await using served = await ServedDisk.start({ backing: disk });
  const data = pattern((2 << 20) + 4096, 3);
  assert.equal((await served.guest.write(8, data)).status, OK);
  assertBytes((await served.guest.read(8, data.length)).data, data);
  assert.deepEqual(lengths, [1 << 20, 1 << 20, 4096]);
});

test("more requests than the object is given at once all complete", async () => {
  const plain = arrayDisk(diskSize);
  let running = 0;
  let most = 0;
  const disk: DiskObject = {
    ...plain,
    async read(offset, into, signal) {
      most = Math.max(most, ++running);
      await plain.read(offset, into, signal);
      running--;
    },
  };
  await using served = await ServedDisk.start({ backing: disk }, {
    queueSize: 1024,
  });
  const reads = Array.from(
    { length: 300 },
    (_, i) => served.guest.read(i, 512),
  );
  for (const { status } of await Promise.all(reads)) assert.equal(status, OK);
  assert.equal(most, 128);
});

test("an object without write is a read-only disk, and needs no other method", async () => {
  const disk: DiskObject = {
    size: diskSize,
    read: (_, into) => void into.fill(5),
  };
  await using served = await ServedDisk.start({ backing: disk });
  const { guest } = served;
  assertBytes(
    (await guest.read(0, 512)).data,
    new Uint8Array(512).fill(5),
  );
  assert.equal((await guest.write(0, pattern(512))).status, IOERR);
  assert.equal((await guest.request(Type.FLUSH, 0)).status, OK);
});
