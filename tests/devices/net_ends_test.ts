// The ends of a network device's cable.
import assert from "node:assert/strict";
import { appendFileSync } from "node:fs";
import { Worker } from "node:worker_threads";
import { PcapFile } from "../../devices/net/ends/pcap_file.ts";
import { core } from "../../ffi/core.ts";
import {
  burstEnd,
  discardEnd,
  echoEnd,
  Frames,
  NetSwitch,
  Offload,
  pcapTap,
  streamEnd,
} from "../../mod.ts";
import { NetClient } from "../../frontend/mod.ts";
import { test } from "../harness.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { eventually, within } from "../support/wait.ts";
import { readCapture } from "./net_capture.ts";
import { frameOf, ServedNet, swapped } from "./net_guest.ts";

const extension = import.meta.url.slice(import.meta.url.lastIndexOf("."));

type Chunk = Uint8Array<ArrayBuffer>;

test("streams: what the guest sends is written, what is read it receives", async () => {
  const out = new TransformStream<Chunk, Chunk>();
  const into = new TransformStream<Chunk, Chunk>();
  await using served = await ServedNet.start({
    end: { readable: into.readable, writable: out.writable },
  });
  const card = await served.card();
  const reader = out.readable.getReader();
  const writer = into.writable.getWriter();
  for (const length of [14, 60, 1514, 4000]) {
    await card.send(frameOf(length));
    const { value } = await within(reader.read(), `${length} bytes`);
    assert.deepEqual(value, frameOf(length));
    writer.write(frameOf(length, { seed: 9 }));
    const { bytes } = await within(card.receive(), `${length} bytes back`);
    assert.deepEqual(bytes, frameOf(length, { seed: 9 }));
  }
  // What is no frame is dropped, and the rest goes on.
  writer.write(new Uint8Array(13));
  writer.write(new Uint8Array(65551));
  writer.write(frameOf(77));
  assert.equal((await within(card.receive(), "the last")).bytes.length, 77);
  assert.equal(served.nic.statistics.snapshot().toGuest.dropped, 2);
  reader.releaseLock();
  writer.releaseLock();
});

test("streams: a writable that is slow makes the guest wait, and loses nothing", async () => {
  const out = new TransformStream<Chunk, Chunk>();
  await using served = await ServedNet.start({
    end: streamEnd({ readable: new ReadableStream(), writable: out.writable }),
  });
  const card = await served.card({ queueSize: 1024 });
  const count = 900;
  const sent = Array.from(
    { length: count },
    (_, i) => card.send(frameOf(60, { seed: i })),
  );
  // As many as may wait are taken out of the ring, and then no more.
  await eventually(() =>
    served.nic.statistics.snapshot().fromGuest.packets >= 256
  );
  const taken = served.nic.statistics.snapshot().fromGuest.packets;
  assert.ok(taken < 512, `${taken} taken`);
  const reader = out.readable.getReader();
  for (let i = 0; i < count; i++) {
    const { value } = await within(reader.read(), `frame ${i}`);
    assert.deepEqual(value, frameOf(60, { seed: i }));
  }
  await within(Promise.all(sent), "all are sent");
  reader.releaseLock();
});

test("streams: a guest that is slow makes the readable wait, and loses nothing", async () => {
  const into = new TransformStream<Chunk, Chunk>();
  await using served = await ServedNet.start({
    end: { readable: into.readable, writable: new WritableStream() },
  });
  const card = await served.card({ bufferCount: 4 });
  const writer = into.writable.getWriter();
  const written = (async () => {
    for (let i = 0; i < 300; i++) await writer.write(frameOf(60, { seed: i }));
  })();
  for (let i = 0; i < 300; i++) {
    const { bytes } = await within(card.receive(), `frame ${i}`);
    assert.deepEqual(bytes, frameOf(60, { seed: i }));
  }
  await written;
  writer.releaseLock();
});

test("streams: the next front-end goes on with them; two at once are refused", async () => {
  const wire = new TransformStream<Chunk, Chunk>();
  await using served = await ServedNet.start({ end: wire });
  for (let round = 0; round < 2; round++) {
    const card = await NetClient.open({ path: served.path });
    await card.send(frameOf(60, { seed: round }));
    const { bytes } = await within(card.receive(), "round the wire");
    assert.deepEqual(bytes, frameOf(60, { seed: round }));
    await assert.rejects(NetClient.open({ path: served.path }));
    assert.match(await served.errors.next(), /the streams have a front-end/);
    await card.close();
    await eventually(() => served.target.devices.length === 0);
  }
});

