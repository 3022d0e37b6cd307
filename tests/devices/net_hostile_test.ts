// Inputs that broke other network back-ends, beside a device that must not
// notice. The numbers are those of the catalogue of hostile inputs.
import assert from "node:assert/strict";
import {
  burstEnd,
  echoEnd,
  Frames,
  type Net,
  netDevice,
  NetHeader,
} from "../../mod.ts";
import {
  DescriptorFlag,
  encodeNetHeader,
  NetClient,
  type NetClientOptions,
  NetGso,
  NetHeaderFlag,
  type SplitDriver,
  supportedFeatures,
  VhostUserDevice,
} from "../../frontend/mod.ts";
import { test } from "../harness.ts";
import { withBystander, type World } from "../hostile/world.ts";
// The runtime keeps descriptors from its first Worker on.
import "../session/worker_world.ts";
import { eventually, within } from "../support/wait.ts";
import { NetFlood } from "./net_flood.ts";
import { frameOf, swapped } from "./net_guest.ts";
import { allOffloads, lies, offloading } from "./net_lies.ts";

const { NEXT, WRITE, INDIRECT } = DescriptorFlag;
const rounds = 10;
const unmapped = 0xdead_0000_0000n;
/** Attacks an echo, which afterwards still sends back: here and in a Worker. */
function attackEcho(
  name: string,
  attack: (world: World, nic: Net) => Promise<void>,
): void {
  for (const workers of [0, 1]) {
    let nic: Net;
    test(
      workers === 0 ? name : `${name}, in a Worker`,
      () =>
        withBystander(async (world) => {
          await attack(world, nic);
          const card = await NetClient.open({ path: world.path });
          await assertEchoes(card);
          await card.close();
        }, () => {
          nic = netDevice({ end: echoEnd() });
          return { ...nic, workers };
        }),
    );
  }
}

async function assertEchoes(card: NetClient): Promise<void> {
  const frame = frameOf(200);
  await within(card.send(frame), "a frame is sent");
  const { bytes } = await within(card.receive(), "it comes back");
  assert.deepEqual(bytes, swapped(frame));
}

for (const packed of [false, true]) {
  const rings = packed ? "packed" : "split";
  attackEcho(
    `rows 26, 36: transmit chains up to the header's length are counted and go back (${rings})`,
    async (world, nic) => {
      await world.repeat(rounds, async () => {
        const card = await NetClient.open({ path: world.path, packed });
        const before = nic.statistics.snapshot().fromGuest.errors;
        const sizes = [
          ...[[1], [11], [12], [4, 8], [10, 2], [12, 1], [12, 13]],
          ...[[1, 1], Array(12).fill(1), Array(25).fill(1), [25]],
        ];
        for (const list of sizes) {
          const readable = list.map((size) => new Uint8Array(size));
          await within(
            card.transmitQueue().submit({ readable }),
            `a chain of ${list}`,
          );
        }
        // Only writable bytes: no header at all.
        await card.transmitQueue().submit({ writable: [100] });
        const { errors } = nic.statistics.snapshot().fromGuest;
        assert.equal(errors - before, sizes.length + 1);
        await assertEchoes(card);
        assert.equal(card.pending, 0);
        await card.close();
      });
    },
  );

  attackEcho(
    `row 26: a header over more than two descriptors is a header (${rings})`,
    async (world) => {
      const card = await NetClient.open({ path: world.path, packed });
      for (const indirect of [false, true]) {
        for (
          const cuts of [[1, 2, 3], [4, 8, 12], [11, 12, 13], [
            ...Array(30).keys(),
          ]]
        ) {
          const frame = frameOf(100);
          await card.send(frame, { cuts, indirect });
          assert.deepEqual((await card.receive()).bytes, swapped(frame));
        }
      }
      await card.close();
    },
  );
}

test("rows 27, 35: a header that lies is counted, and its frame reaches nobody", () => {
  const end = burstEnd({ offloads: allOffloads });
  let nic: Net;
  return withBystander(async (world) => {
    const card = await NetClient.open({
      path: world.path,
      features: offloading,
    });
    const frames = new Frames();
    for (const [name, header] of lies) {
      const before = nic.statistics.snapshot().fromGuest.errors;
      const sent = card.send(frameOf(60), {
        header: { flags: NetHeaderFlag.NEEDS_CSUM, ...header },
      });
      await eventually(() => {
        assert.equal(end.receive(frames), 0, name);
        return nic.statistics.snapshot().fromGuest.errors > before;
      });
      await within(sent, name);
      assert.equal(nic.statistics.snapshot().fromGuest.errors, before + 1);
    }
    // The truth passes.
    const sent = card.send(frameOf(60), {
      header: {
        flags: NetHeaderFlag.NEEDS_CSUM,
        csumStart: 34,
        csumOffset: 24,
        gsoType: NetGso.TCPV4 | NetGso.ECN,
        gsoSize: 500,
        hdrLen: 54,
      },
    });
    await eventually(() => end.receive(frames) === 1);
    await sent;
    assert.ok(frames.isPartial(0));
    await card.close();
  }, () => nic = netDevice({ end, onError: assert.fail }));
});

