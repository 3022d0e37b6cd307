// What restarts a queue and what does not (DESIGN section 8, "Sequencing").

import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import {
  ProtocolFeature,
  supportedProtocolFeatures,
  type VhostUserDevice,
  VirtioFeature,
} from "../../frontend/mod.ts";
import {
  type Device,
  featureMask,
  type Queue,
  requestOps,
  type Target,
  type TargetOps,
  Vhost2Error,
  virtqueueFeatures,
} from "../../mod.ts";
import { VRING_FLAG_LOG } from "../../protocol/payloads.ts";
import { gpa } from "../../protocol/address.ts";
import { test } from "../harness.ts";
import { eventually, within } from "../support/wait.ts";
import { deferred } from "./deferred.ts";
import type { Recording } from "./recording.ts";
import {
  assertGone,
  assertWorks,
  echo,
  opened,
  serving,
  withGuest,
} from "./served.ts";

/** Negotiates without memory slots: SET_MEM_TABLE, as without virtio-mem. */
const tableGuest = {
  protocolFeatures: supportedProtocolFeatures &
    ~featureMask(ProtocolFeature.CONFIGURE_MEM_SLOTS),
};

/** How often each of the 4 queues was started and stopped so far. */
function runs(recording: Recording): number[][] {
  return [0, 1, 2, 3].map((index) => [
    recording.count(`queueStart ${index}`),
    recording.count(`queueStop ${index}`),
  ]);
}

const untouched = [[1, 0], [1, 0], [1, 0], [1, 0]];

/** Starts all, runs `act`, and requires what it did to the queues. */
function restarts(
  expected: number[][],
  act: (guest: VhostUserDevice) => Promise<void>,
  options: Parameters<typeof withGuest>[0] = {},
): Promise<void> {
  return withGuest(options, async (guest, { recording }) => {
    await guest.start();
    for (let index = 0; index < 4; index++) await assertWorks(guest, index);
    assert.deepEqual(runs(recording), untouched);
    await act(guest);
    await guest.connection.barrier();
    assert.deepEqual(runs(recording), expected);
    for (let index = 0; index < 4; index++) await assertWorks(guest, index);
  });
}

test("rule 2: GET_VRING_BASE: a second one answers the same, and of a ring that never started its base", async () => {
  await withGuest({}, async (guest) => {
    await guest.activate();
    await guest.startQueue(0);
    for (let i = 0; i < 3; i++) await assertWorks(guest);
    const { connection } = guest;
    assert.equal(await connection.getVringBase(0), 3);
    assert.equal(await connection.getVringBase(0), 3);
    assert.equal(await connection.getVringBase(1), 0);
    await connection.setVringBase(1, 4711);
    assert.equal(await connection.getVringBase(1), 4711);
    assert.equal(await connection.getVringBase(1), 4711);
  });
});

test("rule 2: GET_VRING_BASE waits for the requests in flight", async () => {
  const end = deferred<void>();
  const arrived = deferred<void>();
  const device = () =>
    requestOps(async (request) => {
      arrived.resolve();
      await end.promise;
      return request.writableBytes;
    });
  await withGuest({ device }, async (guest, { recording }) => {
    await guest.activate();
    await guest.startQueue(0);
    const answer = guest.queues[0].submit({ writable: [8] });
    await within(arrived.promise, "the request");
    const base = guest.connection.getVringBase(0);
    await recording.called("queueStop 0");
    assert.equal(guest.queues[0].inFlight, 1);
    end.resolve();
    assert.equal(await within(base, "GET_VRING_BASE"), 1);
    assert.equal((await within(answer, "the request")).written, 8);
  });
});