for (const packed of [false, true]) {
  test(`bursts: fetched and sent by code that polls (${packed ? "packed" : "split"})`, async () => {
    const end = burstEnd();
    await using served = await ServedNet.start({ end });
    const frames = new Frames();
    assert.equal(end.receive(frames), 0);
    assert.equal(end.isConnected, false);
    const card = await served.card({ packed, queueSize: 256 });
    assert.equal(end.isConnected, true);
    let left = 500;
    const served500 = (async () => {
      while (left > 0) {
        const count = end.receive(frames);
        if (count === 0) {
          await within(end.whenReadable(), "frames");
          continue;
        }
        for (let i = 0; i < count; i++) frames.at(i)[13]++;
        left -= count;
        for (let sent = 0; sent < count;) {
          sent += end.send(frames, 0, sent, count - sent);
          if (sent < count) await new Promise((r) => setTimeout(r));
        }
      }
    })();
    const received = (async () => {
      for (let i = 0; i < 500; i++) {
        const expected = frameOf(60 + i, { seed: i });
        expected[13]++;
        const { bytes } = await within(card.receive(), `frame ${i}`);
        assert.deepEqual(bytes, expected);
      }
    })();
    for (let i = 0; i < 500; i++) {
      await within(card.send(frameOf(60 + i, { seed: i })), `sent ${i}`);
    }
    await served500;
    await received;
  });
}

test("bursts: the end of a front-end wakes who waits for frames", async () => {
  const end = burstEnd();
  await using served = await ServedNet.start({ end });
  const card = await NetClient.open({ path: served.path });
  const frames = new Frames();
  while (end.receive(frames) > 0);
  const woken = end.whenReadable();
  await card.close();
  await within(woken, "woken");
});

test("a burst's frames are where its words say", () => {
  const frames = new Frames(3);
  assert.ok(frames.add(frameOf(60)));
  assert.ok(frames.add(frameOf(1514)));
  assert.ok(frames.add(frameOf(14)));
  assert.equal(frames.add(frameOf(14)), false);
  assert.deepEqual([0, 1, 2].map((i) => frames.length(i)), [60, 1514, 14]);
  assert.deepEqual(frames.at(1), frameOf(1514));
  assert.ok([0, 1, 2].every((i) => frames.offset(i) % 16 === 0));
  assert.ok(!frames.isPartial(1));
  frames.header(1)[0] = 1;
  assert.ok(frames.isPartial(1));
  frames.clear();
  assert.ok(frames.add(frameOf(65550)));
  assert.deepEqual(frames.at(0), frameOf(65550));
  assert.throws(() => frames.add(new Uint8Array(13)), { code: "OPTION" });
  assert.throws(() => frames.add(new Uint8Array(65551)), { code: "OPTION" });
  assert.throws(() => new Frames(0), { code: "OPTION" });
  assert.throws(() => new Frames(257), { code: "OPTION" });
  assert.throws(() => new Frames(1, 65000), { code: "OPTION" });
});

test("switch: unknown and group addresses go to all, known ones to their port", async () => {
  const lan = new NetSwitch("lan");
  // Two devices on one switch; the first has two front-ends.
  await using first = await ServedNet.start({ end: lan });
  await using second = await ServedNet.start({ end: lan });
  const one = await first.card();
  const two = await first.card({ packed: true });
  const three = await second.card();
  assert.equal(lan.portCount, 3);
  const from = (n: number, to: number) => frameOf(60, { from: n, to });
  // 3 is not known yet.
  await one.send(from(1, 3));
  assert.deepEqual((await two.receive()).bytes, from(1, 3));
  assert.deepEqual((await three.receive()).bytes, from(1, 3));
  // The answer goes to 1 alone, and so does what 1 and 3 say from now on.
  await three.send(from(3, 1));
  assert.deepEqual((await one.receive()).bytes, from(3, 1));
  await one.send(from(1, 3));
  assert.deepEqual((await three.receive()).bytes, from(1, 3));
  const broadcast = from(2, 0);
  broadcast.fill(255, 0, 6);
  await two.send(broadcast);
  assert.deepEqual((await one.receive()).bytes, broadcast);
  assert.deepEqual((await three.receive()).bytes, broadcast);
  // To itself: nobody gets it.
  await one.send(from(1, 1));
  // 3 moves to the port of 2.
  await two.send(from(3, 1));
  assert.deepEqual((await one.receive()).bytes, from(3, 1));
  await one.send(from(1, 3));
  assert.deepEqual((await two.receive()).bytes, from(1, 3));
  assert.deepEqual([one.pending, two.pending, three.pending], [0, 0, 0]);
});

test("switch: a port that goes takes its addresses along", async () => {
  const lan = new NetSwitch("lan");
  await using served = await ServedNet.start({ end: lan });
  const one = await served.card();
  const two = await served.card();
  const gone = await NetClient.open({ path: served.path });
  await gone.send(frameOf(60, { from: 3, to: 1 }));
  await one.receive();
  await two.receive();
  await gone.close();
  await eventually(() => lan.portCount === 2);
  // Not known any more: to all.
  await one.send(frameOf(60, { from: 1, to: 3 }));
  assert.equal((await within(two.receive(), "flooded")).bytes[5], 3);
});