attackEcho(
  "offloads that were not negotiated are errors, not offloads",
  async (world, nic) => {
    const card = await NetClient.open({ path: world.path });
    await card.send(frameOf(60), {
      header: { flags: NetHeaderFlag.NEEDS_CSUM, csumStart: 34, csumOffset: 6 },
    });
    await card.send(frameOf(60), {
      header: { gsoType: NetGso.TCPV4, gsoSize: 100 },
    });
    assert.equal(nic.statistics.snapshot().fromGuest.errors, 2);
    await card.close();
  },
);

test("row 28: a header that changes after the check is the one that was checked", () => {
  const end = burstEnd({ offloads: allOffloads });
  return withBystander(async (world) => {
    const card = await NetClient.open({
      path: world.path,
      features: offloading,
    });
    const { ram } = card.device;
    const address = ram.allocate(72);
    const good = encodeNetHeader({
      flags: NetHeaderFlag.NEEDS_CSUM,
      csumStart: 34,
      csumOffset: 16,
    });
    ram.write(address, good);
    ram.write(address + 12n, frameOf(60));
    const sent = card.transmitQueue().submitChain([
      { address, length: 72, isWritable: false },
    ]);
    const frames = new Frames();
    await eventually(() => end.receive(frames) === 1);
    await sent;
    ram.bytes(address, 72).fill(0xff);
    assert.deepEqual(frames.header(0), good);
    assert.equal(frames.header(0)[NetHeader.csum_start], 34);
    assert.deepEqual(frames.at(0), frameOf(60));
    await card.close();
  }, () => netDevice({ end }));
});

/** A device whose control queue is the third of its split rings. */
async function openControl(world: World) {
  const device = await VhostUserDevice.open({
    path: world.path,
    features: offloading,
    queueCount: 3,
    acksAll: true,
  });
  return { device, driver: device.queues[2] as SplitDriver };
}

/** Breaks the control queue; the others of the device go on. */
function breakControl(
  name: string,
  reason: RegExp,
  attack: (driver: SplitDriver, buffer: bigint) => void,
): void {
  attackEcho(name, async (world) => {
    const { errorFd } = world;
    await world.repeat(rounds, async () => {
      const { device, driver } = await openControl(world);
      await device.connection.setVringErr(2, errorFd, { ack: true });
      attack(driver, device.ram.allocate(4096));
      driver.kick();
      await world.reported(reason);
      await world.signalled(errorFd);
      assert.equal(driver.usedIndex, 0);
      const bytes = new Uint8Array(112);
      bytes.set(frameOf(100), 12);
      const back = device.queues[0].submit({ writable: [2048] });
      await device.queues[1].submit({ readable: [bytes] });
      assert.equal((await within(back, "the frame")).written, 112);
      await device.close();
    });
  });
}

breakControl(
  "row 33: control queue, a next descriptor outside the table",
  /queue 2 of .*: next 999 is outside the descriptor table/,
  (driver, buffer) => {
    driver.descriptor(0, {
      address: buffer,
      length: 2,
      flags: NEXT,
      next: 999,
    });
    driver.publish(0);
  },
);
breakControl(
  "row 33: control queue, a chain without an end",
  /queue 2 of .*: a chain has more than 128 descriptors/,
  (driver, buffer) => {
    driver.descriptor(0, { address: buffer, length: 2, flags: NEXT, next: 1 });
    driver.descriptor(1, { address: buffer, length: 2, flags: NEXT, next: 0 });
    driver.publish(0);
  },
);
breakControl(
  "row 34: control queue, an available index beyond the queue",
  /queue 2 of .*: the available index 129 is more entries ahead/,
  (driver) => driver.setAvailableIndex(129),
);

