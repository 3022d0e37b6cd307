/** Features, configuration and memory. */

import assert from "node:assert/strict";
import { FrontendConnection } from "../../frontend/mod.ts";
import { registerTarget, type TargetOptions } from "../../mod.ts";
import { test } from "../harness.ts";
import { eventually, within } from "../support/wait.ts";
import { nextAddress } from "./pci_served.ts";
import {
  allFeatures,
  Bit,
  exercise,
  isDirect,
  openVdpaGuest,
  servingVdpa,
} from "./vdpa_served.ts";

const PROTOCOL_FEATURES = 1n << 30n;
/** Of the library and vhost-user. */
const always = Bit.VERSION_1 | PROTOCOL_FEATURES | Bit.LOG_ALL;
const everything = (1n << 64n) - 1n;

async function offeredTo(path: string): Promise<bigint> {
  const connection = await FrontendConnection.connect(path);
  const features = await connection.getFeatures();
  connection.close();
  await connection.closed;
  return features;
}

/** Features of a device, the user's filter, and what a guest is offered. */
const offers: Record<
  string,
  { features: bigint; filter?: bigint; offered: bigint; deviceId?: number }
> = {
  "all of the device's but packed rings": {
    features: allFeatures | 0x5n,
    offered: always | Bit.INDIRECT | Bit.EVENT_IDX | 0x5n,
  },
  "packed rings where the user wants them": {
    features: allFeatures,
    filter: everything,
    offered: always | Bit.INDIRECT | Bit.EVENT_IDX | Bit.PACKED,
  },
  "what the user lets pass": {
    features: allFeatures | 0x7n,
    filter: Bit.INDIRECT | 0x2n,
    offered: always | Bit.INDIRECT | 0x2n,
  },
  "nothing that the device has not": {
    features: Bit.VERSION_1 | 0x2n,
    filter: everything,
    offered: always | 0x2n,
  },
  "nothing that vhost-user cannot carry": {
    // Legacy bits, SR-IOV, notification data, admin queues.
    features: Bit.VERSION_1 | 1n << 24n | 1n << 27n | 1n << 37n | 1n << 38n |
      1n << 39n | 1n << 41n | 1n << 50n,
    filter: everything,
    offered: always | 1n << 50n,
  },
  "nothing of a card that needs its control queue": {
    deviceId: 0x1041,
    features: Bit.VERSION_1 | 0x3fn | 0x7fn << 16n | 0xdn << 50n | 1n << 57n |
      1n << 60n,
    offered: always | 0x3bn | 1n << 16n,
  },
};

for (
  const [name, { features, filter, offered, deviceId }] of Object.entries(
    offers,
  )
) {
  test(`a guest is offered ${name}`, () =>
    servingVdpa({
      features,
      deviceId: deviceId ?? 0x1042,
      target: { features: filter },
    }, async ({ path, model }) => {
      assert.equal(await offeredTo(path), offered);
      assert.equal(model.acked, 0n);
    }));
}

test("the device is acked what the guest acks, and what is between it and us", () =>
  servingVdpa({ features: allFeatures | 0x7n }, async (served) => {
    const guest = await openVdpaGuest(served, {
      features: always | Bit.EVENT_IDX | 0x2n,
    });
    await exercise(guest);
    assert.equal(
      served.model.acked,
      Bit.VERSION_1 | Bit.EVENT_IDX | 0x2n | Bit.ACCESS_PLATFORM |
        Bit.RING_RESET,
    );
    await guest.close();
  }));

test("a driver without VERSION_1 gets no queue", () =>
  servingVdpa({ errorsExpected: true }, async (served) => {
    const guest = await openVdpaGuest(served, { features: PROTOCOL_FEATURES });
    const error = await served.errors.next();
    assert.match(error.message, /has not acked .*VERSION_1/);
    assert.ok(!served.model.queues[0].isEnabled);
    await guest.close();
  }));

test("GET_QUEUE_NUM says what the device has, or less where the user says so", async () => {
  for (const [queueCount, expected] of [[undefined, 5], [3, 3], [9, 5]]) {
    await servingVdpa(
      { queueCount: 5, target: { queueCount } },
      async (served) => {
        const guest = await openVdpaGuest(served);
        assert.equal(guest.maxQueueCount, expected);
        await guest.close();
      },
    );
  }
});

test("configuration is the device's, and its changes are told", () =>
  servingVdpa({
    deviceConfig: Uint8Array.from({ length: 60 }, (_, i) => i),
  }, async (served) => {
    const guest = await openVdpaGuest(served);
    const { deviceConfig } = served.model;
    assert.deepEqual(await guest.getConfig(0, 60), deviceConfig);
    // Behind its end there is nothing.
    assert.deepEqual([...await guest.getConfig(56, 8)], [
      56,
      57,
      58,
      59,
      0,
      0,
      0,
      0,
    ]);
    const written: number[] = [];
    served.model.onConfigWrite = (offset) => void written.push(offset);
    await guest.setConfig(9, Uint8Array.of(1, 2, 3, 4, 5, 6, 7, 8, 9));
    assert.deepEqual([...deviceConfig.subarray(9, 18)], [
      1,
      2,
      3,
      4,
      5,
      6,
      7,
      8,
      9,
    ]);
    assert.deepEqual(written, [9, 10, 12, 16]);
    const changed = new Promise<void>((resolve) =>
      guest.onConfigChange = resolve
    );
    deviceConfig[0] = 77;
    served.model.notifyConfig();
    await within(changed, "a change");
    assert.equal((await guest.getConfig(0, 1))[0], 77);
    await guest.close();
  }));

