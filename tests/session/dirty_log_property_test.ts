// Random traffic while the guest is migrated again and again: what the pages
// that are marked, and those that the guest itself wrote, bring to the
// destination must be the whole guest.

import assert from "node:assert/strict";
import {
  GuestRam,
  logPageSize,
  type QueueDriver,
  supportedFeatures,
} from "../../frontend/mod.ts";
import { type Request, requestOps, virtqueueFeatures } from "../../mod.ts";
import { Random } from "../hostile/random.ts";
import { test } from "../harness.ts";
import { within } from "../support/wait.ts";
import {
  allocatePages,
  formats,
  type Guest,
  pagesOf,
  ramSize,
  withLogged,
} from "./logged.ts";

const page = BigInt(logPageSize);
const inOrder = 1n << 35n;

/** Writes anywhere in what it may write, now or some turns later. */
function device(random: Random) {
  const scribble = (request: Request): number => {
    for (const view of request.writable) {
      for (let i = 0; i < 3; i++) {
        const at = random.below(view.length);
        view.set(random.bytes(random.below(view.length - at) % 40 + 1), at);
      }
    }
    // Whatever it says that it has written.
    return random.pick([0, 1, request.writableBytes]);
  };
  return () =>
    requestOps((request) => {
      if (random.once(3)) return scribble(request);
      return new Promise<number>((resolve) => {
        let turns = random.below(4);
        const later = () => {
          // Also early, long before it completes.
          if (turns === 2) scribble(request);
          if (turns-- > 0) setImmediate(later);
          else resolve(scribble(request));
        };
        later();
      });
    });
}

/** The source's log of its own writes, and the destination's memory. */
class Migration {
  readonly #guest: Guest;
  readonly #copy: Uint8Array;
  /** Pages that the guest writes all the time. */
  readonly #own = new Set<bigint>();

  constructor(guest: Guest) {
    this.#guest = guest;
    const [region] = guest.ram.regions;
    this.#copy = region.bytes.slice();
    for (const driver of guest.queues) {
      const { descriptor, available } = driver.ring.addresses;
      for (const start of pagesOf(descriptor, 16 * driver.queueSize)) {
        this.#own.add(start);
      }
      for (const start of pagesOf(available, 6 + 2 * driver.queueSize)) {
        this.#own.add(start);
      }
    }
  }

  /** A page that the guest has written. */
  own(pages: readonly bigint[]): void {
    for (const start of pages) this.#own.add(start);
  }

  /** Brings pages over. */
  send(pages: Iterable<bigint>): void {
    const [{ bytes }] = this.#guest.ram.regions;
    for (const start of pages) {
      const at = Number(start);
      this.#copy.set(bytes.subarray(at, at + logPageSize), at);
    }
  }

  /** After the stop: the rest of what the guest has written; all is there. */
  finish(): void {
    this.send(this.#own);
    const [{ bytes }] = this.#guest.ram.regions;
    const wrong: string[] = [];
    for (let at = 0; at < bytes.length; at += logPageSize) {
      const source = Buffer.from(bytes.subarray(at, at + logPageSize));
      if (source.compare(this.#copy, at, at + logPageSize) !== 0) {
        wrong.push(`0x${at.toString(16)}`);
      }
    }
    assert.deepEqual(wrong, [], "pages that were written and not marked");
  }
}

/** Memory where nothing shares a page: each has one writer. */
class PageRam extends GuestRam {
  onAllocate: ((address: bigint, size: number) => void) | undefined;

  override allocate(size: number): ReturnType<GuestRam["allocate"]> {
    const address = super.allocate(inPages(size), logPageSize);
    this.onAllocate?.(address, size);
    return address;
  }

  override free(address: bigint, size: number): void {
    super.free(address, inPages(size));
  }
}

function inPages(size: number): number {
  return Math.ceil(size / logPageSize) * logPageSize;
}

/** Memory for requests, of which none is ever moved. */
class Buffers {
  readonly #guest: Guest;
  readonly #readable: bigint;
  readonly #tables: bigint;
  readonly #free: bigint[] = [];

  constructor(guest: Guest, count: number) {
    this.#guest = guest;
    this.#readable = allocatePages(guest, 1);
    this.#tables = allocatePages(guest, 64);
    const first = allocatePages(guest, count);
    for (let i = 0; i < count; i++) this.#free.push(first + BigInt(i) * page);
  }

  get ownPages(): bigint[] {
    return [
      ...pagesOf(this.#readable, 4096),
      ...pagesOf(this.#tables, 64 * 4096),
    ];
  }

  /** A request of some buffers, each somewhere in one to three pages. */
  async send(driver: QueueDriver, random: Random): Promise<void> {
    const writable = 1 + random.below(5);
    const taken = this.#free.splice(0, writable);
    if (taken.length === 0) return;
    const buffers = taken.map((address) => {
      const offset = random.below(4096);
      return {
        address: address + BigInt(offset),
        length: 1 + random.below(4096 - offset),
        isWritable: true,
      };
    });
    await driver.submitChain([
      { address: this.#readable, length: 16, isWritable: false },
      ...buffers,
    ], { indirect: random.once(3), kick: random.below(3) > 0 });
    this.#free.push(...taken);
  }
}

for (const { name, packed } of formats) {
  for (const queueSize of packed ? [7, 64] : [8, 64]) {
    test(`${name}, ${queueSize} descriptors: every page that the device changed while it was logged is marked`, async () => {
      const random = new Random(queueSize);
      using ram = new PageRam([{ size: ramSize }]);
      const more = queueSize === 64 ? inOrder : 0n;
      const features = supportedFeatures | more;
      await withLogged({
        packed,
        features: virtqueueFeatures | more,
        device: device(random),
        queueCount: 2,
        guest: { queueCount: 2, queueSize, features, ram },
      }, async (guest) => {
        const buffers = new Buffers(guest, 300);
        let migration: Migration | undefined;
        // The driver allocates its indirect tables wherever it likes.
        ram.onAllocate = (address, size) =>
          migration?.own(pagesOf(address, size));
        const traffic = async (count: number) => {
          const sent = Array.from(
            { length: count },
            () => buffers.send(random.pick(guest.queues), random),
          );
          for (const driver of guest.queues) driver.notify();
          return await within(Promise.all(sent), "the requests");
        };
        for (let round = 0; round < 12; round++) {
          // Requests may be on their way when logging begins.
          const before = traffic(random.below(60));
          let log = await guest.startLog({ offset: random.below(3) * 100 });
          migration = new Migration(guest);
          migration.own(buffers.ownPages);
          await before;
          for (let pass = 0; pass < 4; pass++) {
            const during = traffic(random.below(60));
            if (random.once(2)) log = await guest.startLog();
            migration.send(log.take());
            if (random.once(2)) await during;
            else await Promise.all([during, guest.connection.barrier()]);
          }
          await guest.stop();
          migration.send(log.take());
          migration.finish();
          migration = undefined;
          for (const index of [0, 1]) await guest.startQueue(index);
          if (random.once(2)) await guest.stopLog();
        }
      });
    });
  }
}
