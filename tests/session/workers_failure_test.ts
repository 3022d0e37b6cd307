// Queues in Workers: what goes wrong in one is told with its stack, and stays
// there.
import assert from "node:assert/strict";
import type { VhostUserDevice } from "../../frontend/mod.ts";
import { test } from "../harness.ts";
import { eventually, within } from "../support/wait.ts";
import { opened } from "./served.ts";
import { Word } from "./worker_device.ts";
import {
  ask,
  assertServes,
  send,
  servingInWorkers,
  type WorkerWorld,
} from "./worker_world.ts";

/** Two front-ends with all their queues running. */
function withTwo(
  world: WorkerWorld,
  body: (guest: VhostUserDevice, other: VhostUserDevice) => Promise<void>,
): Promise<void> {
  return opened(world, {}, (other) =>
    opened(world, {}, async (guest) => {
      await other.start();
      await guest.start();
      await body(guest, other);
    }));
}

/** Sets a queue up anew, as a driver does after a reset. */
async function restart(guest: VhostUserDevice, index: number): Promise<void> {
  await within(guest.stopQueue(index), `stop of queue ${index}`);
  guest.queues[index].reset();
  await guest.startQueue(index, { base: 0 });
}

test("a ring that the driver breaks is reported once, and only its queue rests", () =>
  servingInWorkers({}, (world) =>
    withTwo(world, async (guest, other) => {
      const { available } = guest.queues[0].ring.addresses;
      // 4000 entries ahead, in a queue of 16.
      guest.ram.write(available + 2n, Uint8Array.of(0xa0, 0x0f));
      guest.queues[0].kick();
      const error = await world.errors.next();
      assert.equal(error.code, "RING");
      assert.match(error.message, /queue 0 of .*available index/);
      for (const index of [1, 2, 3]) await assertServes(guest, index);
      for (const index of [0, 1]) await assertServes(other, index);
      await restart(guest, 0);
      await assertServes(guest, 0);
    })));

test("an exception while requests are processed breaks that queue, and is told with its stack", () =>
  servingInWorkers({}, (world) =>
    withTwo(world, async (guest, other) => {
      send(guest, "throw");
      const error = await world.errors.next();
      assert.equal(error.code, "RING");
      assert.match(
        error.message,
        /queue 0 of .*: its device failed: TypeError: thrown on purpose/,
      );
      const cause = error.cause as Error;
      assert.equal(cause.name, "TypeError");
      assert.match(cause.stack!, /thrown on purpose[\s\S]*worker_device/);
      for (const index of [1, 2, 3]) await assertServes(guest, index);
      for (const index of [0, 2]) await assertServes(other, index);
      await restart(guest, 0);
      await assertServes(guest, 0);
    })));

for (
  const [command, message] of [
    ["crash", /nobody catches this/],
    ["exit", /its Worker has ended/],
  ] as const
) {
  test(`a Worker that ends by "${command}" fails its queues and no others, and is replaced`, () =>
    servingInWorkers(
      { errorsExpected: true },
      (world) =>
        withTwo(world, async (guest, other) => {
          // Devices begin at different Workers: 0 and 2 of one, 1 and 3 of the
          // other.
          const thread = await ask(guest, "thread", 0);
          const there = (await Promise.all(
            [0, 1, 2, 3].map((i) => ask(other, "thread", i)),
          )).map((id) => id === thread);
          send(guest, command, 0);
          const errors = [];
          for (let i = 0; i < 4; i++) errors.push(await world.errors.next());
          for (const error of errors) {
            assert.equal(error.code, "RING");
            assert.match(error.message, /its Worker has ended/);
            assert.match(error.message, message);
            if (command === "crash") {
              assert.match((error.cause as Error).stack!, /worker_device/);
            }
          }
          for (const index of [1, 3]) await assertServes(guest, index);
          for (const index of [0, 1, 2, 3]) {
            if (!there[index]) await assertServes(other, index);
          }
          for (const index of [0, 2]) {
            await restart(guest, index);
            await assertServes(guest, index);
          }
          for (const index of [0, 1, 2, 3]) {
            if (there[index]) await restart(other, index);
            await assertServes(other, index);
          }
          assert.notEqual(await ask(guest, "thread", 0), thread);
        }),
    ));
}

test("a Worker that dies with requests in flight, again and again, leaves nothing behind", () =>
  servingInWorkers(
    { workers: 1, errorsExpected: true },
    (world) =>
      opened(world, { queueCount: 2 }, async (guest) => {
        await guest.start();
        for (let round = 1; round <= 5; round++) {
          await assertServes(guest, 0);
          send(guest, "hold", 1);
          await world.reached(Word.held, round);
          send(guest, "exit", 0);
          for (const _ of [0, 1]) {
            await world.errors.find(({ message }) =>
              /its Worker has ended/.test(message)
            );
          }
          for (const index of [0, 1]) await restart(guest, index);
        }
        await assertServes(guest, 1);
      }),
  ));

test("a Worker that dies while nothing of its is served is told, too, and is replaced", () =>
  servingInWorkers(
    { workers: 1, errorsExpected: true },
    (world) =>
      opened(world, { queueCount: 1 }, async (guest) => {
        await guest.start();
        await assertServes(guest);
        send(guest, "exit");
        await world.errors.find(({ message }) => /has ended/.test(message));
        // Its end is that of the device, too.
        await guest.close();
        await eventually(() => world.target.devices.length === 0);
        await opened(world, {}, async (second) => {
          await second.start();
          await assertServes(second, 3);
        });
      }),
  ));

test("a Worker that its device keeps busy for 10 s is given up, and what waited for it goes on", () =>
  servingInWorkers({ workers: 1, errorsExpected: true }, async (world) => {
    Atomics.store(world.words, Word.busy, 1);
    await opened(world, { queueCount: 2 }, async (guest) => {
      await guest.start();
      await assertServes(guest, 1);
      send(guest, "busy", 0);
      await world.reached(Word.held, 1);
      // Node interrupts it, and the queue has stopped. Deno cannot: then the
      // memory is taken away, and the device ends.
      await guest.stopQueue(0).catch(() => {});
      const error = await world.errors.find(({ code }) => code === "RING");
      assert.match(error.message, /its device has kept it busy for 10 s/);
    });
    await opened(world, { queueCount: 1 }, async (guest) => {
      await guest.start();
      await assertServes(guest);
    });
    Atomics.store(world.words, Word.busy, 0);
  }));