for (
  const options of [{ vectorCount: 2 }, { vectorCount: 0, hasPin: true }, {
    vectorCount: 0,
  }]
) {
  test(`a change is told apart from a queue's interrupt, ${JSON.stringify(options)}`, () =>
    servingVdpa(options, async (served) => {
      const guest = await openVdpaGuest(served);
      let changes = 0;
      guest.onConfigChange = () => void changes++;
      await exercise(guest);
      assert.equal(changes, 0);
      served.model.notifyConfig();
      await eventually(() => changes === 1, "a change");
      await exercise(guest);
      assert.equal(changes, 1);
      await guest.close();
    }));
}

test("the user's ops change what passes of configuration", () => {
  const writes: string[] = [];
  return servingVdpa({
    errorsExpected: true,
    deviceConfig: Uint8Array.of(1, 2, 3, 4),
    target: {
      device: () => ({
        getConfig: (_, own) => own!.map((byte) => byte * 2),
        setConfig(_device, offset, data, reason) {
          writes.push(`${offset} ${data} ${reason}`);
          if (offset === 3) throw new Error("not that one");
        },
      }),
    },
  }, async (served) => {
    const guest = await openVdpaGuest(served);
    assert.deepEqual([...await guest.getConfig(0, 4)], [2, 4, 6, 8]);
    await guest.setConfig(1, Uint8Array.of(9));
    await assert.rejects(guest.setConfig(3, Uint8Array.of(9)));
    assert.deepEqual([...served.model.deviceConfig], [1, 9, 3, 4]);
    assert.deepEqual(writes, ["1 9 frontend", "3 9 frontend"]);
    await guest.close();
  });
});

test("memory comes and goes under running queues", () =>
  servingVdpa({}, async (served) => {
    const guest = await openVdpaGuest(served);
    await exercise(guest);
    for (let round = 0; round < 3; round++) {
      const region = guest.ram.addRegion({ size: 1 << 16, gpa: 1n << 33n });
      await guest.addRegion(region);
      assert.equal(served.model.dma.count, 3 + (round > 0 ? 2 : 0));
      assert.equal(isDirect(served, guest, 0), round === 0);
      // The device reaches it.
      const [from, to] = [0, 1].map(() => guest.ram.allocate(16, 16, region));
      guest.ram.write(from, Uint8Array.of(41));
      const written = await guest.queues[0].submitChain([
        { address: from, length: 1, isWritable: false },
        { address: to, length: 1, isWritable: true },
      ]);
      assert.deepEqual([written, guest.ram.read(to, 1)[0]], [1, 42]);
      await exercise(guest);
      await guest.removeRegion(region);
      guest.ram.removeRegion(region);
      const isThere = served.model.dma.ranges.some(({ iova }) =>
        iova === 1n << 33n
      );
      assert.ok(!isThere);
      await exercise(guest);
    }
    await guest.close();
  }));

test("a region that the system does not let the device reach is refused, and nothing else", () =>
  servingVdpa({ errorsExpected: true }, async (served) => {
    const guest = await openVdpaGuest(served);
    const sentence =
      "Cannot let PCI device x reach y: the limit of locked memory (64 KiB) is too low";
    served.model.dma.failures.push(new Error(sentence));
    const region = guest.ram.addRegion({ size: 1 << 16, gpa: 1n << 33n });
    await assert.rejects(guest.addRegion(region));
    assert.match((await served.errors.next()).message, /locked memory/);
    await exercise(guest);
    assert.ok(isDirect(served, guest, 0));
    assert.equal(served.target.devices[0].memory.length, 2);
    // It is tried again when it comes again.
    await guest.addRegion(region);
    assert.equal(served.target.devices[0].memory.length, 3);
    await exercise(guest);
    await guest.close();
  }));

test("of a table that cannot all be mapped only the beginning is there", () =>
  servingVdpa({ errorsExpected: true }, async (served) => {
    const guest = await openVdpaGuest(served, {
      start: false,
      protocolFeatures: 0b1001n,
      regions: [0, 1, 2, 3].map((i) => ({
        size: 1 << 20,
        gpa: BigInt(i + 1) << 20n,
      })),
    });
    served.model.dma.failures.push(undefined, new Error("no more"));
    await assert.rejects(guest.activate());
    assert.equal(served.model.dma.count, 1);
    assert.equal(served.target.devices[0].memory.length, 1);
    await guest.activate();
    await guest.start();
    await exercise(guest);
    assert.equal(served.model.dma.count, 4);
    await guest.close();
  }));

/** Options that have no sense for a device that is there already. */
const senseless: Record<string, unknown> = {
  workers: 1,
  pollMicroseconds: 10,
  runsDisabledRings: true,
  postcopy: true,
  sharedMemory: [4096],
};

for (const [name, value] of Object.entries(senseless)) {
  test(`${name} is refused, in one sentence`, async () => {
    const options = {
      transport: "PCI-vDPA",
      address: nextAddress(),
      socketPath: "/nowhere",
      [name]: value,
    } as unknown as TargetOptions;
    await assert.rejects(registerTarget(options), {
      code: "OPTION",
      message:
        `Cannot use ${name} with PCI-vDPA: the device itself has the queues and the memory`,
    });
  });
}

test("what cannot be kept by a device that holds the requests is not offered", () =>
  servingVdpa({}, async ({ path }) => {
    const connection = await FrontendConnection.connect(path);
    const offered = await connection.getProtocolFeatures();
    // Inflight regions, postcopy, mapping into the guest.
    for (const bit of [8n, 12n, 20n, 22n, 23n]) {
      assert.equal(offered >> bit & 1n, 0n, `${bit}`);
    }
    for (const bit of [0n, 1n, 3n, 5n, 9n, 10n, 11n, 13n, 15n, 16n]) {
      assert.equal(offered >> bit & 1n, 1n, `${bit}`);
    }
    connection.close();
    await connection.closed;
  }));
