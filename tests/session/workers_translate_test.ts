// `device.translateAsync` in Workers: the registering thread asks, the Worker
// looks through views of its own.

import assert from "node:assert/strict";
import type { Iommu, VhostUserDevice } from "../../frontend/mod.ts";
import { test } from "../harness.ts";
import { Events, within } from "../support/wait.ts";
import { pageOf } from "./iommu_guest.ts";
import { opened } from "./served.ts";
import { Word } from "./worker_device.ts";
import {
  ask,
  assertServes,
  servingInWorkers,
  type WorkerWorld,
} from "./worker_world.ts";

const pageSize = 4096;
const base = 0x5_0000_0000n;

interface World extends WorkerWorld {
  readonly guest: VhostUserDevice;
  readonly iommu: Iommu;
  /** Misses of `base`'s page. */
  readonly missCount: number;
  /** The same; unanswered from when this is first read. */
  readonly missed: Events<bigint>;
  /** A page with `fill` in it, to which `base` leads. */
  map(fill: number, access?: "read" | "readWrite"): bigint;
}

/** Two queues in two Workers behind an IOMMU, all started. */
function world(
  body: (world: World) => Promise<void>,
  options: { readonly errorsExpected?: boolean } = {},
): Promise<void> {
  return servingInWorkers(
    { queueCount: 2, ...options },
    (world) =>
      opened(world, { queueCount: 2, iommu: true }, async (guest) => {
        const iommu = guest.iommu!;
        const missed = new Events<bigint>();
        let isHeld = false;
        let count = 0;
        iommu.onMiss = ({ iova }) => {
          if (pageOf(iova) !== base) return;
          count++;
          if (!isHeld) return;
          missed.push(iova);
          return 0n;
        };
        await guest.start();
        await body({
          ...world,
          guest,
          iommu,
          get missCount() {
            return count;
          },
          get missed() {
            isHeld = true;
            return missed;
          },
          map(fill, access = "readWrite") {
            const page = guest.ram.allocate(pageSize, pageSize);
            guest.ram.bytes(page, pageSize).fill(fill);
            iommu.mapAt(base, page, pageSize, access);
            return page;
          },
        });
      }),
  );
}

test("in a Worker translateAsync asks the front-end, for reads and for writes", () =>
  world(async (world) => {
    const { guest } = world;
    const page = world.map(9);
    assert.equal(await ask(guest, `translate ${base} read`), "9,9,9,9,9,9,9,9");
    assert.equal(
      await ask(guest, `translate ${base + 8n} write device`, 1),
      Array(8).fill(0x77).join(),
    );
    const written = guest.ram.read(page, 24);
    assert.deepEqual([...written.subarray(8, 16)], Array(8).fill(0x77));
    assert.ok(written.subarray(16).every((byte) => byte === 9));
    // What is there needs no question, whichever Worker had asked.
    await ask(guest, `translate ${base} readWrite`, 1);
    assert.equal(world.missCount, 1);
  }));

test("in a Worker translateAsync waits for an answer that comes later, and its queue goes on meanwhile", () =>
  world(async ({ guest, iommu, map, missed, reached }) => {
    const waiting = [
      ask(guest, `translate ${base} read`),
      ask(guest, `translate ${base + 1n} read device`),
      ask(guest, `translate ${base + 2n} read device`, 1),
    ];
    await missed.next();
    await reached(Word.held, 3);
    await assertServes(guest, 0);
    await assertServes(guest, 1);
    map(5);
    await iommu.update(base);
    const fives = Array(8).fill(5).join();
    assert.deepEqual(await Promise.all(waiting), [fives, fives, fives]);
  }));

test("in a Worker translateAsync rejects what the front-end does not have, or does not permit", () =>
  world(async ({ guest, map }) => {
    assert.equal(await ask(guest, `translate ${base} read`), "MEMORY");
    map(1, "read");
    assert.equal(await ask(guest, `translate ${base} write`), "MEMORY");
    assert.equal(
      await ask(guest, `translate ${base} read device`, 1),
      Array(8).fill(1).join(),
    );
    assert.equal(await ask(guest, `translate ${1n << 64n} read`), "MEMORY");
  }, { errorsExpected: true }));

test("in a Worker translateAsync rejects when its queue stops, which does not wait for it", () =>
  world(async ({ guest, missed, words, reached }) => {
    const waiting = ask(guest, `translate ${base} read`);
    await missed.next();
    await within(guest.stopQueue(0), "the stop");
    assert.equal(await waiting, "CLOSED");
    await assertServes(guest, 1);
    await guest.startQueue(0);
    await reached(Word.starts, 3);
    assert.equal(words[Word.refused], 1);
    await assertServes(guest, 0);
  }));

test("in a Worker translateAsync rejects when the connection closes", () =>
  world(async ({ guest, missed, reached }) => {
    ask(guest, `translate ${base} read`).catch(() => {});
    await missed.next();
    guest.connection.close();
    await reached(Word.refused, 1);
  }));

test("in a Worker translateAsync finds a region that was added while it waited", () =>
  world(async ({ guest, iommu, missed, reached }) => {
    const waiting = ask(guest, `translate ${base} write`);
    await missed.next();
    await reached(Word.held, 1);
    const region = guest.ram.addRegion({ size: 1 << 20 });
    await guest.addRegion(region);
    iommu.mapAt(base, region.gpa, pageSize);
    await iommu.update(base);
    assert.equal(await waiting, Array(8).fill(0x77).join());
    assert.deepEqual(
      [...guest.ram.read(region.gpa, 8)],
      Array(8).fill(0x77),
    );
  }));
