// A network device's queue pairs in Workers: the same device, the same frames.
import assert from "node:assert/strict";
import {
  burstEnd,
  discardEnd,
  echoEnd,
  featureMask,
  netDevice,
  type NetEnd,
  NetFeature,
  NetSwitch,
  pcapTap,
  registerTarget,
  streamEnd,
} from "../../mod.ts";
import {
  FrontendRequest,
  NetClient,
  supportedFeatures,
} from "../../frontend/mod.ts";
import { test } from "../harness.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { Events, eventually, within } from "../support/wait.ts";
import { endModule, Word } from "./net_end_modules.ts";
import { readCapture } from "./net_capture.ts";
import { frameOf, ServedNet, swapped } from "./net_guest.ts";

const base = supportedFeatures | featureMask(
  ...[NetFeature.MAC, NetFeature.STATUS, NetFeature.MQ, NetFeature.MRG_RXBUF],
);
/** What `witness` sees. */
function witnessEnd() {
  const shared = new SharedArrayBuffer(Word.byteSize);
  return { words: new Int32Array(shared), end: endModule("witness", shared) };
}

/** Frames of many lengths on every pair, all at once; each comes back. */
async function exchange(
  card: NetClient,
  back: (frame: Uint8Array<ArrayBuffer>) => Uint8Array = swapped,
): Promise<number> {
  const lengths = [14, 60, 64, 65, 500, 1514, 3000];
  const expected = new Map<string, number>();
  const received = (async () => {
    for (let i = 0; i < lengths.length * card.pairCount; i++) {
      const { bytes, pair } = await within(card.receive(), `frame ${i}`);
      const key = bytes.toString();
      assert.equal(expected.get(key), pair, `a frame of ${bytes.length}`);
      expected.delete(key);
    }
  })();
  await Promise.all(
    Array.from({ length: card.pairCount }, async (_, pair) => {
      for (const length of lengths) {
        const frame = frameOf(length, { from: 10 + pair });
        expected.set(back(frame.slice()).toString(), pair);
        await within(card.send(frame, { pair }), `sent ${length}`);
      }
    }),
  );
  await received;
  assert.equal(card.pending, 0);
  return lengths.length;
}

for (const packed of [false, true]) {
  for (const workers of [1, 2]) {
    const rings = packed ? "packed" : "split";
    test(`echo in ${workers} Workers: frames come back whole on their queue pair, and are counted here (${rings})`, async () => {
      await using served = await ServedNet.start(
        { end: echoEnd(), numQueues: 3 },
        { workers },
      );
      const card = await served.card({ packed, pairCount: 3, features: base });
      const count = await exchange(card);
      for (let pair = 0; pair < 3; pair++) {
        const { fromGuest, toGuest } = served.nic.statistics.snapshot(pair);
        assert.equal(fromGuest.packets, count);
        assert.equal(toGuest.packets, count);
        assert.equal(fromGuest.bytes, toGuest.bytes);
      }
      assert.equal(
        served.nic.statistics.snapshot().fromGuest.packets,
        3 * count,
      );
      assert.deepEqual(served.errors.pending, []);
    });
  }
}

test("both queues of a pair are in one Worker, and pairs are spread", async () => {
  const { words, end } = witnessEnd();
  await using served = await ServedNet.start(
    { end, numQueues: 4 },
    { workers: 2, pollMicroseconds: 0 },
  );
  const card = await served.card({ pairCount: 4, features: base });
  // Were the receive queue elsewhere, the end could not send.
  await exchange(card, (frame) => frame);
  const threads = [...words.subarray(Word.threads, Word.threads + 4)];
  assert.equal(threads[0], threads[2]);
  assert.equal(threads[1], threads[3]);
  assert.notEqual(threads[0], threads[1]);
  assert.ok(!threads.includes(0), `${threads}`);
  assert.equal(words[Word.made], 2);
});