test("SET_MEM_TABLE that only adds: nothing stops, mappings and views stay", async () => {
  await withGuest({ guest: tableGuest }, async (guest, { recording }) => {
    await guest.start();
    const device = recording.devices[0];
    const before = device.memory;
    const view = device.translate(before[0].gpa, 64)!;
    const extra = guest.ram.addRegion({ size: 1 << 20, gpa: 1n << 32n });
    await guest.sendMemory();
    assert.deepEqual(runs(recording), untouched);
    assert.equal(recording.count("deviceInit"), 1);
    assert.equal(view.length, 64);
    assert.equal(device.memory[0].buffers[0], before[0].buffers[0]);
    assert.equal(before.length, 1);
    assert.deepEqual(device.memory.map((region) => region.gpa), [
      0n,
      extra.gpa,
    ]);
    assert.ok(Object.isFrozen(before) && Object.isFrozen(device.memory));
    await assertWorks(guest);
  });
});

test("SET_MEM_TABLE again with the same table: nothing stops", async () => {
  await restarts(untouched, (guest) => guest.sendMemory(), {
    guest: tableGuest,
  });
});

test("SET_MEM_TABLE alone that takes a region away: the queues go on, without ADDR or KICK", async () => {
  const regions = [{ size: 1 << 20 }, { size: 1 << 20, gpa: 1n << 32n }];
  await restarts([[2, 1], [2, 1], [2, 1], [2, 1]], async (guest) => {
    guest.ram.removeRegion(guest.ram.regions[1]);
    await guest.sendMemory();
  }, { guest: { ...tableGuest, regions } });
});

test("SET_MEM_TABLE that moves the guest's memory: the same uvas are found in the new mapping", async () => {
  await withGuest({ guest: tableGuest }, async (guest, { recording }) => {
    await guest.start();
    await assertWorks(guest);
    const old = recording.queues.get(0)!;
    const view = recording.devices[0].translate(0n, 8)!;
    const region = guest.ram.regions[0];
    // Another gpa, the same uva and file: the ring is where it was.
    await guest.connection.setMemTable([{
      fd: region.fd,
      description: { ...region.description, gpa: gpa(1n << 40n) },
    }], { ack: true });
    await recording.completed("queueStart 3", 2);
    assertGone(view);
    assertGone(old.descriptorTable);
    assert.equal(old.isStarted, false);
    const queue = recording.queues.get(0)!;
    assert.notEqual(queue, old);
    assert.equal(queue.descriptorTable.length, 16 * 16);
    assert.equal(queue.availableIndex, 1);
    assert.equal(recording.count("deviceInit"), 2);
  });
});

test("a ring that no longer maps stays stopped, its err descriptor says so once, and a table that maps it starts it", async () => {
  const options = { guest: tableGuest, errorsExpected: true };
  await withGuest(options, async (guest, { recording, errors }) => {
    await guest.activate();
    const errorFd = core.eventfdCreate();
    try {
      await guest.connection.setVringErr(0, errorFd);
      await guest.startQueue(0);
      await assertWorks(guest);
      const region = guest.ram.regions[0];
      const other = { ...region.description, uva: region.uva };
      // A table without the ring's region: a piece of its end only.
      const half = BigInt(region.size / 2);
      await guest.connection.setMemTable([{
        fd: region.fd,
        description: {
          ...other,
          gpa: gpa(region.gpa + half),
          uva: (region.uva + half) as typeof region.uva,
          size: half,
          mmapOffset: half,
        },
      }], { ack: true });
      for (let i = 0; i < 3; i++) await guest.connection.barrier();
      assert.deepEqual(runs(recording)[0], [1, 1]);
      assert.equal(core.eventfdTake(errorFd), 1);
      assert.match((await errors.next()).message, /queue 0/);
      assert.equal(errors.pending.length, 0);
      await guest.sendMemory();
      await recording.completed("queueStart 0", 2);
      await assertWorks(guest);
    } finally {
      core.descriptorClose(errorFd);
    }
  });
});

