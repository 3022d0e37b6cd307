// Queues in Workers: the same device code, served elsewhere.
import assert from "node:assert/strict";
import { threadId } from "node:worker_threads";
import { core } from "../../ffi/core.ts";
import { registerTarget } from "../../mod.ts";
import { ProtocolFeature } from "../../mod.ts";
import { test } from "../harness.ts";
import { withSocketPath } from "../support/temporary.ts";
import { eventually, within } from "../support/wait.ts";
import { opened } from "./served.ts";
import { Word } from "./worker_device.ts";
import {
  ask,
  assertServes,
  commandModule,
  moduleUrl,
  send,
  servingInWorkers,
  threadCount,
} from "./worker_world.ts";

for (const workers of [0, 1, 2]) {
  for (const isPacked of [false, true]) {
    const where = workers === 0 ? "the event loop" : `${workers} Workers`;
    const rings = isPacked ? "packed" : "split";
    test(`the same module answers on ${where}, its code asynchronous or not, rings ${rings}`, () =>
      servingInWorkers(
        { workers },
        (world) =>
          opened(world, { packed: isPacked } as object, async (guest) => {
            await guest.start();
            for (let index = 0; index < 4; index++) {
              await assertServes(guest, index);
              assert.equal(await ask(guest, "later on", index), "on");
            }
            await Promise.all(
              Array.from(
                { length: 64 },
                (_, i) => assertServes(guest, i % 4),
              ),
            );
            assert.equal(world.words[Word.starts], 4);
            await guest.stop();
            assert.equal(world.words[Word.stops], 4);
          }),
      ));
  }
}

test("queues are spread over the Workers, and none is served in the registering thread", () =>
  servingInWorkers(
    { workers: 2 },
    (world) =>
      opened(world, {}, async (guest) => {
        await guest.start();
        const threads = await Promise.all(
          [0, 1, 2, 3].map((index) => ask(guest, "thread", index)),
        );
        assert.equal(new Set(threads).size, 2);
        assert.ok(!threads.includes(String(threadId)));
        assert.equal(threads[0], threads[2]);
        assert.equal(threads[1], threads[3]);
        assert.equal(await ask(guest, "queues", 0), "0,2");
      }),
  ));

test("devices of one queue each are spread over the Workers too", () =>
  servingInWorkers({ workers: 2, queueCount: 1 }, (world) =>
    opened(
      world,
      { queueCount: 1 },
      (first) =>
        opened(world, { queueCount: 1 }, async (second) => {
          await first.start();
          await second.start();
          assert.notEqual(
            await ask(first, "thread"),
            await ask(second, "thread"),
          );
        }),
    )));

test("pollMicroseconds 0 and a long one serve alike", async () => {
  for (const pollMicroseconds of [0, 20_000]) {
    await servingInWorkers(
      { pollMicroseconds },
      (world) =>
        opened(world, {}, async (guest) => {
          await guest.start();
          for (let i = 0; i < 20; i++) await assertServes(guest, i % 4);
        }),
    );
  }
});

test("a polled queue, which has no kick, is served in a Worker", () =>
  servingInWorkers({}, (world) =>
    opened(world, {}, async (guest) => {
      await guest.activate();
      const { connection } = guest;
      const driver = guest.queues[0];
      await connection.setVringNum(0, driver.queueSize);
      await connection.setVringBase(0, 0);
      await connection.setVringAddr(guest.vringAddress(0));
      await connection.setVringCall(0, driver.callFd);
      await connection.setVringKick(0, null);
      await connection.setVringEnable(0, true, { ack: true });
      for (let i = 0; i < 3; i++) await assertServes(guest, 0);
    })));

