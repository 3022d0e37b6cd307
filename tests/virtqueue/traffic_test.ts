// Random valid traffic over both ring formats against a model: what a request
// must come back with is known when it is sent.
import assert from "node:assert/strict";
import {
  type QueueDriver,
  supportedFeatures,
  VhostUserDevice,
} from "../../frontend/mod.ts";
import { type Request, virtqueueFeatures } from "../../mod.ts";
import { test } from "../harness.ts";
import { within } from "../support/wait.ts";
import { type Guest, serving } from "./served.ts";

const indirectBit = 1n << 28n;
const eventIdxBit = 1n << 29n;
const inOrderBit = 1n << 35n;
const rounds = 40;

/** Mulberry32: a whole number from 0 to `below` - 1. */
function randomOf(seed: number): (below: number) => number {
  let state = seed;
  return (below) => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return Math.floor(((t ^ (t >>> 14)) >>> 0) / 2 ** 32 * below);
  };
}

/** What the device answers to `input`, if it has room for `room` bytes. */
function answerTo(input: Uint8Array, room: number): Uint8Array<ArrayBuffer> {
  const sum = input.reduce(
    (total, byte) => (total + byte) & 0xff,
    input.length,
  );
  const length = input.length % (room + 1);
  return Uint8Array.from({ length }, (_, i) => (sum + 7 * i) & 0xff);
}

/** Answers at once or some turns of the event loop later, in any order. */
function device(random: (below: number) => number) {
  return (request: Request): number | Promise<number> => {
    const answer = answerTo(request.read(), request.writableBytes);
    if (random(3) === 0) return request.write(answer);
    return new Promise((resolve) => {
      let turns = random(4);
      const later = () => {
        if (turns-- > 0) setImmediate(later);
        else resolve(request.write(answer));
      };
      later();
    });
  };
}

/** One request, checked against the model. */
async function send(
  driver: QueueDriver,
  random: (below: number) => number,
  canIndirect: boolean,
): Promise<void> {
  const limit = Math.min(driver.queueSize, 6);
  const indirect = canIndirect && random(2) === 0;
  const parts = 1 + random(indirect ? 8 : limit);
  const readableParts = random(parts + 1);
  const readable = Array.from(
    { length: readableParts },
    () => Uint8Array.from({ length: 1 + random(90) }, () => random(256)),
  );
  const writable = Array.from(
    { length: parts - readableParts },
    () => 1 + random(90),
  );
  const input = new Uint8Array(readable.flatMap((bytes) => [...bytes]));
  const room = writable.reduce((sum, length) => sum + length, 0);
  const expected = answerTo(input, room);
  const { written, data } = await driver.submit({
    readable,
    writable,
    indirect,
    initial: 0xee,
    kick: random(3) > 0,
  });
  assert.equal(written, expected.length);
  const all = data.flatMap((bytes) => [...bytes]);
  assert.deepEqual(all.slice(0, written), [...expected]);
  assert.ok(all.slice(written).every((byte) => byte === 0xee));
}

async function run(
  guest: Guest,
  random: (below: number) => number,
  usesCalls: boolean,
): Promise<void> {
  const [driver] = guest.queues;
  const canIndirect = (guest.features & indirectBit) !== 0n;
  let sent = 0;
  let polling = true;
  const poll = () => {
    driver.poll();
    if (polling) setImmediate(poll);
  };
  if (!usesCalls) poll();
  for (let round = 0; round < rounds; round++) {
    const count = random(3 * driver.queueSize) + 1;
    const requests = Array.from(
      { length: count },
      () => send(driver, random, canIndirect),
    );
    sent += count;
    // Whatever was not kicked for, is now.
    driver.notify();
    if (random(3) === 0 && driver.inFlight === count) {
      // All were available when it stops: the device has them, or meets them
      // after the start.
      const base = await guest.stopQueue(0);
      await guest.startQueue(0, { base });
    }
    await within(Promise.all(requests), `round ${round}`);
  }
  polling = false;
  assert.equal(driver.usedCount, sent);
  assert.equal(driver.inFlight, 0);
  assert.equal(driver.freeDescriptors, driver.queueSize);
  assert.deepEqual(driver.strays, []);
  // Asked not to, the device calls less often than it completes.
  if (!usesCalls) assert.ok(driver.calls < sent / 2, `${driver.calls} calls`);
}

const shapes = [
  { name: "split", packed: false, sizes: [1, 8, 128] },
  { name: "packed", packed: true, sizes: [1, 5, 128, 173] },
];
for (const { name, packed, sizes } of shapes) {
  for (
    const [what, features] of [
      ["plain", 0n],
      ["with EVENT_IDX", eventIdxBit],
      ["with EVENT_IDX and INDIRECT", eventIdxBit | indirectBit],
      ["with IN_ORDER", eventIdxBit | indirectBit | inOrderBit],
    ] as const
  ) {
    test(`${name} rings ${what} bring each request back once, over stops and wraps`, async () => {
      const random = randomOf(Number(features >> 28n) + 1);
      await serving({
        features: virtqueueFeatures | inOrderBit,
        handler: device(random),
      }, async ({ path }) => {
        for (const queueSize of sizes) {
          for (const usesCalls of [true, false]) {
            await using guest: Guest = await VhostUserDevice.open({
              path,
              features: (supportedFeatures & ~(indirectBit | eventIdxBit)) |
                features,
              queueSize,
              ramSize: 4 << 20,
              usesCalls,
              packed,
            });
            await run(guest, random, usesCalls);
          }
        }
      });
    });
  }
}