test("ADD_MEM_REG stops nothing, keeps views, and replaces the frozen device.memory", async () => {
  await restarts(untouched, async (guest) => {
    await guest.addRegion(guest.ram.addRegion({ size: 1 << 16 }));
  });
  await withGuest({}, async (guest, { recording }) => {
    await guest.start();
    const device = recording.devices[0];
    const before = device.memory;
    const view = before[0].view;
    const extra = guest.ram.addRegion({ size: 1 << 16 });
    await guest.addRegion(extra);
    assert.notEqual(device.memory, before);
    assert.equal(device.memory[0].buffers[0], before[0].buffers[0]);
    assert.equal(view.length, 1 << 20);
    assert.equal(device.memory[1].size, 1 << 16);
    assert.equal(device.memory[1].uva, extra.uva);
    assert.ok(Object.isFrozen(device.memory));
    assert.equal(recording.count("deviceInit"), 1);
  });
});

test("buffers in an added region work at once", async () => {
  await withGuest({}, async (guest) => {
    await guest.start();
    const extra = guest.ram.addRegion({ size: 1 << 16, gpa: 1n << 40n });
    await guest.addRegion(extra);
    const address = guest.ram.allocate(16, 16, extra);
    guest.ram.write(address, Uint8Array.of(1, 2, 3));
    const written = await within(
      guest.queues[0].submitChain([
        { address, length: 3, isWritable: false },
        { address: address + 8n, length: 3, isWritable: true },
      ]),
      "a request in the new region",
    );
    assert.equal(written, 3);
    assert.deepEqual(guest.ram.read(address + 8n, 3), Uint8Array.of(1, 2, 3));
  });
});

test("SET_VRING_CALL and SET_VRING_ERR act on the running queue", async () => {
  await restarts(untouched, async ({ connection, queues }) => {
    await connection.setVringCall(0, queues[0].callFd);
    await connection.setVringCall(1, null);
    await connection.setVringCall(1, queues[1].callFd);
    await connection.setVringErr(2, queues[2].callFd);
    await connection.setVringErr(2, null);
  });
});

test("an unchanged SET_VRING_ENABLE acts on the running queue", async () => {
  await restarts(
    untouched,
    ({ connection }) => connection.setVringEnable(0, true),
  );
});

test("SET_VRING_ENABLE 0 stops that queue alone, 1 starts it where it stopped", async () => {
  await restarts([[1, 0], [2, 1], [1, 0], [1, 0]], async ({ connection }) => {
    await connection.setVringEnable(1, false);
    await connection.setVringEnable(1, false);
    await connection.setVringEnable(1, true);
  });
});

test("SET_VRING_ADDR that changes nothing, or only the log flag, acts on the running queue", async () => {
  await withGuest({}, async (guest, { recording }) => {
    await guest.start();
    const { connection } = guest;
    const address = guest.vringAddress(0);
    const queue = recording.queues.get(0)!;
    assert.equal(queue.logAddress, null);
    await connection.setVringAddr(address);
    await connection.setVringAddr({ ...address, flags: VRING_FLAG_LOG });
    await connection.barrier();
    // The plain ring's owner marks its writes from here on.
    assert.equal(queue.logAddress, address.log);
    await connection.setVringAddr(address);
    await connection.barrier();
    assert.equal(queue.logAddress, null);
    assert.deepEqual(runs(recording), untouched);
    await assertWorks(guest);
  });
});

const logAll = featureMask(VirtioFeature.LOG_ALL);

test("rule 7: SET_FEATURES that repeats, or toggles only LOG_ALL, acts on the running queues", async () => {
  const features = virtqueueFeatures | logAll;
  await withGuest({ features }, async (guest, { recording }) => {
    await guest.start();
    const { connection } = guest;
    const device = recording.devices[0];
    await connection.setFeatures(guest.features);
    await connection.barrier();
    assert.equal(recording.count("deviceFeaturesChanged"), 1);
    await connection.setFeatures(guest.features | logAll);
    await recording.completed("deviceFeaturesChanged", 2);
    assert.equal(device.features, guest.features | logAll);
    assert.equal(device.queues[0].features, guest.features);
    await connection.setFeatures(guest.features);
    await recording.completed("deviceFeaturesChanged", 3);
    assert.equal(device.features, guest.features);
    assert.deepEqual(runs(recording), untouched);
    await assertWorks(guest);
  });
});

