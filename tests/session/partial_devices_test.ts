// Table A: devices that are set up in part, queues that start and stop singly.

import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import {
  FrontendConnection,
  GuestRam,
  ProtocolFeature,
  RefusedError,
  ringAddress,
  SplitDriver,
  VirtioFeature,
} from "../../frontend/mod.ts";
import { featureMask } from "../../mod.ts";
import { test } from "../harness.ts";
import { descriptorCount } from "../support/descriptors.ts";
import { eventually, within } from "../support/wait.ts";
import { assertWorks, opened, serving, withGuest } from "./served.ts";

const version1 = featureMask(VirtioFeature.VERSION_1);

test("A1: one queue of four is set up: it starts and works, the others never start", async () => {
  await withGuest({}, async (guest, { recording }) => {
    await guest.activate();
    await guest.startQueue(2);
    await assertWorks(guest, 2);
    assert.deepEqual(
      recording.begun.filter((op) => op.startsWith("queue")),
      ["queueStart 2"],
    );
  });
});

test("A2: queues 0 and 1 stay absent for ever while the rest starts, stops and starts", async () => {
  await withGuest({}, async (guest, { recording }) => {
    await guest.activate();
    for (let round = 0; round < 3; round++) {
      for (const index of [2, 3]) await guest.startQueue(index);
      for (const index of [2, 3]) await assertWorks(guest, index);
      for (const index of [2, 3]) await guest.stopQueue(index);
    }
    assert.equal(recording.count("queueStart 0"), 0);
    assert.equal(recording.count("queueStart 1"), 0);
    assert.equal(recording.count("queueStart 3"), 3);
  });
});

test("A3: nothing starts before KICK; CALL may be absent, polled or late", async () => {
  await withGuest({}, async (guest, { recording }) => {
    const { connection } = guest;
    const driver = guest.queues[0];
    await guest.activate();
    await connection.setVringNum(0, driver.queueSize);
    await connection.setVringBase(0, 0);
    await connection.setVringAddr(guest.vringAddress(0));
    await connection.setVringCall(0, null);
    await guest.enableQueue(0, true);
    await connection.barrier();
    assert.equal(recording.count("queueStart 0"), 0);

    await connection.setVringKick(0, driver.kickFd);
    await recording.completed("queueStart 0");
    const answer = driver.submit({
      readable: [Uint8Array.of(7)],
      writable: [1],
    });
    await eventually(() => driver.usedIndex === 1, "the request is used");
    assert.equal(core.eventfdTake(driver.callFd), 0);

    // A call that came with nobody to take it is made up for.
    await connection.setVringCall(0, driver.callFd);
    assert.deepEqual(
      (await within(answer, "late call")).data[0],
      Uint8Array.of(7),
    );
    assert.equal(recording.count("queueStart 0"), 1);
  });
});

test("A4: SET_VRING_CALL on a running queue: the new eventfd is called, the old closed, nothing restarts", async () => {
  await withGuest({}, async (guest, { recording }) => {
    const { connection } = guest;
    await guest.activate();
    await guest.startQueue(0);
    await assertWorks(guest, 0);
    const before = descriptorCount();
    const other = core.eventfdCreate();
    try {
      await connection.setVringCall(0, other);
      await connection.barrier();
      // Nothing was left open but `other`, here, and the back-end's copy, which
      // has taken the old one's place.
      assert.ok(descriptorCount() <= before + 1);
      core.eventfdTake(other);
      const driver = guest.queues[0];
      const calls = driver.calls;
      const answer = driver.submit({
        readable: [Uint8Array.of(1)],
        writable: [1],
      });
      await eventually(
        () => core.eventfdTake(other) > 0,
        "a call on the new one",
      );
      assert.equal(driver.calls, calls);
      driver.poll();
      await answer;
    } finally {
      core.descriptorClose(other);
    }
    assert.equal(recording.count("queueStart 0"), 1);
    assert.equal(recording.count("queueStop 0"), 0);
  });
});

test("A5: a second SET_VRING_KICK restarts that queue only", async () => {
  await withGuest({}, async (guest, { recording }) => {
    await guest.activate();
    for (let index = 0; index < 4; index++) await guest.startQueue(index);
    await guest.connection.setVringKick(1, guest.queues[1].kickFd);
    await recording.completed("queueStart 1", 2);
    assert.equal(recording.count("queueStop 1"), 1);
    for (const index of [0, 2, 3]) {
      assert.equal(recording.count(`queueStart ${index}`), 1);
      assert.equal(recording.count(`queueStop ${index}`), 0);
    }
    for (let index = 0; index < 4; index++) await assertWorks(guest, index);
  });
});

