// The network device (virtio 1.3, section 5.1), as a driver sees it.
import assert from "node:assert/strict";
import { discardEnd, echoEnd, featureMask, NetFeature } from "../../mod.ts";
import {
  FrontendRequest,
  NetClient,
  RefusedError,
  supportedFeatures,
} from "../../frontend/mod.ts";
import { test } from "../harness.ts";
import { Events, eventually, within } from "../support/wait.ts";
import { frameOf, ServedNet, swapped } from "./net_guest.ts";

const base = supportedFeatures | featureMask(NetFeature.MAC, NetFeature.STATUS);
const mergeable = featureMask(NetFeature.MRG_RXBUF);

/** Frames of many lengths go to the echo and come back whole. */
async function exchange(card: NetClient): Promise<void> {
  const lengths = [14, 59, 60, 64, 65, 500, 1514, 3000];
  const cuts = [[12], [], [1, 2, 3, 11], [5, 13, 14, 20], [12, 26]];
  for (const cut of cuts) {
    for (const [seed, length] of lengths.entries()) {
      const frame = frameOf(length, { seed });
      await within(card.send(frame, { cuts: cut }), `sent ${length}`);
      const back = await within(card.receive(), `received ${length}`);
      assert.deepEqual(back.bytes, swapped(frame));
      assert.equal(back.header.flags, 0);
    }
  }
}

for (const packed of [false, true]) {
  for (const indirect of [false, true]) {
    const rings = `${packed ? "packed" : "split"}${
      indirect ? ", indirect" : ""
    }`;
    test(`frames go both ways whole, however they are cut (${rings})`, async () => {
      await using served = await ServedNet.start({ end: echoEnd() });
      const card = await served.card({
        packed,
        indirect,
        features: base,
        bufferShape: [5, 20, 3000],
      });
      await exchange(card);
      assert.equal(card.pending, 0);
    });

    test(`a frame takes as many mergeable buffers as it needs (${rings})`, async () => {
      await using served = await ServedNet.start({ end: echoEnd() });
      const card = await served.card({
        packed,
        indirect,
        features: base | mergeable,
        bufferShape: [10, 90],
        bufferCount: 40,
      });
      await exchange(card);
      const [frame] = [frameOf(3000)];
      await card.send(frame);
      assert.equal((await card.receive()).header.numBuffers, 31);
    });
  }
}

test("a legacy driver's header has 10 bytes", async () => {
  await using served = await ServedNet.start({ end: echoEnd() });
  const card = await served.card({ features: featureMask(30) });
  // What the client takes for the end of the header is the frame's start.
  const frame = frameOf(60);
  const bytes = new Uint8Array(70);
  bytes.set(frame, 10);
  await card.transmitQueue().submit({ readable: [bytes] });
  const back = await card.receive();
  assert.deepEqual(back.bytes, swapped(frame).subarray(2));
});

test("counters are per queue, by kind and by length", async () => {
  await using served = await ServedNet.start({ end: echoEnd() });
  const card = await served.card();
  for (const length of [14, 63, 64, 65, 127, 128, 1023, 1024, 1518, 1519]) {
    await card.send(frameOf(length));
    await card.receive();
  }
  const broadcast = frameOf(60);
  broadcast.fill(0xff, 0, 6);
  await card.send(broadcast);
  const multicast = frameOf(60);
  multicast[0] = 1;
  await card.send(multicast);
  await card.receive();
  await card.receive();
  const { fromGuest, toGuest } = served.nic.statistics.snapshot(0);
  assert.equal(fromGuest.packets, 12);
  assert.equal(
    fromGuest.bytes,
    14 + 63 + 64 + 65 + 127 + 128 + 1023 + 1024 + 1518 + 1519 + 120,
  );
  assert.equal(fromGuest.broadcast, 1);
  assert.equal(fromGuest.multicast, 1);
  assert.equal(fromGuest.below64, 4);
  assert.equal(fromGuest.exactly64, 1);
  assert.equal(fromGuest.to127, 2);
  assert.equal(fromGuest.to255, 1);
  assert.equal(fromGuest.to1023, 1);
  assert.equal(fromGuest.to1518, 2);
  assert.equal(fromGuest.above1518, 1);
  assert.equal(toGuest.packets, 12);
  assert.deepEqual(served.nic.statistics.snapshot(), { fromGuest, toGuest });
});

