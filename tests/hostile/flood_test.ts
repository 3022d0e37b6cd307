// More work than anybody can do (row 48: endless tiny requests, kicks and
// messages): each wake-up costs a bounded amount, and others get their turn.
import assert from "node:assert/strict";
import { encodeHeader } from "../../protocol/message.ts";
import { DescriptorFlag, FrontendRequest as Id } from "../../frontend/mod.ts";
import { requestOps, virtqueueFeatures } from "../../mod.ts";
import { activate, deactivate } from "../../virtqueue/poller.ts";
import { test } from "../harness.ts";
import { eventually } from "../support/wait.ts";
import { anonymousBytes } from "./accounting.ts";
import { Kicker } from "./kicking.ts";
import { join } from "./messages.ts";
import { withBystander, type World } from "./world.ts";

const queueSize = 128;
/** I/O of the bystander during a flood. */
const served = 50;
/** What garbage, and the test itself, may take meanwhile. */
const slack = 64 << 20;

async function serveOthers(world: World): Promise<void> {
  for (let i = 0; i < served; i++) await world.other.serve();
}

test("row 48: a ring that is always full costs a queue's worth per turn, and others have theirs", () => {
  let refill = () => {};
  let handled = 0;
  let inTurn = 0;
  let most = 0;
  // Another of the isolate's queues, as it were: it has a turn after each.
  const neighbour = {
    pollMicroseconds: Infinity,
    turn() {
      most = Math.max(most, inTurn);
      inTurn = 0;
      return false;
    },
    rest: () => true,
  };
  return withBystander(async (world) => {
    const device = await world.open({ queueSize });
    const [driver] = device.queues;
    activate(neighbour);
    const buffer = device.ram.allocate(16);
    for (let head = 0; head < queueSize; head++) {
      driver.descriptor(head, {
        address: buffer,
        length: 1,
        flags: DescriptorFlag.WRITE,
        next: 0,
      });
      driver.publish(head);
    }
    // What was used is available again before the batch that follows is done.
    let seen = driver.usedIndex;
    refill = () => {
      for (; seen !== driver.usedIndex; seen = (seen + 1) & 0xffff) {
        driver.publish(driver.ring.usedElement(seen).id);
      }
    };
    driver.kick();
    await eventually(() => handled > 10 * queueSize, "the flood runs");
    const before = handled;
    await serveOthers(world);
    assert.ok(handled > before + served * queueSize / 4, "it still runs");
    deactivate(neighbour);
    assert.ok(most > 0 && most <= queueSize, `${most} requests in one turn`);
    refill = () => {};
    assert.deepEqual(world.errors, []);
    device.connection.close();
    await device.close();
  }, {
    queueCount: 2,
    features: virtqueueFeatures,
    device: () =>
      requestOps(() => {
        handled++;
        inTurn++;
        refill();
        return 1;
      }),
  });
});

test("row 23, 48: kicks of 256 queues without end, and nothing to do", async () => {
  const queueCount = 256;
  const kicker = await Kicker.start(queueCount);
  try {
    await withBystander(async (world) => {
      const device = await world.open({
        queueCount,
        queueSize: 2,
        usesCalls: false,
      });
      kicker.kick(device.queues.map(({ kickFd }) => kickFd));
      try {
        await eventually(() => kicker.rounds > 10, "the flood runs");
        const before = kicker.rounds;
        await serveOthers(world);
        assert.ok(kicker.rounds > before, "it still runs");
      } finally {
        await kicker.pause();
      }
      assert.deepEqual(world.errors, []);
      await device.close();
    }, {
      queueCount,
      features: virtqueueFeatures,
      device: () => requestOps(() => 0),
    });
  } finally {
    await kicker.end();
  }
});

test("row 23: calls that nobody takes do not block", () =>
  withBystander(async (world) => {
    const device = await world.open();
    const [queue] = world.target.devices[0].queues;
    for (let i = 0; i < 100_000; i++) queue.call();
    await serveOthers(world);
    await device.close();
  }));

test("row 48: messages without end are answered, and others are served", () =>
  withBystander(async (world) => {
    const connection = await world.connect();
    let sent = 0;
    let isOver = false;
    const flood = async () => {
      while (!isOver) {
        await Promise.all(
          Array.from({ length: 200 }, () => connection.getFeatures()),
        );
        sent += 200;
      }
    };
    const flooding = flood();
    const before = anonymousBytes();
    await serveOthers(world);
    isOver = true;
    await flooding;
    assert.ok(sent > 0);
    assert.ok(anonymousBytes() - before < slack);
    await world.leave(connection);
  }));

test("row 48: a front-end that takes no reply stops being read, and costs nothing more", () =>
  withBystander(async (world) => {
    const connection = await world.connect();
    connection.pause();
    const one = encodeHeader({ request: Id.GET_FEATURES, flags: 1, size: 0 });
    const many = join(...Array.from({ length: 1000 }, () => one));
    const before = anonymousBytes();
    let accepted = 0;
    let idle = 0;
    // Full for as long as it takes to serve the other again and again.
    while (idle < 5) {
      const count = connection.sendRaw(many);
      accepted += count;
      // Frames must stay whole for what comes after them.
      assert.equal(count % one.length === 0 || count > 0, true);
      idle = count === 0 ? idle + 1 : 0;
      await world.other.serve();
      if (count % one.length !== 0) {
        await finishFrame(connection, one.subarray(count % one.length));
      }
    }
    assert.ok(accepted < 16 << 20, `${accepted} bytes were taken`);
    assert.ok(anonymousBytes() - before < slack);
    await serveOthers(world);
    await world.leave(connection);
  }));

/** Sends the rest of a message that the socket cut, or gives up when full. */
async function finishFrame(
  connection: { sendRaw(bytes: Uint8Array): number },
  rest: Uint8Array,
): Promise<void> {
  let left = rest;
  for (let i = 0; i < 100 && left.length > 0; i++) {
    left = left.subarray(connection.sendRaw(left));
    if (left.length > 0) await new Promise((resolve) => setImmediate(resolve));
  }
}

test("row 48: tables without end, of which none is good, cost no memory", () =>
  withBystander(async (world) => {
    const connection = await world.connect();
    const before = anonymousBytes();
    for (let round = 0; round < 20; round++) {
      await Promise.all(Array.from(
        { length: 100 },
        () => connection.acknowledged(Id.SET_MEM_TABLE, new Uint8Array(4096)),
      ));
      await world.other.serve();
    }
    world.errors.length = 0;
    assert.ok(anonymousBytes() - before < slack);
    await world.leave(connection);
  }));

test("connections that come and go without end are all let go of", () =>
  withBystander(async (world) => {
    await world.connect().then((connection) => world.leave(connection));
    const before = anonymousBytes();
    await world.repeat(200, async (round) => {
      const connection = await world.connect();
      await world.leave(connection);
      if (round % 20 === 0) await world.other.serve();
    });
    assert.ok(anonymousBytes() - before < slack);
    assert.deepEqual(world.errors, []);
  }));
