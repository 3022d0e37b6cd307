/**
 * Devices that lie, break down or go away, and front-ends and guests that
 * abuse them: each is told in one sentence, nothing is left of it, and the
 * next front-end is served.
 */

import assert from "node:assert/strict";
import type { RingFormatOptions } from "../../frontend/mod.ts";
import { registerTarget } from "../../mod.ts";
import { test } from "../harness.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";
import {
  type ModelCapability,
  writeCapabilities,
} from "../support/pci_model.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { VirtioPciModel } from "../support/virtio_pci_model.ts";
import { eventually, within } from "../support/wait.ts";
import { nextAddress } from "./pci_served.ts";
import {
  allFeatures,
  answer,
  Bit,
  exercise,
  exerciseQueue,
  isDirect,
  openVdpaGuest,
  servingVdpa,
  type VdpaOptions,
  type VdpaServed,
} from "./vdpa_served.ts";

/** Capabilities of a device, of which a test changes some. */
function lying(
  change: (all: ModelCapability[]) => ModelCapability[],
): (model: VirtioPciModel) => void {
  return (model) => {
    const all: ModelCapability[] = [
      { type: 1, bar: 0, offset: 0, length: 64 },
      { type: 3, bar: 0, offset: 0x100, length: 1 },
      { type: 4, bar: 0, offset: 0x200, length: 8 },
      { type: 2, bar: 0, offset: 0x1000, length: 0x1000, multiplier: 4 },
    ];
    model.config.fill(0, 0x40);
    writeCapabilities(model.config, change(all));
  };
}

const changed = (type: number, fields: Partial<ModelCapability>) =>
  lying((all) =>
    all.map((one) => one.type === type ? { ...one, ...fields } : one)
  );
const without = (type: number) =>
  lying((all) => all.filter((one) => one.type !== type));

/** Devices that cannot be used, and what is said of them. */
const unusable: Record<string, [(model: VirtioPciModel) => void, RegExp]> = {
  "that is of another vendor": [
    (model) => model.config[0] = 0,
    /1a00:1042 is no virtio device/,
  ],
  "that has gone": [(model) => model.isGone = true, /it has gone/],
  "whose list of capabilities is a circle": [
    (model) => model.config[0x51] = 0x50,
    /leads in a circle or nowhere/,
  ],
  "without a common configuration": [
    without(1),
    /no common configuration capability/,
  ],
  "without notifications": [without(2), /no notification capability/],
  "whose common configuration is short": [
    changed(1, { length: 55 }),
    /its 55 bytes are less than 56/,
  ],
  "whose common configuration is behind the BAR": [
    changed(1, { offset: 0x3ff0 }),
    /bytes 16368 to 16432 are outside BAR 0 of 16384/,
  ],
  "whose notifications are in no BAR": [
    changed(2, { bar: 6 }),
    /BAR 6 does not exist/,
  ],
  "whose notifications wrap": [
    changed(2, { offset: 0xffff_f000, length: 0xffff_f000 }),
    /are outside BAR 0/,
  ],
  "that stays in its reset": [
    (model) => model.resetReads = 1e9,
    /has not come out of it in 5000 ms/,
  ],
};

for (const [name, [prepare, error]] of Object.entries(unusable)) {
  test(`a device ${name} is refused, in one sentence`, () =>
    withoutDescriptorLeak(async () => {
      using folder = new TemporaryFolder();
      const model = new VirtioPciModel({ deviceId: 0x1042 });
      prepare(model);
      await assert.rejects(
        registerTarget({
          transport: "PCI-vDPA",
          address: nextAddress(),
          socketPath: folder.file("s"),
          openDevice: () => model,
        }),
        error,
      );
      assert.ok(model.isClosed);
      assert.equal(model.dma.count, 0);
    }));
}

test("a device that does not offer VERSION_1 is refused", () =>
  assert.rejects(
    servingVdpa({ features: 0n }, () => Promise.resolve()),
    /does not offer VERSION_1/,
  ));

test("where the socket cannot be opened the device is let go of", () =>
  withoutDescriptorLeak(async () => {
    const model = new VirtioPciModel({ deviceId: 0x1042 });
    await assert.rejects(
      registerTarget({
        transport: "PCI-vDPA",
        address: nextAddress(),
        socketPath: "/nowhere/at/all",
        openDevice: () => model,
      }),
      /Cannot listen on/,
    );
    assert.ok(model.isClosed);
  }));

