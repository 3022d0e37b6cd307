// A device that processes split rings in plain TypeScript, with the queue's
// three areas, `translate` and `call`, and nothing of `virtqueue/`.

import assert from "node:assert/strict";
import { serveEcho } from "../../examples/plain_ring.ts";
import { featureMask, hasFeature, VirtioFeature } from "../../mod.ts";
import { test } from "../harness.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { assertWorks, opened } from "./served.ts";
import type { VhostUserDevice } from "../../frontend/mod.ts";
import { within } from "../support/wait.ts";

async function withPlainEcho(
  body: (guest: VhostUserDevice) => Promise<void>,
): Promise<void> {
  using folder = new TemporaryFolder();
  await withoutDescriptorLeak(async () => {
    const path = folder.file("socket");
    await using _target = await serveEcho(path);
    await opened({ path }, { queueCount: 1, queueSize: 8 }, body);
  });
}

test("plain TypeScript answers requests, more than the ring has room for, round its end", async () => {
  await withPlainEcho(async (guest) => {
    await guest.start();
    for (let i = 0; i < 20; i++) await assertWorks(guest);
    await Promise.all(Array.from({ length: 50 }, () => assertWorks(guest)));
    assert.equal(await guest.stopQueue(0), 70);
  });
});

test("plain TypeScript is offered no ring feature that it has not asked for", async () => {
  await withPlainEcho(async (guest) => {
    const offered = await guest.connection.getFeatures();
    assert.equal(
      offered,
      featureMask(
        VirtioFeature.VERSION_1,
        VirtioFeature.PROTOCOL_FEATURES,
        VirtioFeature.LOG_ALL,
      ),
    );
    assert.equal(
      hasFeature(guest.features, VirtioFeature.RING_EVENT_IDX),
      false,
    );
  });
});

test("plain TypeScript stops and goes on where it was", async () => {
  await withPlainEcho(async (guest) => {
    await guest.start();
    for (let round = 1; round <= 3; round++) {
      await assertWorks(guest);
      assert.equal(await guest.stopQueue(0), round);
      await guest.startQueue(0);
    }
    await assertWorks(guest);
  });
});

test("plain TypeScript reads buffers that cross from one region to the next", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("socket");
  await using _target = await serveEcho(path);
  const regions = [{ size: 0x10000 }, { size: 0x10000, gpa: 0x10000n }];
  await opened(
    { path },
    { queueCount: 1, regions, ramSize: undefined },
    async (guest) => {
      await guest.start();
      const [low, high] = guest.ram.regions;
      low.bytes.set([1, 2], 0xfffe);
      high.bytes.set([3, 4], 0);
      const written = await within(
        guest.queues[0].submitChain([
          { address: 0xfffen, length: 4, isWritable: false },
          { address: 0x18000n, length: 4, isWritable: true },
        ]),
        "the request",
      );
      assert.equal(written, 4);
      assert.deepEqual(
        high.bytes.slice(0x8000, 0x8004),
        Uint8Array.of(1, 2, 3, 4),
      );
    },
  );
});

test("plain TypeScript logs what it writes, buffers and used ring", async () => {
  await withPlainEcho(async (guest) => {
    await guest.start();
    const { used } = guest.queues[0].ring.addresses;
    const log = await guest.startLog();
    const address = guest.ram.allocate(3 * 4096, 4096);
    guest.ram.write(address, Uint8Array.of(7));
    const ask = () =>
      within(
        guest.queues[0].submitChain([
          { address, length: 1, isWritable: false },
          { address: address + 0x1fffn, length: 2, isWritable: true },
        ]),
        "the request",
      );
    const written = [address + 0x1000n, address + 0x2000n];
    await ask();
    const page = used & ~0xfffn;
    assert.deepEqual(log.take(), [page, ...written]);
    await guest.startLog({ rings: false });
    await ask();
    // A new log takes over what the one before had marked.
    const rings = await guest.startLog({ buffers: false });
    assert.deepEqual(rings.take(), written);
    await ask();
    assert.deepEqual(rings.take(), [page]);
    await guest.stopLog();
  });
});
