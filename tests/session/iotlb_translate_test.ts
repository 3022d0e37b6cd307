// `device.translate` by IOVA, the form that asks the front-end, and the areas
// of a queue for devices that process rings themselves.

import assert from "node:assert/strict";
import { ProtocolFeature } from "../../frontend/mod.ts";
import {
  type Device,
  featureMask,
  type Queue,
  type TargetOps,
  VirtioFeature,
} from "../../mod.ts";
import { test } from "../harness.ts";
import { Events, within } from "../support/wait.ts";
import { type Guest, pageOf, withIommu } from "./iommu_guest.ts";
import { type Served, withGuest } from "./served.ts";

const pageSize = 4096;
const base = 0x5_0000_0000n;

/** A device that leaves its queues alone, with one of them started. */
async function started(
  guest: Guest,
  { recording }: Served,
): Promise<{ device: Device; queue: Queue }> {
  await guest.activate();
  await guest.startQueue(0);
  await recording.completed("queueStart 0");
  return { device: recording.devices[0], queue: recording.queues.get(0)! };
}

const idle = (): TargetOps => ({ queueStart() {} });

test("translate takes IOVAs: a view as far as they lead on, null where nothing is permitted", async () => {
  await withIommu({ device: idle }, async (guest, served) => {
    const { device } = await started(guest, served);
    const { ram, iommu } = guest;
    const pages = ram.allocate(2 * pageSize, pageSize);
    const far = ram.allocate(2 * pageSize, pageSize) + 4096n;
    ram.bytes(pages, 2 * pageSize).fill(1);
    iommu.mapAt(base, pages, 2 * pageSize, "read");
    iommu.mapAt(base + 8192n, far, pageSize, "readWrite");
    assert.equal(device.translate(base, 1, "read"), null);
    for (let i = 0n; i < 3n; i++) await iommu.update(base + i * 4096n);
    const view = device.translate(base + 4000n, 10_000, "read")!;
    assert.equal(view.length, 4192);
    assert.ok(view.every((byte) => byte === 1));
    assert.equal(device.translate(base, 1, "write"), null);
    assert.equal(device.translate(base, 1), null);
    assert.equal(device.translate(base + 8192n, 10_000)?.length, 4096);
    assert.equal(device.translate(base + 8192n, 10, "write")?.length, 10);
    // Guest physical addresses mean nothing, nor do sums beyond 2^64.
    assert.equal(device.translate(0n, 1, "read"), null);
    assert.equal(device.translate((1n << 64n) - 1n, 100, "read"), null);
    assert.equal(device.translate(1n << 64n, 1, "read"), null);
    assert.equal(device.translate(base, 0, "read"), null);
    await iommu.unmapAt(base, pageSize);
    assert.equal(device.translate(base, 1, "read"), null);
    assert.equal(device.translate(base + 4096n, 1, "read")?.length, 1);
  });
});

test("translateAsync asks the front-end, for reads and for writes", async () => {
  await withIommu({ device: idle }, async (guest, served) => {
    const { device, queue } = await started(guest, served);
    const page = guest.ram.allocate(pageSize, pageSize);
    guest.iommu.mapAt(base, page, pageSize);
    const before = guest.iommu.misses;
    const view = await device.translateAsync(base + 8n, 4, "write", queue);
    view.set([1, 2, 3, 4]);
    assert.deepEqual([...guest.ram.read(page + 8n, 4)], [1, 2, 3, 4]);
    assert.equal(guest.iommu.misses, before + 1);
    // What is there needs no question; two that wait need one.
    await device.translateAsync(base, 100);
    assert.equal(guest.iommu.misses, before + 1);
    guest.iommu.mapAt(base + 4096n, page, pageSize);
    await Promise.all([
      device.translateAsync(base + 4096n, 4, "read"),
      device.translateAsync(base + 4100n, 4, "read", queue),
    ]);
    assert.equal(guest.iommu.misses, before + 2);
  });
});

test("translateAsync rejects what the front-end does not have, does not permit, or cannot be", async () => {
  await withIommu(
    { device: idle, errorsExpected: true },
    async (guest, served) => {
      const { device, queue } = await started(guest, served);
      await assert.rejects(device.translateAsync(base, 4, "read", queue), {
        code: "MEMORY",
        message: /has no translation/,
      });
      const page = guest.ram.allocate(pageSize, pageSize);
      guest.iommu.mapAt(base, page, pageSize, "read");
      guest.iommu.onMiss = async ({ iova }) => {
        await guest.iommu.update(iova);
        return 0n;
      };
      await assert.rejects(device.translateAsync(base, 4, "write"), {
        code: "MEMORY",
        message: /permits no write/,
      });
      assert.equal((await device.translateAsync(base, 4, "read")).length, 4);
      for (
        const [address, length] of [[base, 0], [-1n, 4], [
          1n << 64n,
          4,
        ]] as const
      ) {
        await assert.rejects(device.translateAsync(address, length), {
          code: "MEMORY",
        });
      }
    },
  );
});