attackEcho(
  "control queue: commands without an end, an answer or a meaning",
  async (world) => {
    const { device, driver } = await openControl(world);
    const answer = async (readable: Uint8Array[], writable: number[]) => {
      const { data, written } = await within(
        driver.submit({ readable, writable, initial: 77 }),
        "an answer",
      );
      return { last: data.at(-1)?.at(-1), written };
    };
    const short = await answer([Uint8Array.of(4)], [1]);
    assert.deepEqual(short, { last: 1, written: 1 });
    const long = await answer([new Uint8Array(60000).fill(4)], [1]);
    assert.deepEqual(long, { last: 1, written: 1 });
    assert.equal((await answer([], [1])).last, 1);
    assert.equal((await answer([Uint8Array.of(3, 0)], [])).written, 0);
    for (let group = 0; group < 256; group++) {
      const { last } = await answer([Uint8Array.of(group, 0)], [1]);
      assert.equal(last, 1, `${group}`);
    }
    await device.close();
  },
);

attackEcho(
  "receive buffers that are too small come back empty, or are gathered",
  async (world, nic) => {
    const small: NetClientOptions[] = [
      { features: supportedFeatures, bufferShape: [1] },
      { features: supportedFeatures, bufferShape: [12, 99] },
      // 256 chains of 8 bytes are never enough for 3000.
      { bufferShape: [8], bufferCount: 512, queueSize: 512 },
    ];
    for (const options of small) {
      const card = await NetClient.open({ path: world.path, ...options });
      const before = nic.statistics.snapshot().toGuest.dropped;
      await card.send(frameOf(3000));
      await eventually(() =>
        nic.statistics.snapshot().toGuest.dropped === before + 1
      );
      await card.close();
    }
  },
);

for (const queue of [0, 1]) {
  attackEcho(
    `a ${
      queue === 0 ? "receive" : "transmit"
    } buffer that is not mapped breaks that ring alone`,
    async (world) => {
      await world.repeat(rounds, async () => {
        const card = await NetClient.open({ path: world.path, bufferCount: 0 });
        const driver = card.device.queues[queue] as SplitDriver;
        driver.descriptor(0, {
          address: unmapped,
          length: 2048,
          flags: queue === 0 ? WRITE : 0,
          next: 0,
        });
        driver.publish(0);
        driver.kick();
        if (queue === 0) await card.send(frameOf(60));
        await world.reported(/queue \d of .*: address 0xdead\d+ is not mapped/);
        await card.close();
      });
    },
  );
}

test("row 48: a ring that is always full of the smallest frames costs a bounded turn", () => {
  let refill = () => {};
  let chains = 0;
  let inTurn = 0;
  let most = 0;
  return withBystander(async (world) => {
    const flood = await NetFlood.open(world.path);
    refill = () => flood.refill();
    flood.kick();
    await eventually(() => chains > 10_000, "the flood runs");
    for (let i = 0; i < 20; i++) await world.other.serve();
    assert.ok(most <= 320, `${most} frames in one turn`);
    refill = () => {};
    assert.deepEqual(world.errors, []);
    flood.device.connection.close();
    await flood.device.close();
  }, () =>
    netDevice({
      end: {
        name: "count",
        offloads: 0,
        open: () => ({
          receive(frames) {
            chains += frames.count;
            if (inTurn === 0) {
              queueMicrotask(() => {
                most = Math.max(most, inTurn);
                inTurn = 0;
              });
            }
            inTurn += frames.count;
            refill();
          },
          close() {},
        }),
        close() {},
      },
    }));
});

attackEcho(
  "row 48: indirect tables of nothing, and frames of a thousand pieces",
  async (world, nic) => {
    const card = await NetClient.open({ path: world.path });
    const { ram } = card.device;
    const driver = card.transmitQueue() as SplitDriver;
    // A thousand descriptors of one byte are a frame all the same.
    const frame = frameOf(988);
    const bytes = new Uint8Array(1000);
    bytes.set(frame, 12);
    const address = ram.allocate(1000);
    ram.write(address, bytes);
    await within(
      driver.submitChain(
        Array.from(
          { length: 1000 },
          (_, i) => ({
            address: address + BigInt(i),
            length: 1,
            isWritable: false,
          }),
        ),
        { indirect: true },
      ),
      "a thousand pieces",
    );
    assert.deepEqual((await card.receive()).bytes, swapped(frame));
    assert.equal(nic.statistics.snapshot().fromGuest.errors, 0);
    // And a table of no length breaks the ring.
    const [head] = driver.takeDescriptors(1);
    driver.descriptor(head, { address, length: 0, flags: INDIRECT, next: 0 });
    driver.publish(head);
    driver.kick();
    await world.reported(/queue 1 of .*: an indirect table has 0 bytes/);
    await card.close();
  },
);

attackEcho(
  "queues beyond the pairs that the device has are refused",
  async (world) => {
    const device = await VhostUserDevice.open({
      path: world.path,
      features: supportedFeatures,
      queueCount: 3,
    });
    await world.reported(/Cannot start queue 2: the device has 1 queue pairs/);
    await device.close();
  },
);
