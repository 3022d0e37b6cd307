// The subtle rules of vhost-user-spec.md section 1.8 that are about the rings
// themselves; the others are in rules_test.ts and where docs/compliance.md
// says.

import assert from "node:assert/strict";
import {
  DescriptorFlag,
  type PackedDriver,
  type QueueDriver,
  type SplitDriver,
  supportedFeatures,
  supportedProtocolFeatures,
  VhostUserDevice,
} from "../../frontend/mod.ts";
import {
  featureMask,
  ProtocolFeature,
  requestOps,
  VirtioFeature,
} from "../../mod.ts";
import { writePackedDescriptor } from "../../driver/packed_layout.ts";
import { test } from "../harness.ts";
import { Events, within } from "../support/wait.ts";
import { deferred } from "./deferred.ts";
import { type Served, serving, withGuest } from "./served.ts";

const { WRITE, INDIRECT } = DescriptorFlag;
const eventIndex = featureMask(VirtioFeature.RING_EVENT_IDX);

async function open<Driver extends QueueDriver>(
  { path }: Served,
  packed: boolean,
  features = supportedFeatures,
): Promise<VhostUserDevice<Driver>> {
  const options = { path, features, queueSize: 16, ramSize: 1 << 20 };
  const device = await VhostUserDevice.open({ ...options, packed });
  return device as unknown as VhostUserDevice<Driver>;
}

for (const packed of [false, true]) {
  const name = packed ? "packed" : "split";

  test(`rule 12: positions of a ${name} ring run freely, past its size and past 65535`, () =>
    serving({}, async (served) => {
      const guest = await open(served, packed);
      const [driver] = guest.queues;
      const chain = [{
        address: guest.ram.allocate(16),
        length: 16,
        isWritable: true,
      }];
      for (let round = 0; round < 4200; round++) {
        const batch = Array.from(
          { length: 16 },
          () => driver.submitChain(chain, { kick: false }),
        );
        driver.notify();
        await within(Promise.all(batch), `round ${round}`);
      }
      const base = await guest.stopQueue(0);
      const count = 4200 * 16;
      if (!packed) assert.equal(base, count & 0xffff);
      await guest.close();
    }));

  test(`rule 13: an indirect table of a ${name} ring may begin at any address`, () =>
    serving({}, async (served) => {
      const guest = await open<SplitDriver | PackedDriver>(served, packed);
      const [driver] = guest.queues;
      const memory = guest.ram.allocate(4096, 4096);
      for (let shift = 1n; shift < 16n; shift++) {
        const bytes = guest.ram.bytes(memory + shift, 32);
        const table = new DataView(bytes.buffer, bytes.byteOffset, 32);
        const seen = driver.usedCount;
        const address = memory + shift;
        const from = memory + 1024n;
        const to = memory + 2048n;
        guest.ram.write(from, new Uint8Array(8).fill(Number(shift)));
        if (packed) {
          const rest = { id: 0, length: 8 };
          writePackedDescriptor(table, 0, { ...rest, address: from, flags: 0 });
          writePackedDescriptor(table, 16, {
            ...rest,
            address: to,
            flags: WRITE,
          });
          const ring = driver as PackedDriver;
          const id = ring.takeId();
          ring.publish([{ address, length: 32, id, flags: INDIRECT }]);
        } else {
          const next = DescriptorFlag.NEXT;
          writeSplit(table, 0, from, next, 1);
          writeSplit(table, 16, to, WRITE, 0);
          const ring = driver as SplitDriver;
          const [head] = ring.takeDescriptors(1);
          ring.descriptor(head, {
            address,
            length: 32,
            flags: INDIRECT,
            next: 0,
          });
          ring.publish(head);
        }
        driver.kick();
        await within(driver.whenUsed(seen + 1), `the table at +${shift}`);
        assert.deepEqual(
          guest.ram.read(to, 8),
          new Uint8Array(8).fill(Number(shift)),
        );
      }
      await guest.close();
    }));

  test(`rule 19: a stale wish of a ${name} ring's device does not suppress kicks after a restart`, () =>
    serving({}, async (served) => {
      const guest = await open<SplitDriver | PackedDriver>(served, packed);
      assert.equal(guest.features & eventIndex, eventIndex);
      const [driver] = guest.queues;
      const address = guest.ram.allocate(16);
      const chain = [{ address, length: 16, isWritable: true }];
      for (let i = 0; i < 5; i++) await driver.submitChain(chain);
      await guest.stopQueue(0);
      // As an image that was restored has it: far behind, and kicks unwanted.
      const { used } = driver.ring.addresses;
      const area = guest.ram.bytes(used, packed ? 4 : 6 + 8 * 16);
      if (packed) area.set([0x00, 0x00, 0x01, 0x00]);
      else area.set([0x00, 0x80], area.length - 2);
      // Nobody will be told of this one: the start must look by itself.
      const early = driver.submitChain(chain, { kick: false });
      await guest.startQueue(0);
      await within(early, "what was available before the start");
      for (let i = 0; i < 40; i++) {
        await within(driver.submitChain(chain), `request ${i}`);
      }
      await guest.close();
    }));
}

function writeSplit(
  table: DataView,
  offset: number,
  address: bigint,
  flags: number,
  next: number,
): void {
  table.setBigUint64(offset, address, true);
  table.setUint32(offset + 8, 8, true);
  table.setUint16(offset + 12, flags, true);
  table.setUint16(offset + 14, next, true);
}

test("rule 18: memory that is replaced with I/O in flight waits for it, and the driver is called again", async () => {
  const arrived = new Events<void>();
  const end = deferred<void>();
  const device = () =>
    requestOps(async (request) => {
      arrived.push();
      await end.promise;
      return request.writableBytes;
    });
  const guest = {
    protocolFeatures: supportedProtocolFeatures &
      ~featureMask(ProtocolFeature.CONFIGURE_MEM_SLOTS),
    regions: [{ size: 1 << 20 }, { size: 1 << 20 }],
  };
  await withGuest({ device, guest }, async (guest, { recording }) => {
    await guest.activate();
    await guest.startQueue(0);
    const [driver] = guest.queues;
    const answer = driver.submit({ writable: [64] });
    await within(arrived.next(), "the request");
    guest.ram.removeRegion(guest.ram.regions[1]);
    const replaced = guest.sendMemory();
    await recording.called("queueStop 0");
    assert.equal(driver.inFlight, 1);
    const calls = driver.calls;
    end.resolve();
    await within(replaced, "the new table");
    assert.equal((await within(answer, "the request")).written, 64);
    await recording.completed("queueStart 0", 2);
    // One for the request, one for the start: a call may have been lost.
    assert.ok(driver.calls > calls);
    const again = await within(driver.submit({ writable: [64] }), "another");
    assert.equal(again.written, 64);
  });
});
