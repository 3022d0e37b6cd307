// The contract of the ops: section 1.4 of the RFC's contract, point by point.

import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import {
  FrontendConnection,
  type VhostUserDevice,
  VirtioFeature,
} from "../../frontend/mod.ts";
import {
  type Device,
  featureMask,
  type Queue,
  registerTarget,
  Vhost2Error,
  type VhostUserOptions,
} from "../../mod.ts";
import { test } from "../harness.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { Events, within } from "../support/wait.ts";
import {
  assertGone,
  assertWorks,
  echo,
  opened,
  serving,
  targetOptions,
  withGuest,
} from "./served.ts";

test("contract 1: an op completes at its return or at any later time", async () => {
  await withGuest({}, async (guest, { recording }) => {
    const held = ["deviceInit", "queueStart 0", "queueStop 0"]
      .map((op) => [op, recording.hold(op)] as const);
    const started = guest.start();
    for (const [op, hold] of held.slice(0, 2)) {
      await recording.called(op);
      await new Promise((resolve) => setImmediate(resolve));
      hold.release();
    }
    await within(started, "start");
    // Queue 1 completes at once, queue 0 did later: both work.
    for (const index of [0, 1]) await assertWorks(guest, index);
    const stopped = guest.stopQueue(0);
    await recording.called("queueStop 0");
    held[2][1].release();
    assert.equal(await within(stopped, "stop"), 1);
  });
});

test("contract 2: while an op is outstanding no other is called and messages wait", async () => {
  await withGuest({}, async (guest, { recording }) => {
    await guest.activate();
    const hold = recording.hold("queueStart 0");
    await guest.startQueue(0, { enable: false });
    await guest.connection.setVringEnable(0, true);
    await recording.called("queueStart 0");
    await guest.startQueue(1, { enable: false });
    await guest.connection.setVringEnable(1, true);
    let isAnswered = false;
    const barrier = guest.connection.barrier().then(() => isAnswered = true);
    for (let turn = 0; turn < 20; turn++) {
      await new Promise((resolve) => setImmediate(resolve));
    }
    assert.equal(isAnswered, false);
    assert.equal(recording.count("queueStart 1"), 0);
    hold.release();
    await within(barrier, "barrier");
    assert.equal(recording.count("queueStart 1"), 1);
    recording.assertOneAtATime();
  });
});

test("contract 3: a queue whose start failed is not stopped, and starts again when set up again", async () => {
  await withGuest(
    { errorsExpected: true },
    async (guest, { recording, errors }) => {
      recording.fail("queueStart 0");
      const errorFd = core.eventfdCreate();
      try {
        await guest.activate();
        await guest.connection.setVringErr(0, errorFd);
        await guest.startQueue(0);
        await guest.startQueue(1);
        await assertWorks(guest, 1);
        assert.equal((await errors.next()).code, "OP");
        assert.equal(core.eventfdTake(errorFd), 1);
        assert.equal(await guest.stopQueue(0), 0);
        assert.equal(recording.count("queueStop 0"), 0);
        await guest.startQueue(0);
        await assertWorks(guest, 0);
      } finally {
        core.descriptorClose(errorFd);
      }
      assert.equal(recording.count("queueStart 0"), 2);
    },
  );
});

test("contract 4: a failed deviceCreate ends the connection, and no other op is called", async () => {
  await serving(
    { errorsExpected: true },
    async ({ path, target, recording, errors }) => {
      recording.fail("deviceCreate");
      const connection = await FrontendConnection.connect(path);
      await assert.rejects(connection.getFeatures(), { code: "CLOSED" });
      await connection.closed;
      assert.equal((await errors.next()).code, "OP");
      assert.deepEqual(recording.begun, ["deviceCreate"]);
      assert.equal(target.devices.length, 0);
      // The next front-end is served.
      await opened(
        { path },
        {},
        (guest) => guest.start().then(() => assertWorks(guest)),
      );
    },
  );
});

test("contract 4: a device factory that throws ends the connection", async () => {
  const device = () => {
    throw new Error("no such disk");
  };
  await serving({ device, errorsExpected: true }, async ({ path, errors }) => {
    const connection = await FrontendConnection.connect(path);
    await connection.closed;
    assert.match((await errors.next()).message, /deviceCreate.*no such disk/);
  });
});