test("a frame without a receive buffer is dropped and counted", async () => {
  await using served = await ServedNet.start({ end: echoEnd() });
  const card = await served.card({ bufferCount: 2 });
  await card.device.stopQueue(0);
  for (let i = 0; i < 5; i++) await card.send(frameOf(60));
  const { toGuest } = served.nic.statistics.snapshot();
  assert.deepEqual([toGuest.packets, toGuest.dropped], [0, 5]);
  await card.device.startQueue(0);
  await card.send(frameOf(60));
  await within(card.receive(), "a frame after the restart");
});

for (const packed of [false, true]) {
  test(`a queue goes on where it stopped (${packed ? "packed" : "split"})`, async () => {
    await using served = await ServedNet.start({ end: echoEnd() });
    const card = await served.card({ packed });
    for (let round = 0; round < 4; round++) {
      for (let i = 0; i < 50; i++) {
        const frame = frameOf(60 + i, { seed: round });
        await card.send(frame);
        assert.deepEqual((await card.receive()).bytes, swapped(frame));
      }
      await card.device.stopQueue(0);
      await card.device.stopQueue(1);
      // What is sent meanwhile waits in the ring.
      const waiting = card.send(frameOf(99, { seed: round }));
      await card.device.startQueue(0);
      await card.device.startQueue(1);
      await within(waiting, "what waited is sent");
      assert.equal((await card.receive()).bytes.length, 99);
    }
  });
}

test("frames come back on the queue pair on which they went", async () => {
  await using served = await ServedNet.start({ end: echoEnd(), numQueues: 3 });
  const card = await served.card({
    pairCount: 3,
    features: base | mergeable | featureMask(NetFeature.MQ),
  });
  assert.equal(card.config.maxPairCount, 3);
  for (const pair of [0, 1, 2, 1, 0]) {
    await card.send(frameOf(60), { pair });
    assert.equal((await card.receive()).pair, pair);
  }
  assert.equal(served.nic.statistics.snapshot(1).fromGuest.packets, 2);
});

test("configuration space tells address, MTU, queue pairs and link", async () => {
  await using served = await ServedNet.start({
    end: discardEnd(),
    mac: "52:54:00:AB:cd:ef",
    mtu: 9000,
    numQueues: 2,
  });
  const card = await served.card();
  assert.deepEqual(card.config, {
    mac: "52:54:00:ab:cd:ef",
    isLinkUp: true,
    isAnnounceWanted: false,
    maxPairCount: 2,
    mtu: 9000,
  });
  const changes = new Events<null>();
  card.device.onConfigChange = () => changes.push(null);
  served.nic.setLink(false);
  await changes.next();
  assert.equal((await card.refreshConfig()).isLinkUp, false);
  served.nic.setLink(true);
  await changes.next();
  assert.equal((await card.refreshConfig()).isLinkUp, true);
  await assert.rejects(
    card.device.setConfig(0, new Uint8Array(6)),
    RefusedError,
  );
});

test("the control queue takes announcements and the number of queue pairs", async () => {
  await using served = await ServedNet.start({ end: echoEnd(), numQueues: 2 });
  const features = base | mergeable |
    featureMask(NetFeature.MQ, NetFeature.CTRL_VQ, NetFeature.GUEST_ANNOUNCE);
  const card = await served.card({ pairCount: 2, control: true, features });
  // Nobody has asked for an announcement.
  assert.equal(await card.control(3, 0), 1);
  const changes = new Events<null>();
  card.device.onConfigChange = () => changes.push(null);
  served.nic.announce();
  await changes.next();
  assert.equal((await card.refreshConfig()).isAnnounceWanted, true);
  assert.equal(await card.control(3, 0), 0);
  assert.equal((await card.refreshConfig()).isAnnounceWanted, false);
  // One pair only: what went out on the second comes in on the first.
  assert.equal(await card.control(4, 0, Uint8Array.of(1, 0)), 0);
  await card.send(frameOf(60), { pair: 1 });
  assert.equal((await card.receive()).pair, 0);
  assert.equal(await card.control(4, 0, Uint8Array.of(2, 0)), 0);
  await card.send(frameOf(60), { pair: 1 });
  assert.equal((await card.receive()).pair, 1);
  for (const data of [[0, 0], [3, 0], [0, 1], [1], [1, 0, 0], []]) {
    assert.equal(await card.control(4, 0, Uint8Array.from(data)), 1, `${data}`);
  }
  assert.equal(await card.control(1, 0), 1);
});