/** The next front-end is served, by the same device or one opened anew. */
async function assertServed(served: VdpaServed): Promise<void> {
  await served.nobody();
  const guest = await openVdpaGuest(served);
  await exercise(guest, 10);
  await guest.close();
}

/** Starts that the device does not let succeed. */
const failing: Record<
  string,
  [VdpaOptions, RegExp, (m: VirtioPciModel) => void]
> = {
  "that refuses features": [
    { prepare: (model) => model.refusedFeatures = Bit.EVENT_IDX },
    /does not take the features/,
    (model) => model.refusedFeatures = 0n,
  ],
  "whose queue has no size": [
    { queueSize: 0 },
    /Cannot use queue 0 of PCI device .*: it has none of that number/,
    () => {},
  ],
  "whose second notification is behind the others": [
    { prepare: changed(2, { length: 4 }) },
    /Cannot use queue 1 of PCI device .*: its notification is at 4 of 4 bytes/,
    () => {},
  ],
};

for (const [name, [options, error, repair]] of Object.entries(failing)) {
  for (const reset of [Bit.RING_RESET, 0n]) {
    test(`a device ${name} starts no queue${reset ? "" : ", without RING_RESET"}`, () =>
      servingVdpa({
        features: allFeatures & ~Bit.RING_RESET | reset,
        errorsExpected: true,
        ...options,
      }, async (served) => {
        const guest = await openVdpaGuest(served);
        const told = await served.errors.find(({ message }) =>
          error.test(message)
        );
        assert.match(told.message, error);
        await guest.close();
        await served.nobody();
        assert.equal(served.model.dma.count, 0);
        assert.equal(served.model.status & 4, 0);
        repair(served.model);
        if (name === "that refuses features") await assertServed(served);
      }));
  }
}

test("a device that breaks down is reset when its queues are", () =>
  servingVdpa({ errorsExpected: true }, async (served) => {
    const guest = await openVdpaGuest(served);
    await exercise(guest, 10);
    served.model.fail();
    const error = await served.errors.next();
    assert.match(error.message, /says that it needs a reset/);
    await guest.reset();
    await guest.start();
    await exercise(guest, 10);
    await guest.close();
    await assertServed(served);
    assert.equal(served.models.length, 1);
  }));

for (const reset of [Bit.RING_RESET, 0n]) {
  test(`a device that does not come out of its reset is taken off the bus${reset ? "" : ", without RING_RESET"}`, () =>
    servingVdpa({
      features: allFeatures & ~Bit.RING_RESET | reset,
      errorsExpected: true,
    }, async (served) => {
      const guest = await openVdpaGuest(served);
      await exercise(guest, 10);
      const { model } = served;
      model.config[4] |= 4;
      model.resetReads = 1e9;
      model.queueResetReads = 1e9;
      await guest.stopQueue(0);
      assert.equal(model.config[4] & 4, 0, "it reaches no memory any more");
      const error = await served.errors.next();
      assert.match(error.message, /has not come out of it in 5000 ms/);
      await guest.close();
      await assertServed(served);
      assert.equal(served.models.length, 2, "another one was opened");
      assert.ok(model.isClosed);
    }));
}

/** When a device vanishes. */
const moments: Record<string, (served: VdpaServed) => Promise<void>> = {
  "before its queues start": async (served) => {
    const guest = await openVdpaGuest(served, { start: false });
    served.model.isGone = true;
    await guest.activate();
    await guest.startQueue(0);
    await served.errors.find(({ message }) => /has gone/.test(message));
    guest.connection.close();
    await guest.close();
  },
  "under running queues, told by its interrupt": async (served) => {
    const guest = await openVdpaGuest(served);
    await exercise(guest, 10);
    const [, vector] = [served.model.isGone, served.model.vectors[0]];
    assert.ok(vector >= 0);
    served.model.notifyConfig();
    served.model.isGone = true;
    await within(guest.connection.closed, "the connection");
    await guest.close();
  },
  "while the host asks it back": async (served) => {
    const guest = await openVdpaGuest(served);
    await exercise(guest, 10);
    served.model.onRemoval?.();
    await within(guest.connection.closed, "the connection");
    await guest.close();
  },
  "while a queue is being stopped": async (served) => {
    const guest = await openVdpaGuest(served);
    served.model.onRequest = () => {};
    const lost = guest.queues[0].submit({ writable: [1] });
    lost.catch(() => {});
    const stopped = guest.stopQueue(0);
    served.model.isGone = true;
    await stopped;
    guest.connection.close();
    await guest.close();
  },
  "while nobody is there": (served) => {
    served.model.isGone = true;
    served.model.onRemoval?.();
    return Promise.resolve();
  },
};

