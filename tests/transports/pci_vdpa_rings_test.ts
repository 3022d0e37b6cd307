/**
 * Which ring a queue has in the device, where it goes on, and who notifies
 * whom: with every kind of ring, interrupt and kick.
 */

import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import type { Queue } from "../../mod.ts";
import type { Request } from "../../virtqueue/mod.ts";
import { test } from "../harness.ts";
import { Events, eventually } from "../support/wait.ts";
import type { VirtioModelOptions } from "../support/virtio_pci_model.ts";
import {
  allFeatures,
  answer,
  Bit,
  exercise,
  exerciseQueue,
  isDirect,
  openVdpaGuest,
  servingVdpa,
} from "./vdpa_served.ts";

/** With RING_RESET, and with nothing but a reset of the whole device. */
const resets: Record<string, bigint> = {
  "single queues can be reset": allFeatures,
  "only the whole device can be reset": allFeatures & ~Bit.RING_RESET,
};
const everything = (1n << 64n) - 1n;

for (const [name, features] of Object.entries(resets)) {
  test(`a new guest's rings are the device's own where ${name}`, () =>
    servingVdpa({ features }, async (served) => {
      const guest = await openVdpaGuest(served);
      await exercise(guest);
      for (const index of [0, 1]) assert.ok(isDirect(served, guest, index));
      // The guest's memory, and nothing else, is the device's.
      assert.deepEqual(served.model.dma.ranges, [
        { iova: 1n << 20n, size: 1 << 20 },
        { iova: 1n << 32n, size: 1 << 20 },
      ]);
      await guest.close();
      await eventually(() => served.model.dma.count === 0);
      assert.equal(served.model.status, 0, "the device is reset");
    }));

  for (const packed of [false, true]) {
    test(`${packed ? "packed" : "split"} queues stop and go on where ${name}`, () =>
      servingVdpa(
        { features, target: { features: everything } },
        async (served) => {
          const guest = await openVdpaGuest(served, { packed });
          for (let round = 0; round < 4; round++) {
            await exercise(guest);
            await guest.stop();
            assert.equal(served.model.status, 0);
            await guest.start();
          }
          await exercise(guest);
          assert.ok(!isDirect(served, guest, 0));
          // A driver that begins anew gets the device's own ring again.
          await guest.reset();
          await guest.start();
          await exercise(guest);
          assert.equal(isDirect(served, guest, 0), !packed);
          await guest.close();
        },
      ));
  }

  test(`one queue stops while the other runs where ${name}`, () =>
    servingVdpa({ features }, async (served) => {
      const guest = await openVdpaGuest(served);
      for (let round = 0; round < 4; round++) {
        await exercise(guest);
        assert.equal(await guest.stopQueue(0), 40 * (round + 1));
        await exerciseQueue(guest, 1, 20);
        await guest.startQueue(0);
      }
      await exercise(guest);
      await guest.close();
    }));

  test(`a queue that comes late joins those that run where ${name}`, () =>
    servingVdpa({ features }, async (served) => {
      const guest = await openVdpaGuest(served, { start: false });
      await guest.activate();
      await guest.startQueue(1);
      await exerciseQueue(guest, 1, 20);
      await guest.startQueue(0);
      await exercise(guest);
      assert.ok(isDirect(served, guest, 0));
      await guest.close();
    }));

  test(`logging begins under running queues where ${name}`, () =>
    servingVdpa({ features }, async (served) => {
      const guest = await openVdpaGuest(served);
      await exercise(guest);
      const log = await guest.startLog();
      await eventually(() => !isDirect(served, guest, 0), "a ring of ours");
      await guest.connection.barrier();
      // What the device had written before nobody has seen: all of it counts.
      assert.equal(log.take().length, 512);
      await exercise(guest);
      const pages = log.take();
      assert.ok(pages.length > 1 && pages.length < 40, `${pages.length} pages`);
      const used = guest.queues[0].ring.addresses.used;
      assert.ok(pages.includes(used - used % 4096n));
      await guest.stopLog();
      await exercise(guest);
      await guest.close();
    }));

  test(`a stop waits for what the device has where ${name}`, () =>
    servingVdpa({ features }, async (served) => {
      const held: Request[] = [];
      const guest = await openVdpaGuest(served);
      served.model.onRequest = (_, request) => void held.push(request);
      const done = guest.queues[0].submit({
        readable: [Uint8Array.of(1)],
        writable: [1],
      });
      await eventually(() => held.length === 1);
      let hasStopped = false;
      const stopped = guest.stopQueue(0).then((base) => {
        hasStopped = true;
        return base;
      });
      await new Promise((resolve) => setTimeout(resolve, 20));
      assert.ok(!hasStopped);
      answer(0, held[0]);
      assert.equal(await stopped, 1);
      assert.equal((await done).data[0][0], 2);
      await guest.close();
    }));
}