test("NET_SET_MTU takes what a frame may carry and refuses the rest", async () => {
  await using served = await ServedNet.start({ end: discardEnd(), mtu: 2000 });
  const card = await served.card();
  const set = (mtu: bigint) =>
    card.device.connection.exchange(FrontendRequest.NET_SET_MTU, mtu, {
      ack: true,
    });
  await set(1500n);
  assert.equal((await card.refreshConfig()).mtu, 1500);
  for (const mtu of [0n, 67n, 2001n, 1n << 32n, (1n << 64n) - 1n]) {
    await assert.rejects(set(mtu), RefusedError, `${mtu}`);
  }
  assert.equal((await card.refreshConfig()).mtu, 1500);
});

test("SEND_RARP makes the guest's address known to the other end", async () => {
  const { readable, writable } = new TransformStream<
    Uint8Array<ArrayBuffer>,
    Uint8Array<ArrayBuffer>
  >();
  const quiet = new ReadableStream<Uint8Array>();
  await using served = await ServedNet.start({
    end: { readable: quiet, writable },
  });
  const card = await served.card();
  const reader = readable.getReader();
  // The address 52:54:00:01:02:03 in memory order.
  await card.device.connection.exchange(
    FrontendRequest.SEND_RARP,
    0x030201005452n,
    { ack: true },
  );
  const { value: frame } = await within(reader.read(), "the announcement");
  assert.equal(frame!.length, 60);
  const mac = [0x52, 0x54, 0, 1, 2, 3];
  assert.deepEqual([...frame!.subarray(0, 6)], Array(6).fill(255));
  assert.deepEqual([...frame!.subarray(6, 14)], [...mac, 0x80, 0x35]);
  assert.deepEqual(
    [...frame!.subarray(14, 22)],
    [0, 1, 8, 0, 6, 4, 0, 3],
  );
  assert.deepEqual([...frame!.subarray(22, 28)], mac);
  assert.deepEqual([...frame!.subarray(32, 38)], mac);
  reader.releaseLock();
});

test("a queue whose front-end never kicks is polled", async () => {
  await using served = await ServedNet.start({ end: echoEnd() });
  const card = await served.card();
  const { connection } = card.device;
  for (const index of [0, 1]) {
    const driver = card.device.queues[index];
    const base = await card.device.stopQueue(index);
    await connection.setVringNum(index, driver.queueSize);
    await connection.setVringBase(index, base);
    await connection.setVringAddr(card.device.vringAddress(index));
    await connection.setVringKick(index, null);
    await connection.setVringEnable(index, true, { ack: true });
  }
  const frame = frameOf(60);
  const bytes = new Uint8Array(72);
  bytes.set(frame, 12);
  card.transmitQueue().submit({ readable: [bytes], kick: false });
  assert.deepEqual(
    (await within(card.receive(), "echo")).bytes,
    swapped(frame),
  );
});

test("options that cannot be used are refused in one sentence", async () => {
  const { netDevice } = await import("../../mod.ts");
  const wrong = [
    { mac: "52:54:00:12:34" },
    { mac: "01:00:5e:00:00:01" },
    { mac: "00:00:00:00:00:00" },
    { mtu: 67 },
    { mtu: 65536 },
    { numQueues: 0 },
    { numQueues: 128 },
    { numQueues: 1.5 },
  ];
  for (const options of wrong) {
    assert.throws(
      () => netDevice({ end: discardEnd(), ...options }),
      (error: { code: string; message: string }) =>
        error.code === "OPTION" &&
        /^Cannot use (mac|mtu|numQueues): /.test(error.message),
      JSON.stringify(options),
    );
  }
});

test("a front-end that goes in the middle leaves nothing behind", async () => {
  await using served = await ServedNet.start({ end: echoEnd() });
  for (let round = 0; round < 3; round++) {
    const card = await NetClient.open({ path: served.path });
    const sending = Promise.allSettled(
      Array.from({ length: 40 }, () => card.send(frameOf(1000))),
    );
    card.device.connection.close();
    await card.close();
    await sending;
  }
  await eventually(() => served.target.devices.length === 0);
  const card = await served.card();
  await card.send(frameOf(60));
  await card.receive();
});

test("a disabled queue's frames are dropped, and it receives none", async () => {
  await using served = await ServedNet.start({ end: echoEnd(), numQueues: 2 });
  const card = await served.card({ pairCount: 2 });
  const { connection } = card.device;
  const dropped = () => served.nic.statistics.snapshot().fromGuest.dropped;
  // The first pair: what is sent goes back to the driver at once.
  await connection.setVringEnable(1, false, { ack: true });
  await within(card.send(frameOf(60)), "a frame that is dropped");
  assert.equal(dropped(), 1);
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
