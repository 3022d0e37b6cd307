// Packed rings through a session: sizes, alignment, bases (row A17 of the
// contract), event suppression, and a disk over them.
import assert from "node:assert/strict";
import {
  BlkClient,
  hasFeature,
  supportedFeatures,
  VhostUserDevice,
  VirtioFeature,
} from "../../frontend/mod.ts";
import { EventFlag } from "../../frontend/mod.ts";
import { blkDevice, memoryBacking, registerTarget } from "../../mod.ts";
import { test } from "../harness.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { within } from "../support/wait.ts";
import { type PackedGuest, serving, withPacked } from "./served.ts";

const acked = { ack: true };

async function assertWorks(guest: PackedGuest, index = 0): Promise<void> {
  const { written, data } = await within(
    guest.queues[index].submit({
      readable: [Uint8Array.of(1, 2, 3), Uint8Array.of(4)],
      writable: [2, 8],
    }),
    "a request",
  );
  assert.equal(written, 4);
  assert.deepEqual([...data[0], ...data[1]], [1, 2, 3, 4, 0, 0, 0, 0, 0, 0]);
}

test("virtqueueFeatures offers RING_PACKED, and it is negotiated when asked for", async () => {
  await serving({}, async (served) => {
    await withPacked(served, {}, async (guest) => {
      assert.ok(hasFeature(guest.features, VirtioFeature.RING_PACKED));
      await assertWorks(guest);
    });
    const split = await VhostUserDevice.open({
      path: served.path,
      features: ~0n,
    });
    assert.ok(!hasFeature(split.features, VirtioFeature.RING_PACKED));
    await split.close();
  });
  await serving({ features: 0n }, async ({ path }) => {
    await assert.rejects(
      VhostUserDevice.open({ path, packed: true }),
      /the device does not offer RING_PACKED/,
    );
  });
});

test("A17: a packed ring starts with both wrap counters set when no base is given", async () => {
  await serving({}, async (served) => {
    await withPacked(served, { start: false }, async (guest) => {
      await guest.activate();
      const { connection, queues: [driver] } = guest;
      assert.equal(await connection.getVringBase(0), 0x8000_8000);
      await connection.setVringNum(0, driver.queueSize, acked);
      await connection.setVringAddr(guest.vringAddress(0), acked);
      await connection.setVringCall(0, driver.callFd, acked);
      await connection.setVringKick(0, driver.kickFd, acked);
      await connection.setVringEnable(0, true, acked);
      driver.kick();
      await assertWorks(guest);
      // Four descriptors of 16 are used.
      assert.equal(await connection.getVringBase(0), 0x8004_8004);
      assert.equal(await connection.getVringBase(0), 0x8004_8004);
    });
  });
});

test("A17: a base is 15 bits of position and a wrap counter, twice, and goes round", async () => {
  await serving({}, async (served) => {
    // Lap after lap: 4 descriptors of 6 at a time.
    await withPacked(served, { queueSize: 6 }, async (guest) => {
      const [driver] = guest.queues;
      let slot = 0;
      let wrap = 0x8000;
      for (let round = 0; round < 12; round++) {
        await assertWorks(guest);
        slot += 4;
        if (slot >= 6) {
          slot -= 6;
          wrap ^= 0x8000;
        }
        const base = await guest.stopQueue(0);
        assert.equal(base, (slot | wrap) + (slot | wrap) * 0x1_0000);
        assert.equal(driver.availablePosition, slot | wrap);
        assert.equal(driver.usedPosition, slot | wrap);
        await guest.startQueue(0, { base });
      }
    });
  });
});

test("A17: a base outside the ring is refused, by SET_VRING_BASE or at the start", async () => {
  await serving({}, async (served) => {
    await withPacked(served, { start: false }, async (guest) => {
      await guest.activate();
      const { connection } = guest;
      await connection.setVringNum(0, 16, acked);
      for (const base of [16, 0x8010_8000, 0x7fff_8000, 0xffff_ffff]) {
        await assert.rejects(connection.setVringBase(0, base, acked));
        assert.match((await served.errors.next()).message, /outside a ring/);
      }
      // The size may come after the base.
      await connection.setVringBase(0, 0x000f_800f, acked);
      await connection.setVringNum(0, 8, acked);
      await connection.setVringAddr(guest.vringAddress(0), acked);
      await connection.setVringKick(0, guest.queues[0].kickFd, acked);
      await connection.setVringEnable(0, true, acked);
      assert.match(
        (await served.errors.next()).message,
        /Cannot process queue 0: its base 0xf800f.*EINVAL/,
      );
      await guest.startQueue(0, { base: 0x8000_8000 });
      await assertWorks(guest);
    });
  });
});