test("A6: starting queue n leaves queues 0 to n-1 untouched", async () => {
  const queueCount = 16;
  await withGuest(
    { queueCount, guest: { queueCount } },
    async (guest, { recording }) => {
      await guest.activate();
      for (let index = 0; index < queueCount; index++) {
        await guest.startQueue(index);
      }
      await guest.connection.barrier();
      assert.deepEqual(
        recording.begun.filter((op) => op.startsWith("queue")),
        Array.from({ length: queueCount }, (_, index) => `queueStart ${index}`),
      );
      assert.equal(recording.count("deviceInit"), 1);
    },
  );
});

test("A7: no hidden readiness: a queue starts without others, without CALL, without DRIVER_OK", async () => {
  await withGuest({}, async (guest, { recording }) => {
    const { connection } = guest;
    await connection.setFeatures(guest.features);
    await guest.sendMemory();
    await connection.setVringNum(3, 16);
    await connection.setVringAddr(guest.vringAddress(3));
    await connection.setVringKick(3, guest.queues[3].kickFd);
    await connection.setVringEnable(3, true);
    await recording.completed("queueStart 3");
    assert.equal(recording.queues.get(3)?.availableIndex, 0);
  });
});

test("A8: fewer queues are kicked than there are", async () => {
  await withGuest(
    { queueCount: 8, guest: { queueCount: 3 } },
    async (guest, { recording }) => {
      assert.equal(guest.maxQueueCount, 8);
      await guest.start();
      for (const index of [0, 1, 2]) await assertWorks(guest, index);
      assert.equal(recording.devices[0].queues.length, 3);
    },
  );
});

/** The messages of a whole handshake, in QEMU's order. */
async function* handshake(served: { path: string }) {
  const connection = await FrontendConnection.connect(served.path);
  const ram = new GuestRam([{ size: 1 << 20 }]);
  const features = version1 | featureMask(VirtioFeature.PROTOCOL_FEATURES);
  const driver = new SplitDriver(ram, { queueSize: 16, features });
  const { descriptor, available, used } = driver.ring.addresses;
  const address = {
    index: 0,
    flags: 0,
    descriptor: ringAddress(ram.toUva(descriptor)),
    available: ringAddress(ram.toUva(available)),
    used: ringAddress(ram.toUva(used)),
    log: used,
  };
  const steps: (() => Promise<unknown>)[] = [
    () => connection.getFeatures(),
    () => connection.getProtocolFeatures(),
    () =>
      connection.setProtocolFeatures(
        featureMask(
          ProtocolFeature.MQ,
          ProtocolFeature.REPLY_ACK,
          ProtocolFeature.BACKEND_REQ,
        ),
      ),
    () => connection.setBackendChannel({ ack: true }),
    () => connection.setOwner(),
    () => connection.setVringCall(0, driver.callFd),
    () => connection.setVringErr(0, driver.callFd),
    () => connection.setFeatures(features),
    () => connection.setMemTable(ram.regions, { ack: true }),
    () => connection.setVringNum(0, 16),
    () => connection.setVringBase(0, 0),
    () => connection.setVringAddr(address),
    () => connection.setVringKick(0, driver.kickFd),
    () => connection.setVringEnable(0, true),
    () => connection.getVringBase(0),
  ];
  try {
    for (const step of steps) yield { step };
  } finally {
    connection.close();
    await connection.closed;
    driver.close();
    ram.close();
  }
}

test("A9: the front-end may go after every message of the handshake", async () => {
  await serving({}, async (served) => {
    const { recording, target } = served;
    for (let length = 0;; length++) {
      let sent = 0;
      for await (const { step } of handshake(served)) {
        if (sent++ === length) break;
        await step();
      }
      await recording.completed("deviceDestroy", length + 1);
      await eventually(
        () => target.devices.length === 0,
        "the device has gone",
      );
      if (sent <= length) break;
    }
    assert.equal(
      recording.count("queueStart 0"),
      recording.count("queueStop 0"),
    );
    // After ENABLE, and after GET_VRING_BASE.
    assert.equal(recording.count("queueStart 0"), 2);
    assert.equal(
      recording.count("deviceCreate"),
      recording.count("deviceDestroy"),
    );
  });
});

test("A10: without PROTOCOL_FEATURES acked a queue starts on KICK", async () => {
  await withGuest(
    { guest: { features: version1, queueCount: 1 } },
    async (guest, { recording }) => {
      await guest.activate();
      await guest.startQueue(0);
      await recording.completed("queueStart 0");
      await assertWorks(guest);
    },
  );
});