test("Queue.features excludes LOG_ALL, device.features has it", async () => {
  const protocolFeatures = featureMask(ProtocolFeature.LOG_SHMFD);
  await withGuest({ protocolFeatures }, async (guest, { recording }) => {
    await guest.startLog();
    await guest.start();
    assert.equal(recording.devices[0].features & logAll, logAll);
    assert.equal(recording.queues.get(0)!.features & logAll, 0n);
  });
});

test("SET_FEATURES with other bits restarts what runs, once", async () => {
  const reduced = featureMask(
    VirtioFeature.VERSION_1,
    VirtioFeature.PROTOCOL_FEATURES,
  );
  await withGuest({}, async (guest, { recording }) => {
    await guest.start();
    await guest.connection.setFeatures(reduced);
    await recording.completed("queueStart 3", 2);
    assert.deepEqual(runs(recording), [[2, 1], [2, 1], [2, 1], [2, 1]]);
    assert.equal(recording.queues.get(0)!.features, reduced);
    assert.equal(recording.count("deviceInit"), 1);
  });
});

for (
  const [name, act] of [
    [
      "KICK",
      (guest) => guest.connection.setVringKick(2, guest.queues[2].kickFd),
    ],
    ["NUM", async (guest) => {
      await guest.connection.setVringNum(2, 16);
    }],
    ["BASE", (guest) => guest.connection.setVringBase(2, 1)],
    ["a changed ADDR", async (guest) => {
      const { descriptor, ...rest } = guest.vringAddress(2);
      // Another table; then the driver's own again.
      const moved = guest.vringAddress(3).descriptor;
      await guest.connection.setVringAddr({ ...rest, descriptor: moved });
      await guest.connection.setVringAddr({ ...rest, descriptor });
    }],
  ] satisfies [string, (guest: VhostUserDevice) => Promise<void>][]
) {
  const times = name === "a changed ADDR" ? 3 : 2;
  test(`${name} restarts that queue alone`, async () => {
    await restarts([[1, 0], [1, 0], [times, times - 1], [1, 0]], act);
  });
}

test("RESET_DEVICE stops all; memory and features stay, rings must be set up again", async () => {
  await withGuest({}, async (guest, { recording }) => {
    await guest.start();
    await assertWorks(guest);
    const device = recording.devices[0];
    await guest.connection.resetDevice({ ack: true });
    assert.deepEqual(runs(recording), [[1, 1], [1, 1], [1, 1], [1, 1]]);
    assert.equal(device.memory.length, 1);
    assert.equal(device.features, guest.features);
    assert.equal(await guest.connection.getVringBase(0), 0);
    guest.queues[0].reset();
    await guest.startQueue(0, { base: 0 });
    await assertWorks(guest);
  });
});

test("SET_STATUS 0 stops all and is kept apart from the other bits", async () => {
  await withGuest({}, async (guest, { recording }) => {
    await guest.start();
    assert.equal(await guest.connection.getStatus(), 15);
    await guest.connection.setStatus(0);
    assert.equal(await guest.connection.getStatus(), 0);
    assert.deepEqual(runs(recording), [[1, 1], [1, 1], [1, 1], [1, 1]]);
  });
});

test("RESET_OWNER changes nothing", async () => {
  await restarts(untouched, ({ connection }) => connection.resetOwner());
});