test("contract 5: deviceFeaturesChanged at least once before deviceInit", async () => {
  let seen: bigint | undefined;
  const device = (): ReturnType<typeof echo> => ({
    ...echo(),
    deviceFeaturesChanged: (_, features) => {
      seen = features;
    },
  });
  await withGuest({ device }, async (guest, { recording }) => {
    await guest.start();
    await assertWorks(guest);
    assert.deepEqual(recording.begun.slice(0, 4), [
      "deviceCreate",
      "deviceFeaturesChanged",
      "deviceInit",
      "queueStart 0",
    ]);
    assert.equal(seen, guest.features);
    assert.equal(recording.devices[0].features, guest.features);
  });
});

test("contract 6: deviceInit again after memory was removed, with all queues stopped", async () => {
  const running = new Set<Queue>();
  const atInit: number[] = [];
  const inner = echo();
  const device = (): ReturnType<typeof echo> => ({
    deviceInit: (device) => {
      atInit.push(running.size, device.memory.length);
    },
    queueStart: async (queue) => {
      await inner.queueStart!(queue);
      running.add(queue);
    },
    queueStop: async (queue) => {
      await inner.queueStop!(queue);
      running.delete(queue);
    },
    queueKick: inner.queueKick,
  });
  await withGuest({ device }, async (guest, { recording }) => {
    await guest.start();
    const extra = guest.ram.addRegion({ size: 1 << 16 });
    await guest.addRegion(extra);
    await guest.connection.barrier();
    assert.deepEqual(atInit, [0, 1]);
    await guest.removeRegion(extra);
    await guest.connection.barrier();
    assert.deepEqual(atInit, [0, 1, 0, 1]);
    for (let index = 0; index < 4; index++) {
      assert.equal(recording.count(`queueStart ${index}`), 2);
      await assertWorks(guest, index);
    }
  });
});

test("contract 7: a queue does not change between queueStart and queueStop", async () => {
  const fields = (queue: Queue) => ({
    index: queue.index,
    size: queue.size,
    features: queue.features,
    areas: [queue.descriptorTable, queue.availableRing, queue.usedRing].map((
      area,
    ) => [area.buffer, area.byteOffset, area.byteLength]),
    isPolled: queue.isPolled,
    addresses: queue.addresses,
  });
  const started = new Map<Queue, ReturnType<typeof fields>>();
  let stops = 0;
  const inner = echo();
  const device = () => ({
    queueStart: (queue: Queue) => {
      started.set(queue, fields(queue));
      return inner.queueStart!(queue);
    },
    queueStop: async (queue: Queue) => {
      assert.deepEqual(fields(queue), started.get(queue));
      await inner.queueStop!(queue);
      assert.deepEqual(fields(queue), started.get(queue));
      assert.equal(queue.descriptorTable.length, 16 * queue.size);
      stops++;
    },
    queueKick: inner.queueKick,
  });
  // A base that no driver is at breaks the ring: that is not the point here.
  const errorsExpected = true;
  await withGuest({ device, errorsExpected }, async (guest, { recording }) => {
    await guest.start();
    const { connection } = guest;
    // Each would change something that the queue shows.
    await connection.setVringNum(0, 8);
    await connection.setVringBase(1, 3);
    await connection.setVringKick(2, null);
    await connection.setVringAddr({ ...guest.vringAddress(2), index: 3 });
    await connection.setFeatures(
      featureMask(VirtioFeature.VERSION_1, VirtioFeature.PROTOCOL_FEATURES),
    );
    await connection.barrier();
    assert.equal(recording.queues.get(0)?.size, 8);
    for (let index = 0; index < 4; index++) {
      assert.equal(recording.count(`queueStart ${index}`), 3);
    }
    assert.equal(stops, 8);
  });
});

test("contract 8: memory is remapped only after queueStop has completed", async () => {
  await withGuest({}, async (guest, { recording }) => {
    await guest.start();
    const extra = guest.ram.addRegion({ size: 1 << 16 });
    await guest.addRegion(extra);
    await guest.connection.barrier();
    const device = recording.devices[0];
    const view = device.translate(extra.gpa, 8)!;
    const hold = recording.hold("queueStop 0");
    const removed = guest.removeRegion(extra);
    await recording.called("queueStop 0");
    await new Promise((resolve) => setImmediate(resolve));
    assert.equal(device.memory.length, 2);
    assert.equal(view.length, 8);
    hold.release();
    await within(removed, "REM_MEM_REG");
    assert.equal(device.memory.length, 1);
    assert.equal(device.translate(extra.gpa, 8), null);
  });
});