test("A10: with PROTOCOL_FEATURES acked a queue waits for ENABLE", async () => {
  await withGuest({}, async (guest, { recording }) => {
    await guest.activate();
    await guest.startQueue(0, { enable: false });
    await guest.connection.barrier();
    assert.equal(recording.count("queueStart 0"), 0);
    await guest.enableQueue(0, true);
    await recording.completed("queueStart 0");
    await assertWorks(guest);
  });
});

test("A11: holes among the queues; GET_VRING_BASE of one that was never set up answers", async () => {
  await withGuest(
    { queueCount: 8, guest: { queueCount: 8 } },
    async (guest, { recording }) => {
      await guest.activate();
      await guest.startQueue(5);
      assert.equal(await guest.connection.getVringBase(7), 0);
      await assertWorks(guest, 5);
      assert.equal(recording.count("queueStop 5"), 0);
      assert.equal(await guest.stopQueue(5), 1);
    },
  );
});

test("A12: ENABLE 0 stops the queue, GET_VRING_BASE then answers where it stopped", async () => {
  await withGuest({}, async (guest, { recording }) => {
    await guest.activate();
    for (const index of [0, 1]) await guest.startQueue(index);
    for (let i = 0; i < 5; i++) await assertWorks(guest, 1);
    await guest.connection.setVringEnable(1, false);
    await recording.completed("queueStop 1");
    assert.equal(await guest.connection.getVringBase(1), 5);
    assert.equal(recording.count("queueStop 1"), 1);
    await assertWorks(guest, 0);
  });
});

const ackGuest = { acksAll: true } as const;

test("A13: bit 8 is no part of the index", async () => {
  await withGuest({ guest: ackGuest }, async (guest) => {
    await guest.connection.setVringCall(3, null, { ack: true });
    await guest.connection.setVringErr(3, null, { ack: true });
    await guest.connection.setVringKick(3, null, { ack: true });
  });
});

test("A13: a descriptor with NOFD, or none without it, is refused and closed", async () => {
  const errorsExpected = true;
  await withGuest({ guest: ackGuest, errorsExpected }, async (guest) => {
    const { connection } = guest;
    const fd = guest.queues[0].callFd;
    await connection.barrier();
    const before = descriptorCount();
    for (const id of [12, 13, 14] as const) {
      const payload = { index: 0, reserved: 0n };
      await assert.rejects(
        connection.exchange(id, { ...payload, hasDescriptor: false }, {
          ack: true,
          fds: [fd],
        }),
        RefusedError,
      );
      await assert.rejects(
        connection.exchange(id, { ...payload, hasDescriptor: true }, {
          ack: true,
        }),
        RefusedError,
      );
    }
    assert.ok(descriptorCount() <= before);
  });
});

test("A14: GET_VRING_BASE forgets the ring's addresses: KICK alone starts nothing", async () => {
  await withGuest({}, async (guest, { recording }) => {
    const { connection } = guest;
    await guest.activate();
    await guest.startQueue(0);
    await assertWorks(guest);
    await guest.stopQueue(0);
    await guest.enableQueue(0, true);
    await connection.setVringKick(0, guest.queues[0].kickFd);
    await connection.barrier();
    assert.equal(recording.count("queueStart 0"), 1);
    // Nor do addresses without a new KICK: that is what starts a ring.
    await connection.getVringBase(0);
    await connection.setVringAddr(guest.vringAddress(0));
    await connection.barrier();
    assert.equal(recording.count("queueStart 0"), 1);

    // After the reboot the guest's real driver comes, with other addresses.
    guest.queues[0].reset();
    await guest.startQueue(0, { base: 0 });
    await assertWorks(guest);
  });
});

test("A15: queues after the first join a started device", async () => {
  await withGuest({}, async (guest, { recording }) => {
    await guest.start();
    await guest.stopQueue(3);
    await guest.stopQueue(2);
    for (const index of [2, 3]) {
      await guest.startQueue(index);
      await assertWorks(guest, index);
      await assertWorks(guest, 0);
    }
    assert.equal(recording.count("queueStart 0"), 1);
    assert.equal(recording.count("deviceInit"), 1);
  });
});

test("A16: a start calls the driver once, for what was used before and never announced", async () => {
  await serving({}, async (served) => {
    await opened(served, { usesCalls: false, queueCount: 1 }, async (guest) => {
      await guest.activate();
      await guest.startQueue(0);
      await eventually(
        () => guest.queues[0].calls === 1,
        "the call of the start",
      );
      await guest.stopQueue(0);
      await guest.startQueue(0);
      await eventually(
        () => guest.queues[0].calls === 2,
        "the call of the restart",
      );
    });
  });
});
