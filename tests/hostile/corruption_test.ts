// Traffic over both ring formats by a driver whose rings are corrupted at
// random while the device runs. All that is asked for is survival and
// accounting: the process lives, the bystander is served, descriptors and
// memory are as before, and each request that was popped was completed or, at
// a stop, forgotten.
import assert from "node:assert/strict";
import {
  GuestRam,
  type QueueDriver,
  SplitDriver,
  supportedFeatures,
  VhostUserDevice,
} from "../../frontend/mod.ts";
import {
  type DeviceOptions,
  type Queue,
  type Request,
  Virtqueue,
  virtqueueFeatures,
} from "../../mod.ts";
import { test } from "../harness.ts";
import type { Guest } from "../virtqueue/served.ts";
import { turns } from "../virtqueue/traffic.ts";
import { assertGuestMemory, guestMemoryBytes } from "./accounting.ts";
import { Random } from "./random.ts";
import { Scribbler } from "./scribble.ts";
import { ScribblingThread } from "./scribbling.ts";
import { withBystander, type World } from "./world.ts";

const seeds = [1, 2, 3, 4];
const lives = 10;
const steps = 300;
const eventIdx = 1n << 29n;
const inOrder = 1n << 35n;
/** Views of one request that the device touches. */
const touched = 16;

/** What became of the requests of all queues. */
class Account {
  popped = 0;
  completed = 0;
  /** Completed after the stop, which nobody hears of. */
  late = 0;
  /** Given up at a stop. */
  forgotten = 0;
}

/** Answers now, later or, until it must stop, never. */
function device(account: Account, random: Random): DeviceOptions["device"] {
  const running = new Map<Queue, Virtqueue>();
  return () => ({
    queueStart(queue) {
      const open = new Set<Request>();
      const answer = (request: Request) => {
        if (!open.delete(request)) return;
        for (const view of request.readable.slice(0, touched)) view.at(-1);
        for (const view of request.writable.slice(0, touched)) {
          view[0] = random.below(256);
        }
        const isKnown = request.complete(random.pick([
          request.writableBytes,
          request.writableBytes,
          random.word(),
        ]));
        if (isKnown) account.completed++;
        else account.late++;
      };
      const virtqueue = new Virtqueue(queue, {
        headerBytes: random.pick([0, 16]),
        trailerBytes: random.below(2),
        maxBatch: random.pick([1, 7, 64]),
        stopTimeoutMs: 1,
        process(count) {
          account.popped += count;
          for (const request of virtqueue.requests(count)) {
            open.add(request);
            if (random.once(3)) answer(request);
            else if (!random.once(20)) {
              turns(random.below(4)).then(() => answer(request));
            }
          }
        },
        expire() {
          // Half of what is left is answered, the other half is not.
          for (const request of [...open]) {
            if (random.once(2)) answer(request);
            else if (open.delete(request)) account.forgotten++;
          }
        },
      });
      running.set(queue, virtqueue);
    },
    async queueStop(queue) {
      await running.get(queue)?.stop();
      running.delete(queue);
    },
    queueKick(queue) {
      running.get(queue)?.kick();
    },
  });
}

/** Where the ring could go on, or anywhere in it. */
function randomBase(driver: QueueDriver, random: Random): number {
  if (driver instanceof SplitDriver) {
    const near = driver.availableIndex - random.below(driver.queueSize + 1);
    return random.once(5) ? random.below(0x10000) : near & 0xffff;
  }
  const position = () =>
    random.below(driver.queueSize) | random.pick([0, 0x8000]);
  return (position() | position() << 16) >>> 0;
}

/** What a life is lived in, where it is not the usual. */
interface Place {
  readonly ram?: GuestRam;
  /** The rings are in use from here on, and until `leave`. */
  readonly enter?: () => void;
  readonly leave?: () => void;
}

async function live(
  world: World,
  random: Random,
  packed: boolean,
  { ram, enter, leave }: Place = {},
) {
  const guest: Guest = await VhostUserDevice.open({
    path: world.path,
    packed,
    ram,
    features: supportedFeatures &
      ~random.pick([0n, eventIdx, inOrder, eventIdx | inOrder]),
    queueSize: random.pick(packed ? [1, 5, 16, 128] : [1, 4, 16, 128]),
    ramSize: random.pick([1 << 16, 1 << 20]),
  });
  const [driver] = guest.queues;
  const scribbler = new Scribbler(driver, random);
  let reported = world.errors.length;
  enter?.();
  for (let step = 0; step < steps; step++) {
    for (let i = random.below(4); i > 0 && !driver.failure; i--) {
      scribbler.submit();
    }
    if (random.once(3)) scribbler.scribble();
    if (random.once(2)) driver.kick();
    if (random.once(3)) await turns(random.below(3));
    // A ring that either side has found broken is set up anew, or goes on.
    const isBroken = driver.failure !== undefined ||
      world.errors.length > reported;
    if (random.once(isBroken ? 4 : 12)) {
      await guest.stopQueue(0);
      reported = world.errors.length;
      const isReset = isBroken ? !random.once(5) : random.once(2);
      if (isReset) driver.reset();
      await guest.startQueue(0, {
        base: isReset && !random.once(5)
          ? driver.firstBase
          : randomBase(driver, random),
        polled: random.once(4),
      });
    }
  }
  leave?.();
  const { connection } = guest;
  // By the front door, or not.
  if (random.once(2)) connection.close();
  await guest.close();
  await world.ended(connection);
}

/** Lives one after the other; everything popped is accounted for after each. */
async function survive(
  random: Random,
  liveOnce: (world: World) => Promise<void>,
): Promise<void> {
  const account = new Account();
  await withBystander(async (world) => {
    for (let life = 0; life < lives; life++) {
      await liveOnce(world);
      await world.other.serve();
      const { popped, completed, late, forgotten } = account;
      assert.equal(popped, completed + late + forgotten, `life ${life}`);
    }
    // Neither all garbage nor none.
    assert.ok(account.completed > 50, `${account.completed} completed`);
    assert.ok(world.errors.length > 5, `${world.errors.length} errors`);
  }, {
    features: virtqueueFeatures | inOrder,
    device: device(account, random),
  });
}

for (const packed of [false, true]) {
  const name = packed ? "packed" : "split";
  for (const seed of seeds) {
    test(`rings corrupted while they run, ${name}, seed ${seed}`, async () => {
      const random = new Random(seed);
      await survive(random, (world) => live(world, random, packed));
    });
  }

  const seed = 99;
  test(`rings corrupted by another thread, ${name}, seed ${seed}`, async () => {
    const random = new Random(seed);
    const before = guestMemoryBytes();
    const ram = new GuestRam([{ size: 1 << 20 }]);
    // Rings, tables and buffers are allocated from the start on.
    const range = [0, 8192] as const;
    const thread = await ScribblingThread.start(
      ram.regions[0],
      [range],
      seed,
    );
    try {
      await survive(random, (world) =>
        live(world, random, packed, {
          ram,
          enter: () => thread.run(),
          leave: () => thread.pause(),
        }));
    } finally {
      await thread.end();
      ram.close();
    }
    assertGuestMemory(before);
  });
}