test("contract 9: deviceDestroy only after the stop of every started queue", async () => {
  await serving({}, async (served) => {
    const { recording } = served;
    await opened(served, {}, async (guest) => {
      await guest.activate();
      for (const index of [0, 2, 3]) await guest.startQueue(index);
      await guest.connection.barrier();
      const hold = recording.hold("queueStop 2");
      guest.connection.close();
      await recording.called("queueStop 2");
      assert.equal(recording.count("deviceDestroy"), 0);
      hold.release();
      await recording.completed("deviceDestroy");
    });
    assert.deepEqual(recording.ended.slice(-4), [
      "queueStop 0",
      "queueStop 2",
      "queueStop 3",
      "deviceDestroy",
    ]);
  });
});

test("contract 10: unregister stops and destroys every device, then resolves; again answers the same", async () => {
  await serving({}, async (served) => {
    const { target, recording } = served;
    await opened(served, {}, async (first) => {
      await opened(served, {}, async (second) => {
        await first.start();
        await second.start();
        const hold = recording.hold("deviceDestroy");
        const unregistered = target.unregister();
        assert.equal(target.unregister(), unregistered);
        await recording.called("deviceDestroy", 2);
        let isDone = false;
        unregistered.then(() => isDone = true);
        await new Promise((resolve) => setImmediate(resolve));
        assert.equal(isDone, false);
        hold.release();
        await within(unregistered, "unregister");
        await first.connection.closed;
        await second.connection.closed;
      });
    });
    assert.equal(target.devices.length, 0);
    assert.equal(recording.count("deviceDestroy"), 2);
    assert.equal(recording.count("queueStop 0"), 2);
    await assert.rejects(FrontendConnection.connect(served.path), { errno: 2 });
  });
});

test("contract 10: `await using` unregisters; the address can be registered again", async () => {
  await serving({}, async ({ recording, errors }) => {
    using folder = new TemporaryFolder();
    const path = folder.file("again");
    for (let round = 0; round < 2; round++) {
      await using target = await registerTarget(
        targetOptions(path, recording, errors),
      );
      await opened(
        { path },
        {},
        (guest) => guest.start().then(() => assertWorks(guest)),
      );
      assert.equal(target.name, `vhost-user:${path}`);
    }
  });
});

/** The device of a guest whose memory has two regions that touch, and a gap. */
async function translating(
  body: (device: Device) => Promise<void> | void,
): Promise<void> {
  const regions = [
    { size: 0x10000, gpa: 0x10000n },
    { size: 0x8000, gpa: 0x20000n },
    { size: 0x1000, gpa: 0xffff_ffff_ffff_e000n, uva: 0x1000_0000n },
  ];
  await withGuest({ guest: { regions } }, async (guest, { recording }) => {
    await guest.start();
    await assertWorks(guest);
    await body(recording.devices[0]);
  });
}

test("contract 11: translate clips at the end of the region", async () => {
  await translating((device) => {
    assert.equal(device.translate(0x10000n, 0x10000)?.length, 0x10000);
    assert.equal(device.translate(0x1fff0n, 0x20)?.length, 0x10);
    assert.equal(device.translate(0x27fffn, 0xffff_ffff)?.length, 1);
    assert.equal(device.translate(0x20000n, Infinity)?.length, 0x8000);
  });
});

test("contract 11: translate answers null for what is not mapped", async () => {
  await translating((device) => {
    for (const address of [0n, 0xffffn, 0x28000n, 1n << 63n]) {
      assert.equal(device.translate(address, 1), null);
    }
    for (const length of [0, -1, NaN]) {
      assert.equal(device.translate(0x10000n, length), null);
    }
  });
});

test("contract 11: the top of the address space does not wrap round", async () => {
  await translating((device) => {
    const top = 0xffff_ffff_ffff_e000n;
    assert.equal(device.translate(top + 0xff0n, 0x1000)?.length, 0x10);
    assert.equal(device.translate(top + 0x1000n, 1), null);
    assert.equal(device.translate((1n << 64n) - 1n, 0x20000), null);
    // What is added to an address may pass 2^64: it is nobody's memory.
    assert.equal(device.translate((1n << 64n) + 0x10000n, 1), null);
    assert.equal(device.translate(0x10000n - (1n << 64n), 1), null);
  });
});