test("translateAsync rejects when its queue stops, when all have, and when the connection closes", async () => {
  await withIommu({ device: idle }, async (guest, served) => {
    const { device, queue } = await started(guest, served);
    await guest.startQueue(1);
    await served.recording.completed("queueStart 1");
    const missed = new Events<bigint>();
    guest.iommu.onMiss = ({ iova }) => {
      if (pageOf(iova) !== base) return;
      missed.push(iova);
      return 0n;
    };
    const closed = { code: "CLOSED" };
    const ofQueue = device.translateAsync(base, 4, "read", queue);
    const ofDevice = device.translateAsync(base, 4, "write");
    const failing = assert.rejects(ofQueue, closed);
    await missed.next();
    await guest.stopQueue(0);
    await within(failing, "the rejection at the stop");
    await assert.rejects(device.translateAsync(base, 4, "read", queue), closed);
    const failingToo = assert.rejects(ofDevice, closed);
    await guest.stopQueue(1);
    await within(failingToo, "the rejection when all have stopped");
    await guest.startQueue(0);
    await served.recording.completed("queueStart 0", 2);
    const last = assert.rejects(device.translateAsync(base, 4), closed);
    await missed.next();
    guest.connection.close();
    await within(last, "the rejection at the close");
    await assert.rejects(device.translateAsync(base, 4), closed);
  });
});

test("translateAsync inside queueStop does not keep the queue from stopping", async () => {
  let device: Device;
  const ends = new Events<unknown>();
  await withIommu({
    device: (one) => {
      device = one;
      return {
        queueStart() {},
        async queueStop(queue) {
          await device.translateAsync(base, 4, "read", queue)
            .catch((error) => ends.push(error.code));
        },
      };
    },
  }, async (guest, served) => {
    await started(guest, served);
    guest.iommu.onMiss = () => 0n;
    await within(guest.stopQueue(0), "the stop");
    assert.equal(await ends.next(), "CLOSED");
  });
});

test("translateAsync rejects where the front-end cannot be asked", async () => {
  await withIommu(
    { device: idle, errorsExpected: true },
    async (guest, served) => {
      const { device } = await started(guest, served);
      const bit = featureMask(ProtocolFeature.BACKEND_REQ);
      await guest.connection.setProtocolFeatures(guest.protocolFeatures & ~bit);
      await guest.connection.barrier();
      await assert.rejects(device.translateAsync(base, 4), {
        code: "PROTOCOL",
      });
    },
  );
});

test("without ACCESS_PLATFORM both forms take guest physical addresses", async () => {
  await withGuest({}, async (guest, { recording }) => {
    await guest.activate();
    await guest.connection.barrier();
    const [device] = recording.devices;
    assert.equal(device.translate(0x1000n, 8, "write")?.length, 8);
    assert.equal((await device.translateAsync(0x1000n, 8)).length, 8);
    await assert.rejects(device.translateAsync(1n << 40n, 8), {
      code: "MEMORY",
    });
  });
});

test("a queue's areas move with the IOMMU, and are empty while they are not mapped", async () => {
  const features = featureMask(VirtioFeature.ACCESS_PLATFORM);
  await withIommu({ features, device: idle }, async (guest, served) => {
    const { queue } = await started(guest, served);
    const { iommu, ram } = guest;
    assert.equal(queue.descriptorTable.length, 256);
    assert.equal(queue.availableRing.length, 38);
    assert.equal(queue.usedRing.length, 134);
    const area = pageOf(guest.queues[0].deviceAddresses.used);
    await iommu.unmapAt(area, pageSize);
    assert.equal(queue.usedRing.length, 0);
    const moved = ram.allocate(pageSize, pageSize);
    iommu.mapAt(area, moved, pageSize);
    await iommu.update(area);
    queue.usedRing.fill(0x5a);
    const offset = guest.queues[0].deviceAddresses.used - area;
    assert.ok(ram.read(moved + offset, 134).every((byte) => byte === 0x5a));
  });
});