for (const workers of [0, 1]) {
  test(`a module's end is made once per isolate, and closed with the last front-end (${workers} Workers)`, async () => {
    const { words, end } = witnessEnd();
    await using served = await ServedNet.start({ end }, { workers });
    for (let round = 1; round < 4; round++) {
      const cards = [
        await NetClient.open({ path: served.path }),
        await NetClient.open({ path: served.path }),
      ];
      for (const card of cards) {
        await exchange(card, (frame) => frame);
      }
      assert.equal(words[Word.made], round);
      for (const card of cards) await card.close();
      await eventually(() => served.target.devices.length === 0);
      assert.equal(words[Word.closed], round);
    }
  });

  for (const name of ["bursts", "streams"]) {
    test(`a module's ${name} get and send frames (${workers} Workers)`, async () => {
      await using served = await ServedNet.start(
        { end: endModule(name) },
        { workers },
      );
      for (let round = 0; round < 2; round++) {
        const card = await NetClient.open({ path: served.path });
        await exchange(card, (frame) => {
          frame[13] ^= 0xff;
          return frame;
        });
        await card.close();
        await eventually(() => served.target.devices.length === 0);
      }
      const { fromGuest, toGuest } = served.nic.statistics.snapshot();
      assert.equal(fromGuest.packets, 14);
      assert.equal(toGuest.packets, 14);
    });
  }

  test(`SEND_RARP reaches a module's end (${workers} Workers)`, async () => {
    const { words, end } = witnessEnd();
    await using served = await ServedNet.start({ end }, { workers });
    const card = await served.card();
    for (const last of [3, 4]) {
      await card.device.connection.exchange(
        FrontendRequest.SEND_RARP,
        BigInt(last) << 40n | 0x0201005452n,
        { ack: true },
      );
      await eventually(() => Atomics.load(words, Word.announced) === last);
    }
  });

  test(`an end pulls the cable, and the handle plugs it in again (${workers} Workers)`, async () => {
    const { words, end } = witnessEnd();
    await using served = await ServedNet.start({ end }, { workers });
    const card = await served.card();
    const changes = new Events<null>();
    card.device.onConfigChange = () => changes.push(null);
    words[Word.pullsCable] = 1;
    await card.send(frameOf(60));
    await changes.next();
    assert.equal((await card.refreshConfig()).isLinkUp, false);
    served.nic.setLink(true);
    await changes.next();
    assert.equal((await card.refreshConfig()).isLinkUp, true);
  });
}

test("the control queue is in a Worker too: announcements, and the pairs in use", async () => {
  await using served = await ServedNet.start(
    { end: echoEnd(), numQueues: 3 },
    { workers: 2 },
  );
  const features = base |
    featureMask(NetFeature.CTRL_VQ, NetFeature.GUEST_ANNOUNCE);
  const card = await served.card({ pairCount: 3, control: true, features });
  assert.equal(await card.control(3, 0), 1);
  const changes = new Events<null>();
  card.device.onConfigChange = () => changes.push(null);
  served.nic.announce();
  await changes.next();
  assert.equal((await card.refreshConfig()).isAnnounceWanted, true);
  assert.equal(await card.control(3, 0), 0);
  assert.equal((await card.refreshConfig()).isAnnounceWanted, false);
  // One pair only: what went out on the third, whose Worker has the first too,
  // comes in on the first.
  assert.equal(await card.control(4, 0, Uint8Array.of(1, 0)), 0);
  await card.send(frameOf(60), { pair: 2 });
  assert.equal((await card.receive()).pair, 0);
  // The other Worker has no pair in use: its frames are dropped.
  await card.send(frameOf(60), { pair: 1 });
  await eventually(() =>
    served.nic.statistics.snapshot().toGuest.dropped === 1
  );
  assert.equal(await card.control(4, 0, Uint8Array.of(3, 0)), 0);
  for (const pair of [0, 1, 2]) {
    await card.send(frameOf(60), { pair });
    assert.equal((await card.receive()).pair, pair);
  }
  assert.equal(await card.control(4, 0, Uint8Array.of(4, 0)), 1);
});

for (const packed of [false, true]) {
  const rings = packed ? "packed" : "split";
  test(`a disabled queue's frames are dropped in a Worker too, and it receives none (${rings})`, async () => {
    await using served = await ServedNet.start(
      { end: echoEnd(), numQueues: 2 },
      { workers: 1 },
    );
    const card = await served.card({ pairCount: 2, packed, features: base });
    const { connection } = card.device;
    const dropped = () => served.nic.statistics.snapshot().fromGuest.dropped;
    await connection.setVringEnable(1, false, { ack: true });
    await within(card.send(frameOf(60)), "a frame that is dropped");
    await eventually(() => dropped() === 1);
    await connection.setVringEnable(1, true, { ack: true });
    // What comes for a pair that receives none comes by another.
    await connection.setVringEnable(0, false, { ack: true });
    await card.send(frameOf(60));
    assert.equal((await within(card.receive(), "by the other")).pair, 1);
    await connection.setVringEnable(0, true, { ack: true });
    await card.send(frameOf(60));
    assert.equal((await within(card.receive(), "by its own")).pair, 0);
    assert.equal(dropped(), 1);
    assert.equal(card.pending, 0);
  });

  test(`a queue in a Worker goes on where it stopped (${rings})`, async () => {
    await using served = await ServedNet.start(
      { end: echoEnd() },
      { workers: 1 },
    );
    const card = await served.card({ packed });
    for (let round = 0; round < 3; round++) {
      for (let i = 0; i < 50; i++) {
        const frame = frameOf(60 + i, { seed: round });
        await within(card.send(frame), "sent");
        const { bytes } = await within(card.receive(), "back");
        assert.deepEqual(bytes, swapped(frame));
      }
      await card.device.stopQueue(0);
      await card.device.stopQueue(1);
      const waiting = card.send(frameOf(99, { seed: round }));
      await card.device.startQueue(0);
      await card.device.startQueue(1);
      await within(waiting, "what waited is sent");
      const { bytes } = await within(card.receive(), "what waited is back");
      assert.equal(bytes.length, 99);
    }
  });
}

