// Packed rings of a driver that breaks the rules: the reason is told once, the
// queue stays idle, and goes on after it was set up again.
import assert from "node:assert/strict";
import {
  DescriptorFlag,
  type PackedDescriptor,
  PackedFlag,
} from "../../frontend/mod.ts";
import { test } from "../harness.ts";
import { within } from "../support/wait.ts";
import { type PackedGuest, serving, withPacked } from "./served.ts";

const { NEXT, WRITE, INDIRECT } = DescriptorFlag;

async function assertWorks(guest: PackedGuest, index: number): Promise<void> {
  const { written } = await within(
    guest.queues[index].submit({
      readable: [Uint8Array.of(9)],
      writable: [1],
    }),
    "a request",
  );
  assert.equal(written, 1);
}

type Attack = (
  guest: PackedGuest,
  buffer: bigint,
) => [address: bigint, length: number, id: number, flags: number][];

/** Queue 0 of a device is broken; its queue 1 does not notice. */
function assertBreaks(name: string, reason: RegExp, attack: Attack): void {
  test(`packed ring: ${name}`, async () => {
    await serving({ queueCount: 2 }, async (served) => {
      await withPacked(served, { queueCount: 2 }, async (guest) => {
        const [driver] = guest.queues;
        for (let round = 0; round < 3; round++) {
          const buffer = guest.ram.allocate(4096, 16);
          const chain = attack(guest, buffer).map((
            [address, length, id, flags],
          ): PackedDescriptor => ({ address, length, id, flags }));
          driver.publish(chain);
          driver.kick();
          const { message } = await served.errors.next();
          assert.match(message, reason);
          assert.match(message, /^Cannot go on with queue 0 of/);
          driver.kick();
          await assertWorks(guest, 1);
          assert.deepEqual(driver.strays, []);
          await guest.stopQueue(0);
          driver.reset();
          await guest.startQueue(0, { base: driver.firstBase });
          await assertWorks(guest, 0);
          await guest.stopQueue(0);
          driver.reset();
          await guest.startQueue(0, { base: driver.firstBase });
        }
      });
    });
  });
}

assertBreaks("a buffer id that is not below the queue size", /16 is/, (
  _,
  buffer,
) => [[buffer, 1, 16, 0]]);
assertBreaks(
  "the id that counts is the last descriptor's",
  /65535 is/,
  (_, buffer) => [[buffer, 1, 0, NEXT], [buffer, 1, 0xffff, 0]],
);
assertBreaks(
  "NEXT all the way round",
  /more than 16 descriptors/,
  (_, buffer) => Array.from({ length: 16 }, () => [buffer, 1, 0, NEXT]),
);
assertBreaks(
  "an address that is not mapped",
  /0xdead0000 is not mapped/,
  () => [[0xdead_0000n, 1, 0, 0]],
);
assertBreaks(
  "an address that wraps",
  /is not mapped guest memory/,
  () => [[2n ** 64n - 4n, 8, 0, WRITE]],
);
assertBreaks(
  "row 25: only descriptors of no length, mapped or not",
  /is empty/,
  () => [[0xdead_0000n, 0, 0, NEXT], [0n, 0, 0, WRITE]],
);
assertBreaks(
  "readable after writable",
  /readable descriptor follows/,
  (_, buffer) => [[buffer, 1, 0, WRITE | NEXT], [buffer, 1, 0, 0]],
);
assertBreaks(
  "an indirect table behind a direct descriptor",
  /indirect table where none is allowed/,
  (_, buffer) => [[buffer, 1, 0, NEXT], [buffer, 16, 0, INDIRECT]],
);
assertBreaks(
  "an indirect table with NEXT",
  /indirect table where none is allowed/,
  (_, buffer) => [[buffer, 16, 0, INDIRECT | NEXT], [buffer, 16, 0, 0]],
);
assertBreaks(
  "an indirect table of a part of a descriptor",
  /17 bytes, not a multiple of 16/,
  (_, buffer) => [[buffer, 17, 0, INDIRECT]],
);

test("packed ring: a buffer id that is in flight is refused", async () => {
  let release = (): void => {};
  const held = new Promise<void>((resolve) => release = resolve);
  await serving({ handler: () => held.then(() => 0) }, async (served) => {
    await withPacked(served, {}, async (guest) => {
      const [driver] = guest.queues;
      const buffer = guest.ram.allocate(64, 16);
      const one = [{ address: buffer, length: 4, id: 3, flags: 0 }];
      driver.publish(one);
      driver.publish(one);
      driver.kick();
      const { message } = await served.errors.next();
      assert.match(message, /head 3 was made available again/);
      release();
    });
  });
});

test("packed ring: a chain that reaches into what the device has is refused", async () => {
  let release = (): void => {};
  let taken = (): void => {};
  const held = new Promise<void>((resolve) => release = resolve);
  const isTaken = new Promise<void>((resolve) => taken = resolve);
  const handler = () => {
    taken();
    return held.then(() => 0);
  };
  await serving({ handler }, async (served) => {
    await withPacked(served, { queueSize: 8 }, async (guest) => {
      const [driver] = guest.queues;
      const address = guest.ram.allocate(64, 16);
      const part = { address, length: 4, id: 0, flags: NEXT };
      driver.publish([part, part, part, part, { ...part, flags: 0 }]);
      driver.kick();
      await within(isTaken, "the first chain");
      // Slots 5 to 7 are left, and NEXT leads on from the last of them.
      const flags = NEXT | PackedFlag.AVAILABLE;
      for (const slot of [7, 6, 5]) {
        driver.ring.setDescriptor(slot, { ...part, id: 1, flags });
      }
      driver.kick();
      const { message } = await served.errors.next();
      assert.match(message, /a chain has more than 3 descriptors/);
      release();
    });
  });
});

test("packed ring: descriptors of another lap and reserved flags are not looked at", async () => {
  await serving({}, async (served) => {
    await withPacked(served, {}, async (guest) => {
      const [driver] = guest.queues;
      for (const flags of [0x8000, 0x8080, 0x807f, 0x7f7f, 0xffff]) {
        driver.ring.setDescriptor(0, {
          address: 0xdead_0000n,
          length: 1,
          id: 0xffff,
          flags,
        });
        driver.kick();
        await new Promise((resolve) => setImmediate(resolve));
      }
      driver.reset();
      await assertWorks(guest, 0);
    });
  });
});
