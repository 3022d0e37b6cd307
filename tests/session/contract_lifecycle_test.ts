// Tables B to D of the contract: memory that goes with its front-end, ends and
// pauses, calls and locks (rte_vhost2-contract.md section 1.5). Rows that other
// files prove are listed with them in docs/compliance.md.

import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import {
  FrontendConnection,
  GuestRam,
  ProtocolFeature,
  supportedProtocolFeatures,
} from "../../frontend/mod.ts";
import {
  featureMask,
  type Queue,
  registerTarget,
  type Vhost2Error,
} from "../../mod.ts";
import { test } from "../harness.ts";
import { guestMappingCount } from "../support/descriptors.ts";
import { Events, eventually, within } from "../support/wait.ts";
import { Recording } from "./recording.ts";
import {
  assertWorks,
  echo,
  opened,
  serving,
  targetOptions,
  withGuest,
} from "./served.ts";

const sharedObjects = featureMask(
  ProtocolFeature.SHARED_OBJECT,
  ProtocolFeature.BACKEND_SEND_FD,
);
const uuid = Uint8Array.from({ length: 16 }, (_, i) => i);

test("B2: a front-end that goes between SET_MEM_TABLE and SET_VRING_ADDR leaves no memory mapped", async () => {
  await serving({}, async ({ path, target }) => {
    using ram = new GuestRam([{ size: 1 << 20 }, { size: 1 << 20 }]);
    const before = guestMappingCount();
    for (let round = 0; round < 10; round++) {
      const connection = await FrontendConnection.connect(path);
      await connection.setFeatures(await connection.getFeatures());
      await connection.setMemTable(ram.regions);
      await connection.setVringNum(0, 16);
      await connection.barrier();
      assert.equal(guestMappingCount(), before + 2);
      connection.close();
      await connection.closed;
      await eventually(() => target.devices.length === 0);
      assert.equal(guestMappingCount(), before);
    }
  });
});

test("C3: a device whose queues are all stopped is paused, not destroyed", async () => {
  await withGuest({}, async (guest, { recording }) => {
    await guest.start();
    for (let round = 0; round < 3; round++) {
      await guest.stop();
      assert.equal(recording.count("deviceDestroy"), 0);
      for (let index = 0; index < 4; index++) await guest.startQueue(index);
      await assertWorks(guest, round);
    }
    assert.equal(recording.count("deviceCreate"), 1);
    assert.equal(recording.count("deviceInit"), 1);
    guest.connection.close();
    await recording.completed("deviceDestroy");
    assert.equal(recording.count("deviceDestroy"), 1);
  });
});

test("C6: a call waits for nothing: not for an op that is under way, nor for a message, nor inside an op", async () => {
  const queues: Queue[] = [];
  const device = () => {
    const ops = echo();
    return {
      ...ops,
      queueStart(queue: Queue) {
        queues.push(queue);
        for (const other of queues) other.call();
        return ops.queueStart?.(queue);
      },
      async queueStop(queue: Queue) {
        queue.call();
        await ops.queueStop?.(queue);
        for (const other of queues) other.call();
      },
    };
  };
  await withGuest({ device }, async (guest, { recording }) => {
    await guest.activate();
    await guest.startQueue(0);
    await guest.startQueue(1);
    await assertWorks(guest, 0);
    const hold = recording.hold("queueStop 1");
    const stopped = guest.stopQueue(1);
    await recording.called("queueStop 1");
    // GET_VRING_BASE is outstanding, and so is the op.
    for (let i = 0; i < 20; i++) await assertWorks(guest, 0);
    hold.release();
    await within(stopped, "the stop");
    await assertWorks(guest, 0);
  });
});

test("C7: GET_VRING_BASE during an asynchronous queueStart waits for it, then stops the queue", async () => {
  await withGuest({}, async (guest, { recording }) => {
    await guest.activate();
    const hold = recording.hold("queueStart 0");
    await guest.startQueue(0);
    await recording.called("queueStart 0");
    let isAnswered = false;
    const base = guest.connection.getVringBase(0).then((value) => {
      isAnswered = true;
      return value;
    });
    await new Promise((resolve) => setImmediate(resolve));
    assert.equal(recording.count("queueStop 0"), 0);
    assert.equal(isAnswered, false);
    hold.release();
    assert.equal(await within(base, "the base"), 0);
    assert.deepEqual(
      recording.ended.filter((op) => op.startsWith("queue")),
      ["queueStart 0", "queueStop 0"],
    );
    await guest.startQueue(0, { base: 0 });
    await assertWorks(guest);
  });
});

test("C8: a target that takes its time to unregister holds no other target up", async () => {
  await withGuest({}, async (guest, served) => {
    await guest.start();
    const hold = served.recording.hold("deviceDestroy");
    const errors = new Events<Vhost2Error>();
    const recording = new Recording();
    const path = `${served.path}.other`;
    const other = await registerTarget(targetOptions(path, recording, errors));
    try {
      await opened({ path }, {}, async (bystander) => {
        await bystander.start();
        const unregistered = served.target.unregister();
        await served.recording.called("deviceDestroy");
        for (let index = 0; index < 4; index++) {
          await assertWorks(bystander, index);
        }
        hold.release();
        await within(unregistered, "unregister");
        await assertWorks(bystander);
      });
    } finally {
      await other.unregister();
    }
    assert.deepEqual(errors.pending, []);
  });
});

test("C10: a front-end that goes while an op awaits its answer ends the op, then the device", async () => {
  const asked = new Events<void>();
  const failures = new Events<unknown>();
  await withGuest({
    errorsExpected: true,
    guest: { protocolFeatures: supportedProtocolFeatures | sharedObjects },
    device: (device) => ({
      ...echo(),
      getSharedObject: () => null,
      queueStart: () =>
        device.addSharedObject(uuid).catch((error) => {
          failures.push(error);
          throw error;
        }),
    }),
  }, async (guest, { recording }) => {
    guest.connection.onBackendRequest = () => {
      asked.push();
      return new Promise<bigint>(() => {});
    };
    await guest.activate();
    await guest.startQueue(0);
    await asked.next();
    guest.connection.close();
    assert.match(String(await failures.next()), /Cannot/);
    await recording.completed("deviceDestroy");
    // A start that failed is not stopped.
    assert.equal(recording.count("queueStop 0"), 0);
  });
});

test("D6: after GET_VRING_BASE nobody is called for that queue", async () => {
  await withGuest({}, async (guest, { recording }) => {
    await guest.activate();
    await guest.startQueue(0);
    await assertWorks(guest);
    const queue = recording.queues.get(0)!;
    await guest.stopQueue(0);
    const { callFd } = guest.queues[0];
    core.eventfdTake(callFd);
    queue.call();
    await guest.connection.barrier();
    assert.equal(core.eventfdTake(callFd), 0);
    assert.equal(queue.isStarted, false);
  });
});
