// What is logged of the rings themselves (vhost-user-spec.md section 1.5
// "Log"): by each ring's VHOST_VRING_F_LOG, at log_guest_addr.

import assert from "node:assert/strict";
import { VRING_FLAG_LOG } from "../../protocol/payloads.ts";
import { gpa } from "../../protocol/address.ts";
import { DirtyLog, supportedFeatures } from "../../frontend/mod.ts";
import { test } from "../harness.ts";
import { eventually } from "../support/wait.ts";
import {
  allocatePages,
  ask,
  assertPages,
  formats,
  type Guest,
  withLogged,
} from "./logged.ts";

const eventIdx = 1n << 29n;
/** Beyond the guest's memory, inside the log. */
const elsewhere = 0x4000_0000n;
const end = 0x8000_0000n;

/** An ADDR message for the running queue. */
async function address(
  guest: Guest,
  flags: number,
  log: bigint,
  index = 0,
): Promise<void> {
  await guest.connection.setVringAddr({
    ...guest.vringAddress(index),
    flags,
    log: gpa(log),
  }, { ack: true });
}

for (const { name, packed } of formats) {
  test(`${name}: a ring is logged by its own flag alone, at log_guest_addr, which no region holds`, async () => {
    await withLogged({ packed }, async (guest, { recording }) => {
      using log = new DirtyLog({ end });
      await guest.connection.setLogBase(log);
      const pages = allocatePages(guest, 1);
      await ask(guest, pages);
      assertPages(log, []);
      // LOG_ALL stays off: the buffers are not marked.
      await address(guest, VRING_FLAG_LOG, elsewhere);
      await ask(guest, pages);
      const { descriptor } = guest.queues[0].ring.addresses;
      await eventually(() => log.isDirty(elsewhere), "the ring is marked");
      const marked = log.take();
      const expected = packed ? [descriptor & ~0xfffn, elsewhere] : [elsewhere];
      for (const page of marked) assert.ok(expected.includes(page), `${page}`);
      if (packed) assert.ok(marked.includes(descriptor & ~0xfffn));
      await address(guest, 0, elsewhere);
      await guest.connection.barrier();
      log.take();
      await ask(guest, pages);
      await guest.stop();
      assertPages(log, []);
      assert.equal(recording.count("queueStart 0"), 1);
    });
  });

  test(`${name}: an ADDR that changes only the log acts on the running queue`, async () => {
    await withLogged({ packed }, async (guest, { recording }) => {
      using log = new DirtyLog({ end });
      await guest.connection.setLogBase(log);
      const pages = allocatePages(guest, 1);
      for (let round = 1n; round <= 5n; round++) {
        const there = elsewhere + 0x10000n * round;
        await address(guest, VRING_FLAG_LOG, there);
        log.take();
        await ask(guest, pages);
        await eventually(() => log.isDirty(there), "the ring is marked");
        assert.ok(!log.isDirty(there - 0x10000n));
      }
      assert.equal(recording.count("queueStart 0"), 1);
    });
  });

  test(`${name}: one ring is logged, the other is not`, async () => {
    await withLogged(
      { packed, queueCount: 2, guest: { queueCount: 2 } },
      async (guest) => {
        using log = new DirtyLog({ end });
        await guest.connection.setLogBase(log);
        await address(guest, VRING_FLAG_LOG, elsewhere, 1);
        const pages = allocatePages(guest, 1);
        log.take();
        await ask(guest, pages, 1, { queue: 0 });
        assertPages(log, []);
        await ask(guest, pages, 1, { queue: 1 });
        await eventually(() => log.isDirty(elsewhere), "queue 1 is marked");
      },
    );
  });
}

test("split: avail_event is marked behind the used elements, used.flags at the start", async () => {
  for (const features of [supportedFeatures, supportedFeatures & ~eventIdx]) {
    // 1024 elements take more than two pages.
    const options = { guest: { queueSize: 1024, features } };
    await withLogged(options, async (guest) => {
      using log = new DirtyLog({ end });
      await guest.connection.setLogBase(log);
      await address(guest, VRING_FLAG_LOG, elsewhere);
      await ask(guest, allocatePages(guest, 1));
      const event = (guest.features & eventIdx) !== 0n
        ? elsewhere + 0x2000n
        : elsewhere;
      await eventually(() => log.isDirty(event), "the wish is marked");
      await guest.stop();
      for (const page of log.take()) {
        assert.ok(page === elsewhere || page === event, `${page}`);
      }
    });
  }
});

test("an address at the end of all addresses marks nothing and breaks nothing", async () => {
  for (const { packed } of formats) {
    await withLogged({ packed }, async (guest) => {
      using log = new DirtyLog({ end });
      await guest.connection.setLogBase(log);
      for (const there of [2n ** 64n - 1n, 2n ** 64n - 6n, end, end - 1n]) {
        await address(guest, VRING_FLAG_LOG, there);
        await ask(guest, allocatePages(guest, 1));
      }
      await guest.stop();
      const { descriptor } = guest.queues[0].ring.addresses;
      const last = end - 0x1000n;
      for (const page of log.take()) {
        assert.ok(page === last || packed && page === (descriptor & ~0xfffn));
      }
    });
  }
});
