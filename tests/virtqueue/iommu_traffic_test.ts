// Random valid traffic behind an IOMMU that never rests, in both formats:
// every buffer is mapped for one request, at addresses that are used again,
// while anything that was told is taken back at random, the rings' own pages
// too. What comes back is known when a request is sent.
import assert from "node:assert/strict";
import {
  type Iommu,
  type QueueDriver,
  supportedFeatures,
  VhostUserDevice,
} from "../../frontend/mod.ts";
import type { Request } from "../../mod.ts";
import { Random } from "../hostile/random.ts";
import { test } from "../harness.ts";
import { within } from "../support/wait.ts";
import { serving } from "./served.ts";

type Guest = VhostUserDevice<QueueDriver> & { readonly iommu: Iommu };

const pageSize = 4096;
const queueCount = 2;

/** What the device answers: each byte turned, from the last to the first. */
function answerTo(input: Uint8Array): Uint8Array<ArrayBuffer> {
  return Uint8Array.from(input.toReversed(), (byte) => byte ^ 0x5a);
}

/** At once, or some turns of the event loop later, in any order. */
function device(random: Random) {
  return (request: Request): number | Promise<number> => {
    const answer = answerTo(request.read());
    if (random.once(3)) return request.write(answer);
    return new Promise((resolve) => {
      let turns = random.below(4);
      const later = () => {
        if (turns-- > 0) setImmediate(later);
        else resolve(request.write(answer));
      };
      later();
    });
  };
}

async function send(driver: QueueDriver, random: Random): Promise<void> {
  const input = random.bytes(1 + random.below(random.pick([64, 6000])));
  const cut = random.below(input.length);
  const { written, data } = await driver.submit({
    readable: cut === 0
      ? [input]
      : [input.subarray(0, cut), input.subarray(cut)],
    writable: random.once(2)
      ? [input.length]
      : [1, Math.max(1, input.length - 1)],
    indirect: random.once(2),
  });
  assert.equal(written, input.length);
  const all = new Uint8Array(data.flatMap((bytes) => [...bytes]));
  assert.deepEqual(all.subarray(0, written), answerTo(input));
}

/** Takes anything back, and has rings change their place. */
async function disturb(
  guest: Guest,
  random: Random,
  isRunning: () => boolean,
): Promise<void> {
  const { iommu, queues } = guest;
  const rings = queues.flatMap(({ deviceAddresses }) =>
    Object.values(deviceAddresses)
  );
  const lowest = rings.reduce((a, b) => a < b ? a : b);
  const start = lowest - lowest % BigInt(pageSize);
  while (isRunning()) {
    const page = random.once(4)
      ? random.pick(rings)
      : start + BigInt(random.below(200) * pageSize);
    await iommu.invalidate(
      page - BigInt(random.below(pageSize)),
      BigInt(1 + random.below(4 * pageSize)),
    );
    if (random.once(3)) {
      await iommu.update(page);
    }
    for (let i = random.below(3); i > 0; i--) {
      await new Promise((resolve) => setImmediate(resolve));
    }
  }
}

for (const [name, packed] of [["split", false], ["packed", true]] as const) {
  test(`${name}: traffic behind an IOMMU that takes back and moves brings each request back once`, async () => {
    const random = new Random(packed ? 2 : 1);
    await serving({ handler: device(random), queueCount }, async ({ path }) => {
      const guest = await VhostUserDevice.open({
        path,
        features: supportedFeatures,
        queueCount,
        queueSize: 32,
        ramSize: 8 << 20,
        iommu: true,
        packed,
      }) as Guest;
      try {
        let isRunning = true;
        const disturbing = disturb(guest, random, () => isRunning);
        let sent = 0;
        for (let round = 0; round < 25; round++) {
          const count = 1 + random.below(40);
          sent += count;
          const requests = Array.from(
            { length: count },
            (_, i) => send(guest.queues[i % queueCount], random),
          );
          await within(Promise.all(requests), `round ${round}`);
          if (random.once(4)) {
            const base = await guest.stopQueue(0);
            await guest.startQueue(0, { base });
          }
        }
        isRunning = false;
        await disturbing;
        const used = guest.queues.reduce(
          (sum, { usedCount }) => sum + usedCount,
          0,
        );
        assert.equal(used, sent);
        for (const driver of guest.queues) {
          assert.equal(driver.inFlight, 0);
          assert.equal(driver.freeDescriptors, driver.queueSize);
          assert.deepEqual(driver.strays, []);
        }
        assert.deepEqual(guest.iommu.failures, []);
      } finally {
        await guest.close();
      }
    });
  });
}