test("switch: many addresses of one guest cost no memory and no other guest", async () => {
  const lan = new NetSwitch("lan");
  await using served = await ServedNet.start({ end: lan });
  const one = await served.card();
  const two = await served.card();
  await two.send(frameOf(60, { from: 2, to: 9 }));
  await one.receive();
  two.onFrame = () => {};
  for (let i = 0; i < 3000; i += 100) {
    await Promise.all(Array.from({ length: 100 }, (_, j) => {
      const frame = frameOf(60, { from: 1, to: 2 });
      frame[10] = (i + j) >> 8;
      frame[11] = (i + j) & 0xff;
      frame[9] = 77;
      return one.send(frame);
    }));
  }
  two.onFrame = undefined;
  await two.send(frameOf(60, { from: 2, to: 8 }));
  await within(one.receive(), "still served");
});

test("pcap: a capture holds all frames of both ways, whole, with their times", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("echo.pcap");
  const before = Date.now() / 1000;
  const expected: Uint8Array[] = [];
  {
    await using served = await ServedNet.start({
      end: pcapTap(echoEnd(), { path }),
    });
    const card = await served.card();
    for (const length of [14, 60, 1514, 65000]) {
      await card.send(frameOf(length));
      await card.receive();
      expected.push(frameOf(length), swapped(frameOf(length)));
    }
  }
  const { records, snapLength } = readCapture(path);
  assert.equal(snapLength, 262144);
  assert.deepEqual(records.map(({ bytes }) => bytes), expected);
  const after = Date.now() / 1000;
  let last = before - 1;
  for (const { time, length, bytes } of records) {
    assert.equal(length, bytes.length);
    assert.ok(time >= last && time <= after + 1, `${time}`);
    last = time;
  }
});

test("pcap: the capture of an end that fetches, cut at the snap length", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("burst.pcap");
  const end = burstEnd();
  {
    await using served = await ServedNet.start({
      end: pcapTap(end, { path, snapLength: 20 }),
    });
    const card = await served.card();
    const frames = new Frames();
    const sent = card.send(frameOf(1000));
    while (end.receive(frames) === 0) {
      await within(end.whenReadable(), "a frame");
    }
    await sent;
  }
  const { records, snapLength } = readCapture(path);
  assert.equal(snapLength, 20);
  assert.equal(records.length, 1);
  assert.equal(records[0].length, 1000);
  assert.deepEqual(records[0].bytes, frameOf(1000).slice(0, 20));
});

test("pcap: a file that cannot be written is one sentence", () => {
  using folder = new TemporaryFolder();
  const path = folder.file("none/x.pcap");
  assert.throws(() => pcapTap(echoEnd(), { path }), {
    code: "OPTION",
    message: `Cannot write ${path}: ENOENT`,
  });
});

test("pcap: a file that takes no bytes is one sentence, and leaves no descriptor", () =>
  withoutDescriptorLeak(() => {
    assert.throws(() => pcapTap(echoEnd(), { path: "/dev/full" }), {
      name: "Vhost2Error",
      code: "OPTION",
      message: "Cannot write /dev/full: ENOSPC",
    });
    return Promise.resolve();
  }));

test("an end that fails costs its own queue, and says so", async () => {
  await using served = await ServedNet.start({
    end: {
      name: "bad",
      offloads: Offload.checksum,
      open: () => ({
        receive() {
          throw new Error("out of order");
        },
        close() {},
      }),
      close() {},
    },
  });
  const card = await served.card();
  await card.send(frameOf(60));
  assert.match(
    await served.errors.next(),
    /its end failed: Error: out of order/,
  );
});

test("discard takes everything", async () => {
  await using served = await ServedNet.start({ end: discardEnd() });
  const card = await served.card();
  for (let i = 0; i < 300; i++) await card.send(frameOf(60));
  assert.equal(served.nic.statistics.snapshot().fromGuest.packets, 300);
  assert.equal(card.pending, 0);
});

test("pcap: who died while it wrote leaves neither a lock nor half a record", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("dead.pcap");
  const file = PcapFile.create(path, 262_144);
  const other = PcapFile.join(file.portable);
  const frames = new Frames();
  frames.add(frameOf(60));
  other.add(frames, 0, 1);
  // A thread that has been, and has ended while it had the lock.
  const thread = new SharedArrayBuffer(4);
  const worker = new Worker(
    new URL(`./thread_number${extension}`, import.meta.url),
    { workerData: thread },
  );
  await new Promise((resolve) => worker.once("exit", resolve));
  await eventually(() => {
    const [number] = new Int32Array(thread);
    return number !== 0 && core.threadIsAlive(number) === 0;
  }, "the thread has ended");
  const [number] = new Int32Array(thread);
  Atomics.store(new Int32Array(file.portable.shared), 0, number);
  appendFileSync(path, frameOf(3000));
  file.add(frames, 0, 1);
  other.add(frames, 0, 1);
  other.close();
  file.close();
  const { records } = readCapture(path);
  assert.deepEqual(records.map(({ bytes }) => bytes), [
    frameOf(60),
    frameOf(60),
    frameOf(60),
  ]);
});