for (const [name, body] of Object.entries(moments)) {
  test(`a device that goes ${name} is let go of, and opened for the next guest`, () =>
    servingVdpa({ errorsExpected: true }, async (served) => {
      const first = served.model;
      await body(served);
      await assertServed(served);
      assert.equal(served.models.length, 2);
      assert.ok(first.isClosed);
    }));
}

test("a front-end is sent away while the device cannot be opened", () => {
  let isThere = true;
  return servingVdpa({
    errorsExpected: true,
    prepare: () => {
      if (!isThere) throw new Error("Cannot open PCI device: it has gone");
    },
  }, async (served) => {
    served.model.onRemoval?.();
    await eventually(() => served.models[0].isClosed);
    isThere = false;
    await assert.rejects(openVdpaGuest(served));
    await served.errors.find(({ message }) => /it has gone/.test(message));
    // The model of the failed try was made and never handed out.
    served.models[1].close();
    isThere = true;
    await assertServed(served);
  });
});

test("configuration of a device that has gone is refused", () =>
  servingVdpa({ errorsExpected: true }, async (served) => {
    const guest = await openVdpaGuest(served, { start: false });
    await guest.getConfig(0, 4);
    served.model.isGone = true;
    await assert.rejects(guest.getConfig(0, 4));
    guest.connection.close();
    await guest.close();
  }));

/** What a device may write into the used ring of ours. */
const nonsense: Record<
  string,
  [(used: DataView, head: number) => void, RegExp]
> = {
  "an index that jumps": [
    (used) => used.setUint16(2, 0x7fff, true),
    /queue 0 .*used index jumped/,
  ],
  "more bytes than there are": [
    (used, head) => {
      used.setUint32(4, head, true);
      used.setUint32(8, 0xffff_ffff, true);
      used.setUint16(2, 1, true);
    },
    /queue 0 .*4294967295 bytes written to head \d+, which has 16/,
  ],
};

for (const [name, [write, reason]] of Object.entries(nonsense)) {
  test(`a device that writes ${name} into a ring of ours breaks only its queue`, () =>
    servingVdpa({ errorsExpected: true }, async (served) => {
      const guest = await openVdpaGuest(served);
      await exercise(guest, 10);
      await guest.stop();
      await guest.start();
      await exerciseQueue(guest, 1, 10);
      served.model.onRequest = (_, { head }) => {
        const { addresses } = served.model.queues[0];
        const used = served.model.dma.memory.whole("gpa", addresses[2], 12)!;
        write(new DataView(used.buffer, used.byteOffset), head);
        served.model.interrupt(1);
      };
      const lost = guest.queues[0].submit({ writable: [16] });
      lost.catch(() => {});
      assert.match((await served.errors.next()).message, reason);
      served.model.onRequest = answer;
      await exerciseQueue(guest, 1, 10);
      guest.connection.close();
      await guest.close();
      await assertServed(served);
    }));
}

for (const ring of ["direct", "ours"] as const) {
  test(`a front-end that shrinks its memory harms nobody else (${ring})`, () =>
    servingVdpa({ errorsExpected: true }, async (served) => {
      const guest = await openVdpaGuest(served);
      await exercise(guest, 10);
      if (ring === "ours") {
        await guest.stop();
        await guest.start();
        await exercise(guest, 10);
      }
      assert.equal(isDirect(served, guest, 0), ring === "direct");
      for (const region of guest.ram.regions) region.resizeFile(0);
      if (ring === "ours") guest.queues[0].kick();
      else await guest.connection.getVringBase(0).catch(() => {});
      const error = await served.errors.find(({ message }) =>
        /took guest memory away/.test(message)
      );
      assert.ok(error);
      await within(guest.connection.closed, "the connection");
      guest.connection.close();
      await guest.close();
      await served.nobody();
      assert.equal(served.model.dma.count, 0);
      await assertServed(served);
    }));
}

/** Memory that cannot be the device's. */
const places: Record<
  string,
  [{ size: number; gpa?: bigint; mmapOffset?: number }, RegExp]
> = {
  "is not whole pages": [
    { size: 4097, gpa: 1n << 33n },
    /are not whole pages of 4096/,
  ],
  "does not begin with a page": [
    { size: 4096, gpa: (1n << 33n) + 16n },
    /are not whole pages of 4096/,
  ],
  "lies across a page of its file": [
    { size: 4096, gpa: 1n << 33n, mmapOffset: 16 },
    /are not whole pages of 4096/,
  ],
};

