// Random valid traffic over both ring formats against a model: what a request
// must come back with is known when it is sent, and for each wish of the driver
// whether it must be called. Queues are stopped, disabled, started, polled and
// kicked in any order meanwhile.
import assert from "node:assert/strict";
import { supportedFeatures, VhostUserDevice } from "../../frontend/mod.ts";
import { virtqueueFeatures } from "../../mod.ts";
import { Random } from "../hostile/random.ts";
import { test } from "../harness.ts";
import { within } from "../support/wait.ts";
import { CallModel } from "./call_model.ts";
import { type Guest, serving } from "./served.ts";
import { answering, send, turns } from "./traffic.ts";

const indirectBit = 1n << 28n;
const eventIdxBit = 1n << 29n;
const inOrderBit = 1n << 35n;
const steps = 45;

/** One queue of a guest, and what it has sent. */
class Traffic {
  readonly index: number;
  readonly #guest: Guest;
  readonly #random: Random;
  /** Without it the driver is called whenever something is used. */
  readonly #calls: CallModel | undefined;
  readonly #requests: Promise<void>[] = [];
  #isEnabled = true;

  constructor(guest: Guest, index: number, random: Random, usesCalls: boolean) {
    this.index = index;
    this.#guest = guest;
    this.#random = random;
    if (!usesCalls) this.#calls = new CallModel(this.#driver, random);
  }

  get #driver() {
    return this.#guest.queues[this.index];
  }

  look(): void {
    this.#calls?.look();
  }

  async step(): Promise<void> {
    const guest = this.#guest;
    const random = this.#random;
    switch (random.below(8)) {
      case 0:
        this.#driver.notify();
        break;
      case 1:
        // With requests in flight, in the ring, and waiting for room.
        if (guest.isStarted(this.index)) await guest.stopQueue(this.index);
        else await this.start();
        break;
      case 2:
        if (!guest.isStarted(this.index)) break;
        this.#calls?.restarted();
        await guest.enableQueue(this.index, this.#isEnabled = random.once(2));
        break;
      case 3:
        await turns(random.below(6));
        break;
      default:
        this.#submit(1 + random.below(3 * this.#driver.queueSize));
    }
  }

  async start(polled: boolean = this.#random.once(3)): Promise<void> {
    this.#calls?.restarted();
    await this.#guest.startQueue(this.index, { polled });
    this.#isEnabled = true;
  }

  #submit(count: number): void {
    const canIndirect = (this.#guest.features & indirectBit) !== 0n;
    for (let i = 0; i < Math.min(count, 64); i++) {
      this.#requests.push(send(this.#driver, this.#random, canIndirect));
    }
  }

  /** Everything comes back. */
  async end(): Promise<void> {
    if (!this.#guest.isStarted(this.index)) await this.start();
    this.#calls?.restarted();
    if (!this.#isEnabled) await this.#guest.enableQueue(this.index, true);
    const driver = this.#driver;
    driver.notify();
    await within(
      Promise.all(this.#requests),
      `${driver.inFlight} requests in flight`,
    );
    assert.equal(driver.usedCount, this.#requests.length);
    assert.equal(driver.inFlight, 0);
    assert.equal(driver.freeDescriptors, driver.queueSize);
    assert.deepEqual(driver.strays, []);
  }
}

async function run(guest: Guest, random: Random, usesCalls: boolean) {
  const queues = guest.queues.map((_, index) =>
    new Traffic(guest, index, random, usesCalls)
  );
  let failure: unknown;
  let isLooking = true;
  const looking = (async () => {
    while (isLooking) {
      for (const queue of queues) queue.look();
      await turns(1);
    }
  })().catch((error) => failure = error);
  try {
    for (let i = 0; i < steps && failure === undefined; i++) {
      await random.pick(queues).step();
    }
    await Promise.race([
      looking,
      Promise.all(queues.map((queue) => queue.end())),
    ]);
  } finally {
    isLooking = false;
    await looking;
  }
  if (failure !== undefined) throw failure;
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
      ["with IN_ORDER", indirectBit | inOrderBit],
      ["with IN_ORDER and EVENT_IDX", eventIdxBit | inOrderBit],
    ] as const
  ) {
    const seed = Number(features >> 28n) + 1;
    test(`${name} rings ${what} bring each request back once, and call as wished, over stops and wraps, seed ${seed}`, async () => {
      const random = new Random(seed);
      await serving({
        features: virtqueueFeatures | inOrderBit,
        handler: answering(random),
        queueCount: 2,
      }, async ({ path }) => {
        for (const queueSize of sizes) {
          for (const usesCalls of [true, false]) {
            await using guest: Guest = await VhostUserDevice.open({
              path,
              features: (supportedFeatures &
                ~(indirectBit | eventIdxBit | inOrderBit)) |
                features,
              queueCount: 2,
              queueSize,
              ramSize: 8 << 20,
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