test("a call that is replaced while the queue runs is the one that is used", () =>
  servingInWorkers({}, (world) =>
    opened(world, {}, async (guest) => {
      await guest.start();
      await assertServes(guest);
      const { connection, queues: [driver] } = guest;
      const calls = [core.eventfdCreate(), core.eventfdCreate()];
      await connection.setVringCall(0, null, { ack: true });
      for (const call of calls) {
        await connection.setVringCall(0, call, { ack: true });
        // One for what may have been lost in between.
        core.eventfdTake(call);
        // Nobody calls this driver any more: it has to look.
        let isAnswered = false;
        send(guest, "echo words").then(() => isAnswered = true);
        await eventually(() => {
          driver.poll();
          return isAnswered;
        }, "the request is used");
        await eventually(() => core.eventfdTake(call) > 0, "the call");
      }
      assert.equal(core.eventfdTake(calls[0]), 0, "not called any more");
      for (const call of calls) core.descriptorClose(call);
      await connection.setVringCall(0, driver.callFd, { ack: true });
      await assertServes(guest);
    })));

test("memory that is shared is common to the instances of one device only", () =>
  servingInWorkers({}, (world) =>
    opened(world, {}, async (guest) => {
      await guest.start();
      const counts: string[] = [];
      for (const index of [0, 1, 2, 3]) {
        counts.push(await ask(guest, "shared", index));
      }
      assert.deepEqual(counts, ["0", "1", "2", "3"]);
      const [device] = world.target.devices;
      assert.equal(new Int32Array(device.shared)[0], 4);
      await opened(world, {}, async (second) => {
        await second.start();
        assert.equal(await ask(second, "shared"), "0");
      });
    })));

test("configChanged, report and features are those of the device, in a Worker too", () =>
  servingInWorkers({}, (world) =>
    opened(world, {}, async (guest) => {
      await guest.start();
      const changed = new Promise<void>((resolve) => {
        guest.onConfigChange = resolve;
      });
      assert.equal(await ask(guest, "configChanged"), "told");
      await within(changed, "the config change");
      assert.equal(await ask(guest, "report this"), "reported");
      const error = await world.errors.next();
      assert.equal(error.code, "RING");
      assert.equal(error.message, "reported this");
      assert.equal(await ask(guest, "features"), String(guest.features));
    })));

test("in-band notifications reach a queue in a Worker, and its calls come back", () =>
  servingInWorkers({
    protocolFeatures: 1n << BigInt(ProtocolFeature.INBAND_NOTIFICATIONS),
  }, (world) =>
    opened(world, {}, async (guest) => {
      assert.equal(world.errors.pending.length, 0);
      await guest.start();
      await assertServes(guest);
    })));

const mistakes: [string, () => object, RegExp][] = [
  [
    "a function as device",
    () => ({ device: () => ({}), workers: 1 }),
    /Cannot use workers: 1 \(the device is a function/,
  ],
  [
    "a module that is not there",
    () => ({ device: { module: "file:///nowhere.js" }, workers: 1 }),
    /Cannot import the device's module file:\/\/\/nowhere\.js/,
  ],
  [
    "an export that is no function",
    () => ({ device: { module: moduleUrl, name: "notAFactory" }, workers: 1 }),
    /its export "notAFactory" is no function/,
  ],
  [
    "options that cannot travel",
    () => ({
      device: { module: moduleUrl, name: "commandDevice", options: () => {} },
      workers: 1,
    }),
    /Cannot start a Worker/,
  ],
  [
    "a negative number of Workers",
    () => ({ device: commandModule(new SharedArrayBuffer(64)), workers: -1 }),
    /Cannot use workers: -1/,
  ],
  [
    "queues that belong together by none",
    () => ({
      device: {
        ...commandModule(new SharedArrayBuffer(64)),
        queuesTogether: 0,
      },
      workers: 1,
    }),
    /Cannot use queuesTogether: 0 \(a whole number from 1 to 256\)/,
  ],
];
for (const [name, options, message] of mistakes) {
  test(`registering ${name} is refused, and leaves nothing behind`, () =>
    withSocketPath(async (address) => {
      const threads = threadCount();
      for (const _ of [1, 2]) {
        await assert.rejects(
          registerTarget(
            { transport: "vhost-user", address, ...options() } as Parameters<
              typeof registerTarget
            >[0],
          ),
          { name: "Vhost2Error", code: "OPTION", message },
        );
      }
      await eventually(
        () => threadCount() <= threads + 1,
        "no thread is left",
      );
    }));
}
