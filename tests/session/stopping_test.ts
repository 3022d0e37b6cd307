// Requests and their queue's end: time limit, signal, late completions; and
// rings that are broken.

import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import {
  type Device,
  type Queue,
  type Request,
  requestOps,
  type TargetOps,
  Virtqueue,
} from "../../mod.ts";
import { test } from "../harness.ts";
import { Events, within } from "../support/wait.ts";
import { deferred } from "./deferred.ts";
import { assertWorks, echo, opened, serving, withGuest } from "./served.ts";

test("stopTimeoutMs: what hangs is failed, with its signal aborted, and the queue stops", async () => {
  const signals = new Events<AbortSignal>();
  const never = new Promise<number>(() => {});
  const device = () =>
    requestOps((request) => {
      signals.push(request.signal);
      return never;
    }, { stopTimeoutMs: 20 });
  await withGuest({ device }, async (guest) => {
    await guest.start();
    const answers = [1, 2].map((n) =>
      guest.queues[0].submit({ writable: [n] })
    );
    const signal = await signals.next();
    assert.equal(signal.aborted, false);
    assert.equal(await within(guest.stopQueue(0), "stop"), 2);
    assert.equal(signal.aborted, true);
    for (const answer of answers) {
      assert.equal((await within(answer, "answer")).written, 0);
    }
  });
});

test("stopTimeoutMs: a request that ends on its signal answers what it likes", async () => {
  const arrived = deferred<void>();
  const device = () =>
    requestOps((request) => {
      arrived.resolve();
      return new Promise((resolve) => {
        const end = () => resolve(request.write(Uint8Array.of(77)));
        request.signal.addEventListener("abort", end);
      });
    }, { stopTimeoutMs: 20 });
  await withGuest({ device }, async (guest) => {
    await guest.start();
    const answer = guest.queues[0].submit({ writable: [4] });
    await within(arrived.promise, "the request");
    await within(guest.stopQueue(0), "stop");
    assert.deepEqual(await within(answer, "answer"), {
      written: 1,
      data: [Uint8Array.of(77, 0, 0, 0)],
    });
  });
});

test("a stop waits for a request that is merely slow", async () => {
  const end = deferred<number>();
  const arrived = deferred<void>();
  const device = () =>
    requestOps(() => {
      arrived.resolve();
      return end.promise;
    });
  await withGuest({ device }, async (guest, { recording }) => {
    await guest.start();
    const answer = guest.queues[0].submit({ writable: [4] });
    await within(arrived.promise, "the request");
    const stopped = guest.stopQueue(0);
    await recording.called("queueStop 0");
    end.resolve(4);
    assert.equal((await within(answer, "answer")).written, 4);
    await within(stopped, "stop");
  });
});

/** Keeps every request; what is not completed in 20 ms of a stop is lost. */
class Keeper implements TargetOps {
  readonly kept: Events<Request>;
  readonly #running = new Map<Queue, Virtqueue>();

  constructor(kept: Events<Request>) {
    this.kept = kept;
  }

  queueStart(queue: Queue): void {
    const virtqueue: Virtqueue = new Virtqueue(queue, {
      stopTimeoutMs: 20,
      process: (count) => {
        for (const request of virtqueue.requests(count)) {
          this.kept.push(request);
        }
      },
    });
    this.#running.set(queue, virtqueue);
  }

  async queueStop(queue: Queue): Promise<void> {
    await this.#running.get(queue)?.stop();
  }

  queueKick(queue: Queue): void {
    this.#running.get(queue)?.kick();
  }
}

test("a completion after the stop returns false and touches nothing, after a restart too", async () => {
  const kept = new Events<Request>();
  await withGuest({ device: () => new Keeper(kept) }, async (guest) => {
    await guest.start();
    const driver = guest.queues[0];
    const lost = [
      driver.submit({ writable: [4] }),
      driver.submit({ writable: [4] }),
    ];
    for (const answer of lost) answer.catch(() => {});
    const [early, late] = [await kept.next(), await kept.next()];
    assert.equal(await within(guest.stopQueue(0), "stop"), 2);
    const before = guest.ram.read(driver.ring.addresses.used, 64);
    assert.equal(early.complete(4), false);
    assert.deepEqual(guest.ram.read(driver.ring.addresses.used, 64), before);

    await guest.startQueue(0);
    await guest.connection.barrier();
    assert.equal(late.complete(4), false);
    await Promise.resolve();
    assert.equal(driver.usedIndex, 0);
    // The new run is not disturbed.
    const answer = driver.submit({ writable: [2] });
    assert.equal((await kept.next()).complete(2), true);
    assert.equal((await within(answer, "the new request")).written, 2);
  });
});

