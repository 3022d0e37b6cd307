// Queues in Workers: stops, restarts, memory that changes, ends of all kinds.
import assert from "node:assert/strict";
import { test } from "../harness.ts";
import { eventually, within } from "../support/wait.ts";
import { opened } from "./served.ts";
import { Word } from "./worker_device.ts";
import {
  ask,
  assertServes,
  send,
  servingInWorkers,
  threadCount,
} from "./worker_world.ts";

test("a stop waits for requests in flight, fails them when their time is over, and the queue starts again where it was", () =>
  servingInWorkers(
    { command: { stopTimeoutMs: 50 } },
    (world) =>
      opened(world, {}, async (guest) => {
        await guest.start();
        await assertServes(guest);
        send(guest, "hold");
        send(guest, "hold");
        await world.reached(Word.held, 2);
        assert.equal(await within(guest.stopQueue(0), "stop"), 3);
        await assertServes(guest, 1);
        guest.queues[0].reset();
        await guest.startQueue(0, { base: 0 });
        for (let i = 0; i < 20; i++) await assertServes(guest, 0);
        assert.equal(await guest.stopQueue(0), 20);
        await guest.startQueue(0);
        await assertServes(guest, 0);
      }),
  ));

test("a memory table that replaces regions stops all queues, empties every view, and they go on", () =>
  servingInWorkers({}, (world) =>
    opened(world, {
      protocolFeatures: 0b1000n | 1n,
      regions: [{ size: 1 << 20 }, { size: 1 << 20, gpa: 1n << 32n }],
    }, async (guest) => {
      await guest.start();
      for (const index of [0, 1]) {
        assert.equal(await ask(guest, "keep", index), String(1 << 20));
      }
      const [, second] = guest.ram.regions;
      assert.equal(second.bytes[15], 0x66);
      await guest.connection.setMemTable([guest.ram.regions[0]], { ack: true });
      assert.equal(world.words[Word.stops], 4);
      for (const index of [0, 1]) {
        assert.equal(await ask(guest, "kept", index), "0");
        await assertServes(guest, index);
      }
    })));

test("a region that is added while queues run is seen by them at once", () =>
  servingInWorkers({}, (world) =>
    opened(world, {}, async (guest) => {
      await guest.start();
      await assertServes(guest);
      for (let round = 0; round < 8; round++) {
        const region = guest.ram.addRegion({
          size: 65536,
          gpa: BigInt(round + 1) << 33n,
        });
        await guest.addRegion(region);
        const text = new TextEncoder().encode(`echo new${round}`);
        const from = region.gpa;
        const to = region.gpa + 4096n;
        guest.ram.write(from, text);
        const written = await within(
          guest.queues[0].submitChain([
            { address: from, length: text.length, isWritable: false },
            { address: to, length: 64, isWritable: true },
          ]),
          "a request in the new region",
        );
        assert.equal(written, 4);
        assert.equal(
          new TextDecoder().decode(guest.ram.read(to, written)),
          `new${round}`,
        );
      }
      assert.equal(world.words[Word.starts], 4);
      assert.equal(world.words[Word.stops], 0);
    })));

test("memory is replaced again and again while requests are on their way, and address space comes back", () =>
  servingInWorkers(
    { command: { stopTimeoutMs: 1000 } },
    (world) =>
      opened(world, { protocolFeatures: 0b1000n | 1n }, async (guest) => {
        await guest.start();
        for (let round = 0; round < 15; round++) {
          const answers = [0, 1, 2, 3].map((index) =>
            ask(guest, `later ${round}`, index)
          );
          const extra = guest.ram.addRegion({ size: 65536, gpa: 1n << 40n });
          await guest.sendMemory();
          guest.ram.removeRegion(extra);
          await guest.sendMemory();
          extra.close();
          for (const answer of await Promise.all(answers)) {
            assert.equal(answer, String(round));
          }
        }
      }),
  ));

test("RESET_DEVICE stops the queues, and they can be set up again", () =>
  servingInWorkers({}, (world) =>
    opened(world, {}, async (guest) => {
      await guest.start();
      await assertServes(guest);
      await guest.connection.resetDevice({ ack: true });
      assert.equal(world.words[Word.stops], 4);
      guest.queues.forEach((driver) => driver.reset());
      for (let index = 0; index < 4; index++) {
        await guest.startQueue(index, { base: 0 });
        await assertServes(guest, index);
      }
    })));

