// Poll mode: SET_VRING_KICK without a descriptor (bit 8). Nobody kicks, and
// the driver is told that nobody need.
import assert from "node:assert/strict";
import { supportedFeatures, VhostUserDevice } from "../../frontend/mod.ts";
import { test } from "../harness.ts";
import { within } from "../support/wait.ts";
import { type Guest, serving } from "./served.ts";

const eventIdx = 1n << 29n;

for (const packed of [false, true]) {
  const name = packed ? "packed" : "split";
  for (const features of [supportedFeatures, supportedFeatures & ~eventIdx]) {
    const how = features & eventIdx ? "with EVENT_IDX" : "without EVENT_IDX";
    test(`a polled ${name} queue ${how} serves without a kick, before and after kicked runs`, async () => {
      await serving({}, async ({ path }) => {
        await using guest: Guest = await VhostUserDevice.open({
          path,
          packed,
          features,
          queueSize: 8,
          ramSize: 1 << 20,
          start: false,
        });
        await guest.activate();
        const [driver] = guest.queues;
        const exchange = async (count: number, kick: boolean) => {
          for (let i = 0; i < count; i++) {
            const bytes = Uint8Array.of(i, count);
            const { data } = await within(
              driver.submit({ readable: [bytes], writable: [2], kick }),
              "an answer",
            );
            assert.deepEqual(data, [bytes]);
          }
        };
        for (let run = 0; run < 4; run++) {
          const polled = run % 2 === 0;
          await guest.startQueue(0, { polled });
          const before = driver.kicks;
          await exchange(21, !polled);
          if (polled) {
            // A driver that asks need not kick, but for an event of before.
            await exchange(21, true);
            assert.ok(driver.kicks <= before + 1, `${driver.kicks} kicks`);
          }
          // In flight, and in the ring, when it stops.
          const last = Array.from({ length: 9 }, () => exchange(1, !polled));
          await guest.stopQueue(0);
          await guest.startQueue(0, { polled: true });
          await Promise.all(last);
          await guest.stopQueue(0);
        }
        assert.deepEqual(driver.strays, []);
        assert.equal(driver.freeDescriptors, driver.queueSize);
      });
    });
  }
}