test("pcap: the frames of three Workers are whole records in one file, in the order of time", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("echo.pcap");
  const rounds = 40;
  {
    await using served = await ServedNet.start(
      { end: pcapTap(echoEnd(), { path }), numQueues: 3 },
      { workers: 3 },
    );
    const card = await served.card({ pairCount: 3, features: base });
    for (let round = 0; round < rounds; round++) await exchange(card);
  }
  const { records } = readCapture(path);
  assert.equal(records.length, rounds * 3 * 7 * 2);
  const counts = new Map<string, number>();
  let last = 0;
  for (const { time, length, bytes } of records) {
    assert.ok(time >= last);
    last = time;
    assert.equal(length, bytes.length);
    const key = bytes.toString();
    counts.set(key, (counts.get(key) ?? 0) + 1);
  }
  for (let pair = 0; pair < 3; pair++) {
    for (const length of [14, 60, 64, 65, 500, 1514, 3000]) {
      const frame = frameOf(length, { from: 10 + pair });
      assert.equal(counts.get(frame.toString()), rounds, `${length} sent`);
      assert.equal(counts.get(swapped(frame).toString()), rounds);
    }
  }
});

test("a Worker that dies takes its pairs along and no others, and its successor serves the next front-end", async () => {
  await using served = await ServedNet.start(
    { end: endModule("fragile"), numQueues: 2 },
    { workers: 2 },
  );
  const card = await NetClient.open({
    path: served.path,
    pairCount: 2,
    features: base,
  });
  await exchange(card, (frame) => frame);
  const deadly = frameOf(60);
  deadly[0] = 0xee;
  card.send(deadly, { pair: 1 }).catch(() => {});
  await eventually(() => served.errors.pending.length >= 2);
  for (const message of served.errors.pending) {
    assert.match(message, /queue [23] of .*: its Worker has ended/);
  }
  while (card.pending > 0) await card.receive();
  await card.send(frameOf(60), { pair: 0 });
  assert.equal((await within(card.receive(), "the other pair")).pair, 0);
  await card.close();
  await eventually(() => served.target.devices.length === 0);
  const next = await served.card({ pairCount: 2, features: base });
  await exchange(next, (frame) => frame);
});

const streams = () =>
  streamEnd({
    readable: new ReadableStream(),
    writable: new WritableStream(),
  });
const homebound: [string, () => NetEnd, RegExp][] = [
  [
    "a switch",
    () => new NetSwitch("lan"),
    /its end \(lan\) is of this isolate/,
  ],
  ["a burst end", () => burstEnd(), /its end \(burst\) is of this isolate/],
  ["streams", streams, /its end \(streams\) is of this isolate/],
  ["a capture of a switch", () => {
    const folder = new TemporaryFolder();
    return pcapTap(new NetSwitch("lan"), { path: folder.file("a.pcap") });
  }, /its end \(lan\) is of this isolate/],
];
for (const [name, open, message] of homebound) {
  test(`${name} of this isolate is refused in Workers, and served on the event loop`, async () => {
    using folder = new TemporaryFolder();
    await using nic = netDevice({ end: open() });
    const register = (workers: number) =>
      registerTarget({
        transport: "vhost-user",
        address: folder.file("socket"),
        ...nic,
        workers,
      });
    await assert.rejects(register(1), { code: "OPTION", message });
    await (await register(0)).unregister();
  });
}

test("a card of many guests in Workers: each has its own frames", async () => {
  await using served = await ServedNet.start(
    { end: echoEnd() },
    { workers: 2 },
  );
  const cards = await Promise.all(
    Array.from({ length: 4 }, () => served.card()),
  );
  await Promise.all(cards.map((card) => exchange(card)));
  assert.equal(served.nic.statistics.snapshot().toGuest.packets, 28);
});

test("discard takes everything in a Worker", async () => {
  await using served = await ServedNet.start(
    { end: discardEnd() },
    { workers: 1 },
  );
  const card = await served.card();
  for (let i = 0; i < 300; i++) await card.send(frameOf(60));
  assert.equal(served.nic.statistics.snapshot().fromGuest.packets, 300);
  assert.equal(card.pending, 0);
});