test("a start that fails is reported with its stack, and tried again when the front-end sets the queue up again", () =>
  servingInWorkers({}, (world) =>
    opened(world, {}, async (guest) => {
      Atomics.store(world.words, Word.failStarts, 1);
      await guest.activate();
      await guest.startQueue(0);
      const error = await world.errors.next();
      assert.equal(error.code, "OP");
      assert.match(error.message, /queueStart.*was told to fail/);
      assert.match((error.cause as Error).stack!, /worker_device/);
      await guest.enableQueue(0, false);
      await guest.enableQueue(0, true);
      await assertServes(guest);
    })));

test("a stop that fails is tried again, in the Worker", () =>
  servingInWorkers({}, (world) =>
    opened(world, {}, async (guest) => {
      await guest.start();
      await assertServes(guest);
      Atomics.store(world.words, Word.failStops, 2);
      assert.equal(await within(guest.stopQueue(0), "stop"), 1);
      for (const _ of [1, 2]) {
        const error = await world.errors.next();
        assert.match(error.message, /queueStop.*was told to fail/);
      }
      await guest.startQueue(0);
      await assertServes(guest);
    })));

test("a stop that fails for ever ends the device, and nothing of it is left in the Worker", () =>
  servingInWorkers({ errorsExpected: true }, async (world) => {
    await opened(world, { queueCount: 1 }, async (guest) => {
      await guest.start();
      await assertServes(guest);
      Atomics.store(world.words, Word.failStops, 1000);
      guest.stopQueue(0).catch(() => {});
      await within(guest.connection.closed, "the end of the connection");
    });
    await eventually(() => world.target.devices.length === 0);
    assert.equal(world.words[Word.aborted], 2, "here and in one Worker");
    Atomics.store(world.words, Word.failStops, 0);
    await opened(world, {}, async (guest) => {
      await guest.start();
      await assertServes(guest);
    });
  }));

test("a front-end that goes while requests are in flight takes its device along, and no other", () =>
  servingInWorkers(
    { command: { stopTimeoutMs: 50 } },
    (world) =>
      opened(world, {}, async (other) => {
        await other.start();
        await opened(world, {}, async (guest) => {
          await guest.start();
          for (let index = 0; index < 4; index++) send(guest, "hold", index);
          await world.reached(Word.held, 4);
          guest.connection.close();
          await eventually(() => world.target.devices.length === 1);
        });
        // Twice: the instance here and those in two Workers.
        assert.equal(world.words[Word.aborted], 3);
        for (let index = 0; index < 4; index++) {
          await assertServes(other, index);
        }
      }),
  ));

for (
  const state of [
    "before any front-end came",
    "while a start is awaited",
    "while queues run",
    "while requests are held",
    "while a queue is broken",
    "while messages are on their way",
  ] as const
) {
  test(`unregister ${state}: all ends, nothing is left`, async () => {
    const threads = threadCount();
    await servingInWorkers({
      command: { stopTimeoutMs: 50 },
      errorsExpected: true,
    }, async (world) => {
      if (state === "before any front-end came") return;
      await opened(world, {}, async (guest) => {
        if (state === "while a start is awaited") {
          Atomics.store(world.words, Word.holdStarts, 1);
          await guest.activate();
          await guest.startQueue(0, { enable: false });
          guest.connection.setVringEnable(0, true).catch(() => {});
          await eventually(() => threadCount() > threads);
          const ended = world.target.unregister();
          Atomics.store(world.words, Word.holdStarts, 0);
          return await within(ended, "unregister");
        }
        await guest.start();
        await assertServes(guest);
        switch (state) {
          case "while requests are held":
            for (let index = 0; index < 4; index++) send(guest, "hold", index);
            await world.reached(Word.held, 4);
            break;
          case "while a queue is broken":
            send(guest, "fail for a test");
            await world.errors.find(({ message }) =>
              /for a test/.test(message)
            );
            break;
          case "while messages are on their way":
            for (let i = 0; i < 16; i++) send(guest, "echo on", i % 4);
            guest.connection.setVringEnable(0, false).catch(() => {});
            guest.connection.setVringEnable(0, true).catch(() => {});
            break;
        }
        await within(world.target.unregister(), "unregister");
      });
    });
    await eventually(
      () => threadCount() <= threads + 1,
      () => `${threadCount()} threads, ${threads} before`,
    );
  });
}