for (const [name, [place, error]] of Object.entries(places)) {
  test(`memory that ${name} is refused`, () =>
    servingVdpa({ errorsExpected: true }, async (served) => {
      const guest = await openVdpaGuest(served);
      const region = guest.ram.addRegion(place);
      await assert.rejects(guest.addRegion(region));
      assert.match((await served.errors.next()).message, error);
      assert.equal(served.model.dma.count, 2);
      await exercise(guest, 10);
      await guest.close();
    }));
}

test("memory at the addresses of a ring of ours is refused", () =>
  servingVdpa({ errorsExpected: true }, async (served) => {
    const guest = await openVdpaGuest(served);
    await exercise(guest, 10);
    await guest.stop();
    await guest.start();
    await exercise(guest, 10);
    const ours = served.model.dma.ranges.at(-1)!;
    assert.ok(ours.iova > 1n << 33n);
    const region = guest.ram.addRegion({ size: 4096, gpa: ours.iova });
    await assert.rejects(guest.addRegion(region));
    const { message } = await served.errors.next();
    assert.match(message, /the addresses are in use by this library/);
    await exercise(guest, 10);
    await guest.close();
  }));

/** What a guest's driver may write into a ring that is relayed. */
const broken: Record<string, (view: DataView, ring: DataView) => void> = {
  "an available index that jumps": (_, ring) => ring.setUint16(2, 0x8000, true),
  "a head that is not there": (_, ring) => {
    ring.setUint16(4 + 2 * (ring.getUint16(2, true) % 64), 9999, true);
    ring.setUint16(2, ring.getUint16(2, true) + 1, true);
  },
  "an address that is no memory": (table, ring) => {
    table.setBigUint64(0, 1n << 60n, true);
    table.setUint32(8, 512, true);
    table.setUint16(12, 0, true);
    ring.setUint16(4 + 2 * (ring.getUint16(2, true) % 64), 0, true);
    ring.setUint16(2, ring.getUint16(2, true) + 1, true);
  },
  "a chain without an end": (table, ring) => {
    table.setBigUint64(0, 1n << 20n, true);
    table.setUint32(8, 16, true);
    table.setUint16(12, 1, true);
    table.setUint16(14, 0, true);
    ring.setUint16(4 + 2 * (ring.getUint16(2, true) % 64), 0, true);
    ring.setUint16(2, ring.getUint16(2, true) + 1, true);
  },
};

for (const [name, write] of Object.entries(broken)) {
  test(`a guest that writes ${name} breaks its own queue`, () =>
    servingVdpa({ errorsExpected: true }, async (served) => {
      const guest = await openVdpaGuest(served);
      await exercise(guest, 8);
      await guest.stop();
      await guest.start();
      await exercise(guest, 8);
      const { descriptor, available } = guest.queues[0].ring.addresses;
      const view = (address: bigint, size: number) => {
        const bytes = guest.ram.bytes(address, size);
        return new DataView(bytes.buffer, bytes.byteOffset, size);
      };
      write(view(descriptor, 1024), view(available, 6 + 128));
      guest.queues[0].kick();
      assert.match(
        (await served.errors.next()).message,
        /queue 0 of PCI-vDPA:/,
      );
      await exerciseQueue(guest, 1, 8);
      guest.connection.close();
      await guest.close();
      await assertServed(served);
    }));
}

const formats: RingFormatOptions[] = [{ packed: false }, { packed: true }];
for (const format of formats) {
  test(`a ring outside of memory does not reach the device, ${JSON.stringify(format)}`, () =>
    servingVdpa({
      errorsExpected: true,
      target: { features: (1n << 64n) - 1n },
    }, async (served) => {
      const guest = await openVdpaGuest(served, { start: false, ...format });
      await guest.activate();
      const { connection } = guest;
      const address = guest.vringAddress(0);
      await connection.setVringNum(0, 64);
      await connection.setVringBase(0, guest.queues[0].firstBase);
      await assert.rejects(connection.setVringAddr({
        ...address,
        used: (address.used + (1n << 40n)) as typeof address.used,
      }, { ack: true }));
      await connection.setVringKick(0, guest.queues[0].kickFd);
      await connection.setVringEnable(0, true);
      await connection.barrier();
      assert.ok(!served.model.queues[0].isEnabled);
      await guest.start();
      await exercise(guest, 8);
      await guest.close();
    }));
}
