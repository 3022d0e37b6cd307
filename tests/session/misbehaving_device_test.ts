// Bugs of the user's device, and of those whom the library tells of them, cost
// that device and nothing else.
import assert from "node:assert/strict";
import { FrontendConnection } from "../../frontend/mod.ts";
import {
  type Queue,
  registerTarget,
  type Target,
  Virtqueue,
} from "../../mod.ts";
import { test } from "../harness.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { eventually, within } from "../support/wait.ts";
import { deferred } from "./deferred.ts";
import { listenAt } from "./frontend_listener.ts";
import { core } from "../../ffi/core.ts";
import { serving, withGuest } from "./served.ts";

/** Ops whose queues are processed by `process`. */
function virtqueueOps(
  process: (virtqueue: Virtqueue, count: number) => void,
  isCongested?: () => boolean,
) {
  const open = new Map<Queue, Virtqueue>();
  return {
    queueStart(queue: Queue) {
      const virtqueue: Virtqueue = new Virtqueue(queue, {
        process: (count) => process(virtqueue, count),
        isCongested,
        stopTimeoutMs: 60_000,
      });
      open.set(queue, virtqueue);
    },
    async queueStop(queue: Queue) {
      await open.get(queue)?.stop();
      open.delete(queue);
    },
    queueKick: (queue: Queue) => open.get(queue)?.kick(),
  };
}

test("a device that completes a request twice breaks its queue, which still stops", async () => {
  const device = () =>
    virtqueueOps((virtqueue, count) => {
      for (const request of virtqueue.requests(count)) {
        virtqueue.complete(request.head, 0);
        virtqueue.complete(request.head, 0);
      }
    });
  await withGuest({ device, errorsExpected: true }, async (guest, served) => {
    await guest.start();
    guest.queues[0].submit({ writable: [8] }).catch(() => {});
    assert.match((await served.errors.next()).message, /not in flight/);
    await within(guest.connection.getVringBase(0), "the stop");
  });
});

test("a device that throws breaks its queue; the next queue works", async () => {
  const device = () =>
    virtqueueOps((virtqueue, count) => {
      if (virtqueue.queue.index === 0) throw new Error("a bug of mine");
      for (const request of virtqueue.requests(count)) request.complete(0);
    });
  await withGuest({ device, errorsExpected: true }, async (guest, served) => {
    await guest.start();
    guest.queues[0].submit({ writable: [8] }).catch(() => {});
    assert.match((await served.errors.next()).message, /a bug of mine/);
    await within(guest.queues[1].submit({ writable: [8] }), "queue 1");
    // What was popped is lost; the front-end's end does not wait for it.
    guest.connection.close();
  });
});

test("no batch is begun while the device has enough, and the next completion goes on", async () => {
  const held: { complete(): boolean }[] = [];
  let most = 0;
  const device = () =>
    virtqueueOps((virtqueue, count) => {
      held.push(...virtqueue.requests(count));
      most = Math.max(most, held.length);
    }, () => held.length >= 2);
  await withGuest(
    { device, guest: { queueSize: 256 } },
    async (guest) => {
      await guest.start();
      const answers: Promise<unknown>[] = [];
      for (let i = 0; i < 200; i++) {
        answers.push(guest.queues[0].submit({ writable: [8] }));
      }
      const all = Promise.all(answers);
      let isDone = false;
      all.then(() => isDone = true);
      while (!isDone) {
        await eventually(() => held.length > 0 || isDone, "a request");
        held.splice(0).forEach((request) => request.complete());
        await new Promise((resolve) => setImmediate(resolve));
      }
      // One that was held, and one batch.
      assert.ok(most <= 1 + 64, `${most} requests at once`);
    },
  );
});

test("an onError that throws is not another failure", async () => {
  const folder = new TemporaryFolder();
  const path = folder.file("socket");
  const target = await registerTarget({
    transport: "vhost-user",
    address: path,
    device: () => ({}),
    onError() {
      throw new Error("the logger is broken");
    },
  });
  try {
    const connection = await FrontendConnection.connect(path);
    // Version 0: the connection must end, and that is reported.
    connection.sendRaw(new Uint8Array(12));
    await within(connection.closed, "the end of the connection");
    await eventually(() => target.devices.length === 0, "the device is gone");
  } finally {
    await target.unregister();
    folder.remove();
  }
});

test("device.signal tells an op that its front-end has gone, while it runs", async () => {
  const began = deferred<void>();
  let isAborted = false;
  await serving(
    {
      device: (device) => ({
        deviceCreate: () => {
          began.resolve();
          return new Promise<void>((resolve) => {
            device.signal.addEventListener("abort", () => {
              isAborted = true;
              resolve();
            });
          });
        },
      }),
    },
    async ({ path, target }) => {
      const connection = await FrontendConnection.connect(path);
      await began.promise;
      connection.close();
      await eventually(() => target.devices.length === 0, "the device is gone");
      assert.ok(isAborted);
    },
  );
});

test("a connector that is unregistered by onError never connects again", async () => {
  const folder = new TemporaryFolder();
  const path = folder.file("socket");
  let created = 0;
  const ended = deferred<void>();
  const target: Target = await registerTarget({
    transport: "vhost-user",
    address: path,
    connect: true,
    reconnect: { minDelayMs: 1, maxDelayMs: 1 },
    device: () => {
      created++;
      return {};
    },
    // The first attempt fails before `target` is there: in the next turn.
    onError: () => setImmediate(() => target.unregister().then(ended.resolve)),
  });
  await ended.promise;
  const listener = listenAt(path);
  try {
    // Many times the delay between attempts.
    for (let i = 0; i < 20; i++) {
      await new Promise((resolve) => setTimeout(resolve, 1));
    }
    assert.equal(created, 0);
  } finally {
    core.descriptorClose(listener);
    folder.remove();
  }
});