test("a request completes once: again is false", async () => {
  const kept = new Events<Request>();
  await withGuest({ device: () => new Keeper(kept) }, async (guest) => {
    await guest.start();
    const answer = guest.queues[0].submit({ writable: [2] });
    const request = await kept.next();
    assert.equal(request.complete(1), true);
    assert.equal(request.complete(1), false);
    await within(answer, "the request");
    assert.equal(guest.queues[0].usedIndex, 1);
  });
});

test("requests in flight end with their front-end, and the next one is served", async () => {
  const kept = new Events<Request>();
  await serving({ device: () => new Keeper(kept) }, async (served) => {
    await opened(served, {}, async (guest) => {
      await guest.start();
      guest.queues[0].submit({ writable: [4] }).catch(() => {});
      await kept.next();
    });
    await served.recording.completed("deviceDestroy");
    await opened(served, {}, async (guest) => {
      await guest.start();
      const answer = guest.queues[0].submit({ writable: [4] });
      (await kept.next()).complete(4);
      await within(answer, "the request");
    });
  });
});

test("a broken ring is told once, by its err descriptor and the report; kicks cost nothing more; a restart heals it", async () => {
  const device = (_: Device): TargetOps => ({
    queueKick: (queue) => {
      if (queue.index === 0) queue.fail("the chain is broken");
    },
  });
  await withGuest(
    { device, errorsExpected: true },
    async (guest, { recording, errors }) => {
      const errorFd = core.eventfdCreate();
      try {
        await guest.activate();
        await guest.connection.setVringErr(0, errorFd);
        await guest.startQueue(0);
        const error = await errors.next();
        assert.equal(error.code, "RING");
        assert.match(error.message, /queue 0.*the chain is broken/);
        const kicks = recording.kicks.get(0);
        for (let i = 0; i < 20; i++) {
          guest.queues[0].kick();
          await guest.connection.barrier();
        }
        assert.equal(recording.kicks.get(0), kicks);
        assert.equal(core.eventfdTake(errorFd), 1);
        assert.equal(errors.pending.length, 0);
        await guest.stopQueue(0);
        await guest.startQueue(0);
        await errors.next();
        assert.equal(recording.count("queueStart 0"), 2);
      } finally {
        core.descriptorClose(errorFd);
      }
    },
  );
});

test("a broken ring harms no other queue and no other device", async () => {
  await serving({ errorsExpected: true }, async (served) => {
    await opened(served, {}, async (other) => {
      await other.start();
      await opened(served, {}, async (guest) => {
        await guest.start();
        guest.queues[1].setAvailableIndex(0x4000);
        guest.queues[1].kick();
        assert.match((await served.errors.next()).message, /queue 1/);
        for (const index of [0, 2, 3]) await assertWorks(guest, index);
        for (const index of [0, 1, 2, 3]) await assertWorks(other, index);
        guest.queues[1].reset();
        await guest.stopQueue(1);
        await guest.startQueue(1, { base: 0 });
        await assertWorks(guest, 1);
      });
    });
  });
});

test("a queueKick that throws is reported, and the device goes on", async () => {
  const inner = echo();
  let isThrowing = true;
  const device = (): TargetOps => ({
    ...inner,
    queueKick: (queue) => {
      if (isThrowing) throw new Error("a bug of the device's");
      inner.queueKick!(queue);
    },
  });
  await withGuest(
    { device, errorsExpected: true },
    async (guest, { errors }) => {
      await guest.start();
      const error = await errors.next();
      assert.equal(error.code, "OP");
      assert.match(error.message, /queueKick.*a bug of the device's/);
      isThrowing = false;
      await assertWorks(guest);
    },
  );
});
