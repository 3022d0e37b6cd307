/** A disk behind each virtio-vhost-user device, driven by our front-end. */

import assert from "node:assert/strict";
import { VhostUserDevice } from "../../frontend/mod.ts";
import { test } from "../harness.ts";
import { type DeviceName, devices } from "../support/vhost_user_pci_model.ts";
import { eventually } from "../support/wait.ts";
import { exercise, openGuest, withDisk } from "./pci_disk.ts";

/** What of a device a test varies. */
const names = Object.keys(devices) as DeviceName[];

for (const device of names) {
  for (const packed of [false, true]) {
    test(`a disk behind ${device}, ${packed ? "packed" : "split"} rings`, () =>
      withDisk({ device }, async (served) => {
        const { attach, model, target } = served;
        const guest = await VhostUserDevice.open({
          fd: attach(),
          features: ~(1n << 34n),
          packed,
          queueCount: 2,
          regions: [{ size: 1 << 20 }, { size: 1 << 20, gpa: 1n << 32n }],
        });
        await exercise(guest, 20);
        assert.equal(target.devices[0].memory.length, 2);
        assert.ok(guest.queues[0].calls > 0, "calls come by doorbells");
        assert.deepEqual([...model.rung], [[0, 0], [1, 1]]);
        await guest.close();
      }));
  }
}

for (const device of ["QEMU 2022", "crosvm"] as const) {
  test(`front-ends come and go behind ${device}`, () =>
    withDisk({ device }, async (served) => {
      for (let round = 0; round < 4; round++) {
        const guest = await openGuest(served);
        await exercise(guest);
        // Once politely, once not.
        if (round % 2 === 1) guest.connection.close();
        await guest.close();
        await served.nobody();
      }
      await eventually(() => served.model.vhostStatus === 1, "it waits again");
    }));

  test(`a front-end that waits before the back-end is up comes in, ${device}`, () =>
    withDisk({ device }, async (served) => {
      const first = await openGuest(served);
      const second = openGuest(served);
      await exercise(first);
      await first.close();
      const guest = await second;
      await exercise(guest);
      await guest.close();
    }));

  test(`regions start where their files' offsets say, ${device}`, () =>
    withDisk({ device }, async (served) => {
      const guest = await openGuest(served, {
        regions: [
          { size: 1 << 20, mmapOffset: 8192 },
          { size: 1 << 20, gpa: 1n << 32n },
          { size: 1 << 20, gpa: 1n << 33n, mmapOffset: 4096 },
        ],
      });
      await guest.connection.barrier();
      const { memory } = served.target.devices[0];
      for (const [i, region] of guest.ram.regions.entries()) {
        region.bytes[1234] = i + 1;
        region.bytes[region.size - 1] = i + 101;
        assert.equal(memory[i].view[1234], i + 1);
        assert.equal(memory[i].view[region.size - 1], i + 101);
      }
      await exercise(guest);
      await guest.close();
    }));
}

test("data is read and written where the guest has it, without a copy", () =>
  withDisk({}, async (served) => {
    const guest = await openGuest(served);
    await guest.connection.barrier();
    const [region] = guest.ram.regions;
    const [shared] = served.target.devices[0].memory;
    region.bytes[77] = 5;
    assert.equal(shared.view[77], 5);
    shared.view[78] = 6;
    assert.equal(region.bytes[78], 6);
    await guest.close();
  }));

/** How kicks arrive. */
const kicks = {
  "a vector for each queue": { vectorCount: 64 },
  "a vector shared by the queues": { vectorCount: 4 },
  "one vector for everything": { vectorCount: 1 },
  "the pin, and looking": { vectorCount: 0, hasPin: true },
  "nothing but looking": { vectorCount: 0, hasPin: false },
  "looking, without notification vectors": { hasNotifications: false },
};

for (const [name, options] of Object.entries(kicks)) {
  test(`kicks come by ${name}`, () =>
    withDisk(options, async (served) => {
      const guest = await openGuest(served);
      await exercise(guest, 12);
      await guest.close();
    }));
}

test("vectors that are refused are made up for by looking", () =>
  withDisk({ device: "crosvm" }, async (served) => {
    // At the next start: it refuses them from then on.
    served.model.refusesVectors = true;
    served.model.fail();
    await served.errors.find((error) => /needs a reset/.test(error.message));
    await eventually(() => served.model.vhostStatus === 1, "it is up again");
    const guest = await openGuest(served);
    await exercise(guest, 8);
    await guest.close();
  }));

test("guest memory in a numbered region of 64-bit shared memory is found", () =>
  withDisk({
    device: "crosvm",
    memoryId: 1,
    capabilities: (all) => [
      ...all.filter(({ type }) => type !== 8),
      // The log's comes first.
      { type: 8, bar: 4, offset: 0, length: 4096, id: 2, size: 24 },
      ...all.filter(({ type }) => type === 8),
    ],
  }, async (served) => {
    const guest = await openGuest(served);
    await exercise(guest);
    await guest.close();
  }));

test("a device that nobody knows is used as its user says", () =>
  withDisk({
    device: "crosvm",
    profile: "crosvm",
  }, async (served) => {
    const guest = await openGuest(served);
    await exercise(guest);
    await guest.close();
  }));