test("a packed ring may have any size up to 32768, a split one a power of two", async () => {
  await serving({}, async (served) => {
    for (const queueSize of [4, 7, 1000, 32767, 32768]) {
      await withPacked(served, { queueSize }, async (guest) => {
        await assertWorks(guest);
        await assertWorks(guest);
      });
    }
    await withPacked(served, { start: false }, async (guest) => {
      await guest.activate();
      for (const size of [0, 32769, 65536]) {
        await assert.rejects(guest.connection.setVringNum(0, size, acked));
        assert.match((await served.errors.next()).message, /from 1 to 32768/);
      }
    });
    const split = await VhostUserDevice.open({
      path: served.path,
      start: false,
    });
    await split.activate();
    await assert.rejects(split.connection.setVringNum(0, 7, acked));
    assert.match((await served.errors.next()).message, /not a power of two/);
    await split.close();
  });
});

test("a packed ring's areas are aligned to 16, 4 and 4 bytes, and need no more than 4 for the latter two", async () => {
  await serving({}, async (served) => {
    await withPacked(served, { start: false }, async (guest) => {
      await guest.activate();
      const { connection } = guest;
      await connection.setVringNum(0, 16, acked);
      const address = guest.vringAddress(0);
      const [region] = guest.ram.regions;
      const end = region.uva + BigInt(region.size);
      const set = (part: "descriptor" | "available" | "used", value: bigint) =>
        connection.setVringAddr({ ...address, [part]: value }, acked);
      await set("available", end - 4n);
      await set("used", end - 4n);
      await set("descriptor", end - 256n);
    });
  });
});

test("the device of a packed ring wants no kicks while it works, and one when it rests", async () => {
  await serving({}, async (served) => {
    await withPacked(served, { queueSize: 64 }, async (guest) => {
      const [driver] = guest.queues;
      await assertWorks(guest);
      // Once it rests, it names the position from which on it wants to know.
      const rests = async () => {
        while (driver.ring.deviceEvent.flags !== EventFlag.DESCRIPTOR) {
          await new Promise((resolve) => setImmediate(resolve));
        }
      };
      await within(rests(), "the device rests");
      assert.equal(driver.ring.deviceEvent.position, driver.availablePosition);
      const before = driver.kicks;
      await Promise.all(Array.from({ length: 200 }, () => assertWorks(guest)));
      assert.ok(driver.kicks > before);
      assert.ok(driver.kicks - before < 100, `${driver.kicks - before} kicks`);
    });
  });
});

test("a disk works over packed rings, direct and indirect, on several queues", async () => {
  using folder = new TemporaryFolder();
  await withoutDescriptorLeak(async () => {
    const path = folder.file("socket");
    const target = await registerTarget({
      transport: "vhost-user",
      address: path,
      ...blkDevice({ backing: memoryBacking(8 << 20), numQueues: 2 }),
    });
    const disk = await BlkClient.open({
      path,
      packed: true,
      queueCount: 2,
      queueSize: 11,
    });
    assert.ok(hasFeature(disk.device.features, VirtioFeature.RING_PACKED));
    await Promise.all(Array.from({ length: 300 }, async (_, i) => {
      const indirect = i % 2 === 0;
      const data = new Uint8Array(4096).fill(i + 1);
      await disk.write(4096 * i, data, { indirect });
      assert.deepEqual(await disk.read(4096 * i, 4096, { indirect }), data);
    }));
    await disk.flush();
    await disk.close();
    await target.unregister();
  });
});

test("a front-end that closes with packed requests in flight leaves nothing behind", async () => {
  let release = (): void => {};
  const held = new Promise<void>((resolve) => release = resolve);
  await serving({ handler: () => held.then(() => 0) }, async (served) => {
    await withPacked(served, { features: supportedFeatures }, async (guest) => {
      const open = [1, 2, 3].map(() =>
        guest.queues[0].submit({ writable: [4] })
      );
      setImmediate(release);
      await within(Promise.all(open), "held requests");
    });
  });
});
