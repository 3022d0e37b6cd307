// IN_ORDER, our device against our driver: completions in any order come back
// in the order of the requests, and one used element stands for many.
import assert from "node:assert/strict";
import {
  PackedDriver,
  SplitDriver,
  supportedFeatures,
  VhostUserDevice,
} from "../../frontend/mod.ts";
import {
  featureMask,
  type Request,
  VirtioFeature,
  virtqueueFeatures,
} from "../../mod.ts";
import { test } from "../harness.ts";
import { eventually, within } from "../support/wait.ts";
import { type Guest, serving } from "./served.ts";

const features = virtqueueFeatures | featureMask(VirtioFeature.IN_ORDER);

test("IN_ORDER is offered by those who ask for it alone", async () => {
  assert.equal(virtqueueFeatures & featureMask(VirtioFeature.IN_ORDER), 0n);
  for (const offered of [virtqueueFeatures, features]) {
    await serving({ features: offered }, async ({ path }) => {
      await using guest = await VhostUserDevice.open({
        path,
        ramSize: 1 << 20,
      });
      assert.equal(
        guest.features & featureMask(VirtioFeature.IN_ORDER),
        offered & featureMask(VirtioFeature.IN_ORDER),
      );
    });
  }
});

/** Where the device wrote used elements, since `forget`. */
function usedElements(driver: Guest["queues"][number]) {
  if (driver instanceof SplitDriver) {
    const { ram, ring, queueSize } = driver;
    const bytes = ram.bytes(ring.addresses.used, 4 + 8 * queueSize);
    const ids = new DataView(bytes.buffer, bytes.byteOffset + 4);
    return {
      forget() {
        for (let i = 0; i < queueSize; i++) ids.setUint32(8 * i, 0xeeee, true);
      },
      count: () =>
        Array.from({ length: queueSize }, (_, i) => ids.getUint32(8 * i, true))
          .filter((id) => id !== 0xeeee).length,
    };
  }
  assert.ok(driver instanceof PackedDriver);
  const { ring, queueSize } = driver;
  return {
    forget() {},
    // All became available in one lap: those not overwritten still say so.
    count: () =>
      Array.from({ length: queueSize }, (_, i) => ring.flags(i))
        .filter((flags) => (flags & 0x8080) === 0x8080).length,
  };
}

for (const packed of [false, true]) {
  const name = packed ? "packed" : "split";
  test(`IN_ORDER: one used element of a ${name} ring returns all requests that were written completely`, async () => {
    const open: [Request, (written: number) => void][] = [];
    await serving({
      features,
      handler: (request) =>
        new Promise<number>((resolve) => open.push([request, resolve])),
    }, async ({ path }) => {
      await using guest: Guest = await VhostUserDevice.open({
        path,
        packed,
        features: supportedFeatures,
        queueSize: 16,
        ramSize: 1 << 20,
      });
      const [driver] = guest.queues;
      const order: number[] = [];
      const elements = usedElements(driver);
      elements.forget();
      const requests = Array.from({ length: 8 }, (_, i) => {
        const sent = driver.submit({
          readable: [Uint8Array.of(i)],
          writable: [1 + i],
        });
        sent.then(() => order.push(i));
        return sent;
      });
      await eventually(() => open.length === 8, "all requests are popped");
      // From the last to the first: nothing comes back before the end. The
      // sixth is written a byte short, so that it ends a run.
      for (let i = 7; i >= 0; i--) {
        const [request, complete] = open[i];
        complete(request.writableBytes - (i === 5 ? 1 : 0));
      }
      const done = await within(Promise.all(requests), "all completions");
      assert.deepEqual(order, [0, 1, 2, 3, 4, 5, 6, 7]);
      assert.deepEqual(
        done.map(({ written }) => written),
        [1, 2, 3, 4, 5, 5, 7, 8],
      );
      assert.equal(elements.count(), 2);
      assert.equal(driver.freeDescriptors, 16);
    });
  });
}