test("contract 11: a view is the guest's memory, not a copy, and empty when its region has gone", async () => {
  await withGuest({}, async (guest, { recording }) => {
    await guest.start();
    const extra = guest.ram.addRegion({ size: 1 << 16 });
    await guest.addRegion(extra);
    await guest.connection.barrier();
    const device = recording.devices[0];
    const view = device.translate(extra.gpa, 4)!;
    extra.bytes[1] = 77;
    assert.equal(view[1], 77);
    view[2] = 78;
    assert.equal(extra.bytes[2], 78);
    await guest.removeRegion(extra);
    assertGone(view);
  });
});

/** Provokes every op once, in order. */
async function live(guest: VhostUserDevice): Promise<void> {
  await guest.start();
  guest.connection.send(1000);
  await guest.stopQueue(0);
  guest.connection.close();
}

for (
  const op of [
    "deviceCreate",
    "deviceFeaturesChanged",
    "deviceInit",
    "queueStart 0",
    "customMessage",
    "queueStop 0",
    "deviceDestroy",
  ]
) {
  test(`contract 12: unregister during ${op}: it completes first, then the rest is taken down`, async () => {
    const device = () => ({ ...echo(), customMessage() {} });
    await serving({ device, errorsExpected: true }, async (served) => {
      const { target, recording } = served;
      const hold = recording.hold(op);
      // With deviceCreate held the front-end gets no further than this.
      const opening = opened(served, {}, live).catch(() => {});
      await recording.called(op);
      const before = recording.begun.length;
      const unregistered = target.unregister();
      await new Promise((resolve) => setImmediate(resolve));
      assert.equal(recording.begun.length, before);
      hold.release();
      await within(unregistered, "unregister");
      await within(opening, "the front-end");
      assert.equal(recording.count("deviceDestroy"), 1);
      for (let index = 0; index < 4; index++) {
        assert.equal(
          recording.count(`queueStart ${index}`),
          recording.count(`queueStop ${index}`),
        );
      }
    });
  });
}

test("contract 13: registering the same address twice is refused", async () => {
  await serving({}, async ({ path, recording, errors }) => {
    await assert.rejects(
      registerTarget(targetOptions(path, recording, errors)),
      (error) => error instanceof Vhost2Error && error.code === "IN_USE",
    );
    // The first one is unharmed.
    await opened(
      { path },
      {},
      (guest) => guest.start().then(() => assertWorks(guest)),
    );
  });
});

test("contract 14: an unknown transport is refused by name", async () => {
  for (const transport of ["AF_UNIX", "toString", undefined]) {
    const options = { transport, address: "/nowhere", device: () => ({}) };
    await assert.rejects(
      registerTarget(
        options as unknown as VhostUserOptions & { device: () => object },
      ),
      (error) =>
        error instanceof Vhost2Error && error.code === "OPTION" &&
        error.message.includes(String(transport)),
    );
  }
});

test("contract 14: options out of range are refused", async () => {
  for (
    const options of [
      { queueCount: 0 },
      { queueCount: 257 },
      { queueCount: 1.5 },
      { features: -1n },
      { features: 1n << 64n },
    ]
  ) {
    await assert.rejects(
      registerTarget({
        transport: "vhost-user",
        address: "/nowhere/socket",
        device: () => ({}),
        ...options,
      }),
      (error) => error instanceof Vhost2Error && error.code === "OPTION",
    );
  }
});

test("contract 15: configChanged sends CONFIG_CHANGE_MSG, and the front-end then reads", async () => {
  let value = 1;
  const device = () => ({ ...echo(), getConfig: () => Uint8Array.of(value) });
  await withGuest({ device }, async (guest, { recording }) => {
    const changes = new Events<void>();
    guest.onConfigChange = () => changes.push();
    await guest.start();
    assert.deepEqual(await guest.getConfig(0, 1), Uint8Array.of(1));
    value = 2;
    recording.devices[0].configChanged();
    await changes.next();
    assert.deepEqual(await guest.getConfig(0, 1), Uint8Array.of(2));
  });
});

test("contract 15: configChanged is free inside ops, and does nothing without a back-end channel", async () => {
  const device = (device: Device) => ({
    ...echo(),
    getConfig: () => new Uint8Array(1),
    deviceCreate: () => device.configChanged(),
    deviceInit: () => device.configChanged(),
  });
  await withGuest(
    { device, guest: { protocolFeatures: 0n, queueCount: 1 } },
    async (guest) => {
      await guest.start();
      await assertWorks(guest);
    },
  );
});