test("a failed stop is called again until it succeeds", async () => {
  await withGuest(
    { errorsExpected: true },
    async (guest, { recording, errors }) => {
      await guest.start();
      await assertWorks(guest, 1);
      recording.fail("queueStop 1", 3);
      assert.equal(await within(guest.stopQueue(1), "stop"), 1);
      assert.equal(recording.count("queueStop 1"), 4);
      for (let i = 0; i < 3; i++) {
        assert.equal(
          (await errors.next()).code,
          "OP",
        );
      }
      await assertWorks(guest, 0);
    },
  );
});

test("after ten failed stops the memory is revoked and the device destroyed", async () => {
  const inner = echo();
  let attempts = 0;
  let view = new Uint8Array(0);
  let atDestroy: number | undefined;
  const device = () => ({
    ...inner,
    queueStop: async (queue: Queue) => {
      await inner.queueStop!(queue);
      if (queue.index !== 1) return;
      attempts++;
      throw new Error("still busy");
    },
    deviceDestroy: () => {
      atDestroy = view[5000];
    },
  });
  const options = { device, errorsExpected: true };
  await withGuest(options, async (guest, { recording, errors, target }) => {
    await guest.start();
    await guest.connection.barrier();
    const bytes = guest.ram.regions[0].bytes;
    view = recording.devices[0].memory[0].view;
    bytes[5000] = 99;
    assert.equal(view[5000], 99);
    await assert.rejects(guest.stopQueue(1), { code: "CLOSED" });
    await recording.completed("deviceDestroy");
    await eventually(() => target.devices.length === 0, "the device has gone");
    assert.equal(attempts, 10);
    assert.equal(errors.pending.filter(({ code }) => code === "OP").length, 10);
    // What a device that cannot stop still sees and writes is not the guest's.
    assert.equal(atDestroy, 0);
    assert.equal(bytes[5000], 99);
    assertGone(view);
    for (const index of [0, 2, 3]) {
      assert.equal(recording.count(`queueStop ${index}`), 1);
    }
  });
});

test("a failed deviceDestroy is called again", async () => {
  await withGuest({ errorsExpected: true }, async (guest, { recording }) => {
    recording.fail("deviceDestroy", 2);
    guest.connection.close();
    await recording.called("deviceDestroy", 3);
  });
});

for (
  const op of [
    "deviceCreate",
    "deviceInit",
    "deviceFeaturesChanged",
    "queueStart",
    "queueStop",
    "deviceDestroy",
  ] as const
) {
  test(`unregister inside ${op} rejects at once`, async () => {
    const outcome = deferred<unknown>();
    const inner: TargetOps = echo();
    let target: Target;
    const device = (): TargetOps => ({
      ...inner,
      [op]: async (what: Queue & Device) => {
        await target.unregister().then(outcome.resolve, outcome.resolve);
        if (op === "queueStart" || op === "queueStop") await inner[op]!(what);
      },
    });
    await serving({ device }, async (served) => {
      target = served.target;
      await opened(served, {}, async (guest) => {
        await guest.start();
        await assertWorks(guest);
        await guest.stop();
      });
      const error = await within(outcome.promise, "unregister in an op");
      assert.ok(error instanceof Vhost2Error && error.code === "OP");
    });
  });
}

test("unregister after an op, in what the op has left running, is no deadlock", async () => {
  const later = deferred<void>();
  const done = deferred<void>();
  let target: { unregister(): Promise<void> };
  const device = () => ({
    deviceCreate: () => {
      later.promise.then(() => target.unregister()).then(
        done.resolve,
        done.reject,
      );
    },
  });
  await withGuest({ device }, async (_, served) => {
    target = served.target;
    later.resolve();
    await within(done.promise, "unregister");
  });
});

test("features: only VERSION_1 and PROTOCOL_FEATURES are appended", async () => {
  const appended = featureMask(
    VirtioFeature.VERSION_1,
    VirtioFeature.PROTOCOL_FEATURES,
  );
  for (const features of [0n, 1n << 5n, virtqueueFeatures]) {
    await withGuest({ features }, async ({ connection }) => {
      assert.equal(await connection.getFeatures(), features | appended);
    });
  }
});