test("a ring at another index than 0 is ours, and goes on past 65535", () =>
  servingVdpa({}, async (served) => {
    const guest = await openVdpaGuest(served);
    await exerciseQueue(guest, 0, 40);
    await guest.stopQueue(0);
    await guest.startQueue(0);
    assert.ok(!isDirect(served, guest, 0));
    for (let done = 40; done < 65536; done += 64) {
      await exerciseQueue(guest, 0, 64);
    }
    assert.equal(await guest.stopQueue(0), 40);
    await guest.close();
  }));

test("a queue without a kick is polled in a ring of ours", () =>
  servingVdpa({}, async (served) => {
    const guest = await openVdpaGuest(served, { start: false });
    await guest.activate();
    await guest.startQueue(0, { polled: true });
    await exerciseQueue(guest, 0, 20);
    assert.ok(!isDirect(served, guest, 0));
    await guest.close();
  }));

test("a queue larger than the device's is ours", () =>
  servingVdpa({ queueSize: 16 }, async (served) => {
    const guest = await openVdpaGuest(served, { queueSize: 64 });
    await exercise(guest, 64);
    assert.ok(!isDirect(served, guest, 0));
    assert.equal(served.model.queues[0].size, 16);
    await guest.close();
  }));

/** How the device interrupts. */
const interrupts: Record<string, Partial<VirtioModelOptions>> = {
  "a vector for each queue": {},
  "too few vectors": { vectorCount: 2 },
  "the pin": { vectorCount: 0, hasPin: true },
  "nothing but looking": { vectorCount: 0 },
};

for (const [name, options] of Object.entries(interrupts)) {
  test(`calls come by ${name}, in both kinds of ring`, () =>
    servingVdpa(options, async (served) => {
      const guest = await openVdpaGuest(served);
      await exercise(guest);
      assert.ok(isDirect(served, guest, 0));
      assert.ok(guest.queues[0].calls > 0);
      await guest.stop();
      await guest.start();
      await exercise(guest);
      await guest.close();
    }));
}

test("a vector that the device refuses is made up for by looking", () =>
  servingVdpa(
    { prepare: (model) => model.refusesVectors = true },
    async (served) => {
      const guest = await openVdpaGuest(served);
      await exercise(guest);
      assert.ok(isDirect(served, guest, 0));
      await guest.stop();
      await guest.start();
      await exercise(guest);
      await guest.close();
    },
  ));

test("an interrupt goes straight to the guest's call, also to a new one", () =>
  servingVdpa({}, async (served) => {
    const guest = await openVdpaGuest(served);
    await exerciseQueue(guest, 0);
    const old = served.model.vectors[1];
    const fd = core.eventfdCreate();
    served.model.vectorsSet.length = 0;
    await guest.connection.setVringCall(0, fd, { ack: true });
    assert.deepEqual(served.model.vectorsSet, [1], "not another queue's");
    assert.notEqual(served.model.vectors[1], old);
    core.eventfdTake(fd);
    const done = guest.queues[0].submit({
      readable: [Uint8Array.of(1)],
      writable: [1],
    });
    await eventually(() => core.eventfdTake(fd) > 0, "the new call");
    guest.queues[0].poll();
    assert.equal((await done).data[0][0], 2);
    // A driver that polls is called by nobody.
    await guest.connection.setVringCall(0, null, { ack: true });
    await guest.connection.setVringCall(0, guest.queues[0].callFd, {
      ack: true,
    });
    await exerciseQueue(guest, 0);
    core.descriptorClose(fd);
    await guest.close();
  }));

test("the guest kicks the device itself where its front-end takes a host notifier", () =>
  servingVdpa({ hasNotifyPages: true }, async (served) => {
    const guest = await openVdpaGuest(served, { takesHostNotifiers: true });
    const { hostNotifiers } = guest;
    await eventually(() => [0, 1].every((i) => hostNotifiers.has(i)));
    const { kicks } = served.model;
    await exercise(guest);
    assert.equal(served.model.kicks, kicks, "no kick was relayed");
    assert.ok(served.model.directKicks > 0);
    // A ring of ours is kicked through us: the register is taken back.
    const log = await guest.startLog();
    await eventually(() => [0, 1].every((i) => !hostNotifiers.has(i)));
    await exercise(guest);
    assert.ok(log.take().length > 0);
    await guest.close();
  }));

