// RING_RESET and NOTIFICATION_DATA (virtio 1.3, 2.6.1 and 2.9), as far as they
// reach a vhost-user back-end: see virtqueue/features.ts.
import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import {
  type QueueDriver,
  supportedFeatures,
  VhostUserDevice,
} from "../../frontend/mod.ts";
import { featureMask, VirtioFeature, virtqueueFeatures } from "../../mod.ts";
import { test } from "../harness.ts";
import { within } from "../support/wait.ts";
import { type Guest, serving } from "./served.ts";

async function assertEchoes(driver: QueueDriver, kick = true): Promise<void> {
  const bytes = Uint8Array.from({ length: 40 }, (_, i) => i * driver.queueSize);
  const { written, data } = await within(
    driver.submit({ readable: [bytes], writable: [40], kick }),
    "the echo",
  );
  assert.equal(written, 40);
  assert.deepEqual(data, [bytes]);
}

const reset = featureMask(VirtioFeature.RING_RESET);
const notificationData = featureMask(VirtioFeature.NOTIFICATION_DATA);

for (const packed of [false, true]) {
  const name = packed ? "packed" : "split";
  const sizes = packed ? [16, 7, 300, 16, 2] : [16, 4, 256, 16, 2];

  test(`RING_RESET: a ${name} queue is reset, also to another size, while the other one runs`, async () => {
    await serving({
      features: virtqueueFeatures | reset,
      queueCount: 2,
    }, async ({ path }) => {
      await using guest: Guest = await VhostUserDevice.open({
        path,
        packed,
        features: supportedFeatures | reset,
        queueCount: 2,
        queueSize: 16,
        ramSize: 4 << 20,
      });
      assert.equal(guest.features & reset, reset);
      const other = guest.queues[1];
      let isResetting = true;
      const running = (async () => {
        let count = 0;
        for (; isResetting; count++) await assertEchoes(other);
        return count;
      })();
      try {
        for (const queueSize of sizes) {
          // Not at the start of its ring when it is reset.
          for (let i = 0; i < 19; i++) await assertEchoes(guest.queues[0]);
          const driver = await guest.resetQueue(0, { queueSize });
          assert.equal(driver.queueSize, queueSize);
          assert.equal(guest.queues[0], driver);
          await guest.startQueue(0);
          for (let i = 0; i < 2 * queueSize + 3; i++) {
            if (i === 40) break;
            await assertEchoes(driver);
          }
        }
      } finally {
        isResetting = false;
      }
      assert.ok(await running > 0);
      assert.deepEqual(other.strays, []);
    });
  });

  test(`NOTIFICATION_DATA: whatever number a kick of a ${name} queue carries, the ring is looked at`, async () => {
    await serving({
      features: virtqueueFeatures | notificationData,
    }, async ({ path }) => {
      await using guest: Guest = await VhostUserDevice.open({
        path,
        packed,
        features: supportedFeatures | notificationData,
        ramSize: 1 << 20,
      });
      assert.equal(guest.features & notificationData, notificationData);
      const [driver] = guest.queues;
      for (let i = 0; i < 20; i++) {
        const answer = assertEchoes(driver, false);
        // The guest's queue, offset and wrap counter end with the front-end,
        // which may pass on an eventfd's number made of them, or 1.
        for (let j = 0; j <= i; j++) core.eventfdSignal(driver.kickFd);
        await answer;
      }
    });
  });
}
