// Table E of the contract: what a migration needs of the rings and of the
// configuration space (rte_vhost2-contract.md section 1.5).

import assert from "node:assert/strict";
import {
  type QueueDriver,
  supportedFeatures,
  VhostUserDevice,
} from "../../frontend/mod.ts";
import type { SetConfigReason, TargetOps } from "../../mod.ts";
import { test } from "../harness.ts";
import { within } from "../support/wait.ts";
import { echo, opened, serving, withGuest } from "./served.ts";

test("E4: setConfig is told whether the driver writes or a migration restores", async () => {
  const reasons: SetConfigReason[] = [];
  const device = (): TargetOps => ({
    ...echo(),
    getConfig: () => new Uint8Array(8),
    setConfig: (_device, _offset, _data, reason) => void reasons.push(reason),
  });
  await withGuest({ device }, async ({ connection }) => {
    const data = Uint8Array.of(1);
    await connection.setConfig(0, data, { ack: true, flags: 0 });
    await connection.setConfig(0, data, { ack: true, flags: 1 });
    assert.deepEqual(reasons, ["frontend", "migration"]);
  });
});

for (const packed of [false, true]) {
  const name = packed ? "packed" : "split";
  test(`E5: a ${name} ring that stopped goes on in another device, from its base`, () =>
    serving({}, (source) =>
      serving({}, async (destination) => {
        const options = {
          features: supportedFeatures,
          start: false,
          queueSize: 8,
          ramSize: 1 << 20,
          packed,
        };
        const guest = await VhostUserDevice.open({
          ...options,
          path: source.path,
        });
        try {
          await guest.activate();
          await guest.startQueue(0);
          const [driver] = guest.queues;
          // Past the end of the ring: a wrap counter has turned.
          for (let i = 0; i < 11; i++) await echoes(driver, i);
          const base = await guest.stopQueue(0);
          const expected = packed
            // 22 of 8 descriptors: position 6, wrapped twice, both sides.
            ? 0x8006 * 0x1_0001
            : 11;
          assert.equal(base, expected);
          // Made available after the stop: the destination's.
          const left = echoes(driver, 100);
          await opened(destination, {
            ...options,
            ram: guest.ram,
            queueCount: 1,
          }, async (other) => {
            await other.activate();
            const { connection } = other;
            await connection.setVringNum(0, 8);
            await connection.setVringBase(0, base);
            await connection.setVringAddr(guest.vringAddress(0));
            await connection.setVringCall(0, driver.callFd);
            await connection.setVringKick(0, driver.kickFd);
            await other.enableQueue(0, true);
            await within(left, "the request that was left");
            for (let i = 0; i < 11; i++) await echoes(driver, i);
            const end = await connection.getVringBase(0);
            assert.equal(end, packed ? 0x0006 * 0x1_0001 : 23);
          });
        } finally {
          await guest.close();
        }
      })));
}

/** A request of two descriptors comes back with its bytes. */
async function echoes(driver: QueueDriver, seed: number): Promise<void> {
  const bytes = new Uint8Array(32).fill(seed);
  const { data } = await within(
    driver.submit({ readable: [bytes], writable: [32] }),
    `request ${seed}`,
  );
  assert.deepEqual(data[0], bytes);
}