test("kicks are relayed to a front-end that takes no host notifier", () =>
  servingVdpa({ hasNotifyPages: true }, async (served) => {
    const guest = await openVdpaGuest(served);
    await exercise(guest);
    assert.equal(served.model.directKicks, 0);
    await guest.close();
  }));

test("what was made available without a kick is done before a stop", () =>
  servingVdpa({}, async (served) => {
    const guest = await openVdpaGuest(served);
    const done = guest.queues[0].submit({
      readable: [Uint8Array.of(5)],
      writable: [1],
      kick: false,
    });
    assert.equal(await guest.stopQueue(0), 1);
    assert.equal((await done).data[0][0], 6);
    await guest.close();
  }));

/** A network card: its receive queue's buffers wait for frames. */
const card = { deviceId: 0x1041, queueCount: 3 } as const;

for (const [name, features] of Object.entries(resets)) {
  test(`a card's receive queue stops with all its buffers where ${name}`, () =>
    servingVdpa({ ...card, features }, async (served) => {
      const buffers: Request[] = [];
      const take = () => {
        served.model.onRequest = (queue, request) => {
          if (queue === 0) buffers.push(request);
          else request.complete();
        };
      };
      take();
      const guest = await openVdpaGuest(served);
      assert.equal(guest.maxQueueCount, 2, "its control queue stays");
      const frames = Array.from(
        { length: 8 },
        () => guest.queues[0].submit({ writable: [64] }),
      );
      const receive = async (i: number) => {
        await eventually(() => buffers.length >= 1, "a buffer");
        const request = buffers.shift()!;
        request.complete(request.write(Uint8Array.of(i, i)));
        assert.equal((await frames[i]).data[0][1], i);
      };
      await receive(0);
      await receive(1);
      for (let stop = 0; stop < 3; stop++) {
        buffers.length = 0;
        assert.equal(await guest.stopQueue(0), 2 + stop);
        await guest.startQueue(0);
        await receive(2 + stop);
      }
      await guest.queues[1].submit({ readable: [Uint8Array.of(1)] });
      await guest.close();
      await Promise.allSettled(frames);
    }));
}

test("requests that a dying guest leaves behind are nobody's", () =>
  servingVdpa({ ...card, errorsExpected: true }, async (served) => {
    served.model.onRequest = () => {};
    const guest = await openVdpaGuest(served);
    const lost = guest.queues[0].submit({ writable: [64] });
    guest.connection.close();
    await guest.close();
    await assert.rejects(lost);
    await served.nobody();
    const next = await openVdpaGuest(served);
    served.model.onRequest = answer;
    await exerciseQueue(next, 1, 10);
    await next.close();
  }));

test("the user's ops see each queue come and go, and each relayed kick", () => {
  const seen = new Events<string>();
  const say = (what: string) => (queue: Queue) =>
    seen.push(`${what} ${queue.index} at ${queue.availableIndex}`);
  let kicks = 0;
  return servingVdpa({
    target: {
      device: () => ({
        queueStart: say("start"),
        queueStop: say("stop"),
        queueKick: () => void kicks++,
      }),
    },
  }, async (served) => {
    const guest = await openVdpaGuest(served);
    await exercise(guest, 10);
    assert.ok(kicks > 2);
    await guest.stopQueue(1);
    await guest.close();
    await served.nobody();
    assert.deepEqual(seen.pending, [
      "start 0 at 0",
      "start 1 at 0",
      "stop 1 at 10",
      "stop 0 at 10",
    ]);
  });
});

test("a queue that the user's op refuses is not the device's", () => {
  let isAllowed = false;
  return servingVdpa({
    errorsExpected: true,
    target: {
      device: () => ({
        queueStart() {
          if (!isAllowed) throw new Error("not now");
        },
      }),
    },
  }, async (served) => {
    const guest = await openVdpaGuest(served);
    await guest.connection.barrier();
    assert.ok(!served.model.queues[0].isEnabled);
    isAllowed = true;
    await guest.start();
    await exercise(guest, 10);
    await guest.close();
  });
});
