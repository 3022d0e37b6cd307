// ACCESS_PLATFORM: IOTLB_MSG and BACKEND_IOTLB_MSG (vhost-user, "IOMMU
// support"; vhost-user-spec.md sections 1.2, 1.3 and 1.5).

import assert from "node:assert/strict";
import {
  FrontendRequest as Request,
  type IotlbMessage,
  IotlbPermission,
  IotlbType,
  iova,
  ProtocolFeature,
  supportedFeatures,
  supportedProtocolFeatures,
  uva,
} from "../../frontend/mod.ts";
import {
  type Device,
  featureMask,
  hasFeature,
  VirtioFeature,
  virtqueueFeatures,
} from "../../mod.ts";
import { test } from "../harness.ts";
import { Events, within } from "../support/wait.ts";
import { deferred } from "./deferred.ts";
import { echo, formats, pageOf, withIommu } from "./iommu_guest.ts";
import { withGuest } from "./served.ts";

const platform = featureMask(VirtioFeature.ACCESS_PLATFORM);

function message(fields: Partial<IotlbMessage>): IotlbMessage {
  return {
    iova: iova(0x1000n),
    size: 0x1000n,
    uva: uva(0n),
    permission: IotlbPermission.READ_WRITE,
    type: IotlbType.UPDATE,
    ...fields,
  };
}

test("IOTLB: ACCESS_PLATFORM is offered where the device declares it", async () => {
  assert.ok(hasFeature(virtqueueFeatures, VirtioFeature.ACCESS_PLATFORM));
  for (const features of [0n, platform]) {
    await withGuest({ features }, async (guest) => {
      const offered = await guest.connection.getFeatures();
      assert.equal(offered & platform, features);
    });
  }
});

test("IOTLB: without ACCESS_PLATFORM the message ends the connection", async () => {
  await withGuest({ errorsExpected: true }, async (guest, { errors }) => {
    await guest.activate();
    guest.connection.exchange(Request.IOTLB_MSG, message({})).catch(() => {});
    await within(guest.connection.closed, "the end of the connection");
    assert.match((await errors.next()).message, /IOTLB_MSG.*ACCESS_PLATFORM/);
  });
});

test("IOTLB: update and invalidate are answered with 0, ack asked for or not", async () => {
  await withIommu({}, async (guest) => {
    await guest.activate();
    const { connection } = guest;
    for (const type of [IotlbType.UPDATE, IotlbType.INVALIDATE]) {
      assert.equal(
        await connection.exchange(Request.IOTLB_MSG, message({ type })),
        0n,
      );
    }
    // What is not there can be taken away too, up to the last address.
    const all = message({
      type: IotlbType.INVALIDATE,
      iova: iova(1n),
      size: (1n << 64n) - 1n,
    });
    assert.equal(await connection.exchange(Request.IOTLB_MSG, all), 0n);
  });
});

test("IOTLB: what makes no sense is answered with another value, and reported", async () => {
  await withIommu({ errorsExpected: true }, async (guest, { errors }) => {
    await guest.activate();
    const top = (1n << 64n) - 0x1000n;
    const wrong: Partial<IotlbMessage>[] = [
      { size: 0n },
      { size: 0n, type: IotlbType.INVALIDATE },
      { iova: iova(top), size: 0x1001n },
      { iova: iova(top), size: 0x1001n, type: IotlbType.INVALIDATE },
      { uva: uva(top), size: 0x1001n },
      { permission: 0 },
      { permission: 4 },
      { permission: 0xff },
      { type: IotlbType.MISS },
      { type: IotlbType.ACCESS_FAIL },
      { type: 0 },
      { type: 0xff },
    ];
    for (const fields of wrong) {
      const answer = await guest.connection.exchange(
        Request.IOTLB_MSG,
        message(fields),
      );
      assert.notEqual(answer, 0n);
      assert.match((await errors.next()).message, /Cannot accept IOTLB_MSG/);
    }
    await guest.start();
    await echo(guest);
  });
});

test("IOTLB: they are answered while an op runs; other messages wait, in order", async () => {
  await withIommu({}, async (guest, { recording }) => {
    const { connection } = guest;
    await guest.activate();
    const hold = recording.hold("queueStart 0");
    await guest.startQueue(0);
    await recording.called("queueStart 0");
    const order: string[] = [];
    const waiting = [
      connection.getFeatures().then(() => order.push("features")),
      connection.getStatus().then(() => order.push("status")),
    ];
    for (let i = 0; i < 3; i++) {
      await within(guest.iommu.invalidate(0x1000n, 0x1000n), "the answer");
      order.push("invalidated");
    }
    assert.deepEqual(order, ["invalidated", "invalidated", "invalidated"]);
    hold.release();
    await Promise.all(waiting);
    assert.deepEqual(order.slice(3), ["features", "status"]);
    await echo(guest);
  });
});

test("IOTLB: while an op runs no more than a bounded number of messages is read", async () => {
  await withIommu({}, async (guest, { recording }) => {
    const { connection } = guest;
    await guest.activate();
    const hold = recording.hold("queueStart 0");
    await guest.startQueue(0);
    await recording.called("queueStart 0");
    const waiting = Array.from({ length: 200 }, () => connection.getStatus());
    // It is behind them all.
    const invalidated = guest.iommu.invalidate(0x1000n, 0x1000n);
    hold.release();
    await within(Promise.all([...waiting, invalidated]), "all answers");
    await echo(guest);
  });
});

test("IOTLB: a queueStart that awaits a translation gets it over the socket that it blocks", async () => {
  const views: Uint8Array[] = [];
  let address = 0n;
  await withIommu({
    device: (device: Device) => ({
      async queueStart(queue) {
        views.push(
          await device.translateAsync(address, 16, "readWrite", queue),
        );
      },
    }),
  }, async (guest, { recording }) => {
    const memory = guest.ram.allocate(16);
    guest.ram.bytes(memory, 16).fill(7);
    address = guest.iommu.map(memory, 16);
    await guest.activate();
    await guest.startQueue(0);
    await recording.completed("queueStart 0");
    assert.deepEqual(views[0], new Uint8Array(16).fill(7));
  });
});

for (const { name, packed } of formats) {
  test(`IOTLB: a ${name} ring starts when its three areas translate, and asks for them`, async () => {
    await withIommu({ packed }, async (guest, { recording }) => {
      const asked = new Events<IotlbMessage>();
      const gate = deferred<void>();
      guest.iommu.onMiss = async (miss) => {
        asked.push(miss);
        await gate.promise;
      };
      await guest.activate();
      await guest.startQueue(0);
      const first = await asked.next();
      assert.equal(first.type, IotlbType.MISS);
      const { descriptor } = guest.queues[0].deviceAddresses;
      assert.equal(first.iova, descriptor);
      assert.equal(
        first.permission,
        packed ? IotlbPermission.READ_WRITE : IotlbPermission.READ,
      );
      // The other queue has its areas in other pages.
      await guest.connection.barrier();
      assert.equal(recording.count("queueStart 0"), 0);
      gate.resolve();
      await recording.completed("queueStart 0");
      const queue = recording.queues.get(0)!;
      assert.equal(queue.addresses.space, "iova");
      assert.equal(queue.addresses.descriptor, descriptor);
      await echo(guest);
    });
  });
}

test("IOTLB: one miss is sent for a page, whoever needs it, until it is answered", async () => {
  await withIommu({}, async (guest) => {
    guest.iommu.mapAt(0x10_0000n, 0n, 4096, "readWrite");
    await guest.start();
    for (let i = 0; i < 2; i++) await echo(guest, i);
    const answers = new Events<(answer: bigint | void) => void>();
    const before = guest.iommu.misses;
    guest.iommu.onMiss = () =>
      new Promise<bigint | void>((resolve) => answers.push(resolve));
    const chain = [{ address: 0x10_0010n, length: 4, isWritable: false }];
    const done = [0, 1].map((i) => guest.queues[i].submitChain(chain));
    const answer = await answers.next();
    for (let i = 0; i < 5; i++) {
      for (const driver of guest.queues) driver.kick();
      await guest.connection.barrier();
    }
    assert.equal(guest.iommu.misses, before + 1);
    guest.iommu.onMiss = undefined;
    answer();
    await within(Promise.all(done), "both requests");
    assert.equal(guest.iommu.misses, before + 1);
  });
});

test("IOTLB: a miss that brought nothing is sent again when the driver kicks", async () => {
  await withIommu({}, async (guest) => {
    await guest.start();
    await echo(guest);
    const refused = new Events<IotlbMessage>();
    guest.iommu.onMiss = (miss) => {
      refused.push(miss);
      return 1n;
    };
    const chain = [{ address: 0x10_0010n, length: 4, isWritable: false }];
    const done = guest.queues[0].submitChain(chain);
    assert.equal((await refused.next()).iova, 0x10_0010n);
    // By then the ack has been sent, and is on its way.
    guest.iommu.mapAt(0x10_0000n, 0n, 4096, "read");
    guest.iommu.onMiss = undefined;
    const timer = setInterval(() => guest.queues[0].kick(), 5);
    try {
      await within(done, "the request");
    } finally {
      clearInterval(timer);
    }
  });
});

test("IOTLB: an update that nobody asked for is used like any other", async () => {
  await withIommu({}, async (guest, { recording }) => {
    guest.iommu.onMiss = () => 1n;
    await guest.activate();
    await guest.startQueue(0);
    await guest.connection.barrier();
    assert.equal(recording.count("queueStart 0"), 0);
    const { descriptor, available, used } = guest.queues[0].deviceAddresses;
    for (const address of [descriptor, available, used]) {
      assert.ok(await guest.iommu.update(address));
    }
    await recording.completed("queueStart 0");
  });
});

test("IOTLB: without REPLY_ACK misses are sent all the same", async () => {
  const protocolFeatures = supportedProtocolFeatures &
    ~featureMask(ProtocolFeature.REPLY_ACK);
  await withIommu({ guest: { protocolFeatures } }, async (guest) => {
    await guest.start();
    for (let i = 0; i < 10; i++) await echo(guest, i % 2);
    assert.ok(guest.iommu.misses > 10);
  });
});

test("IOTLB: without a channel to ask, the ring waits for updates, which is reported once", async () => {
  await withIommu(
    { errorsExpected: true },
    async (guest, { recording, errors }) => {
      // The device was opened with a channel: this one is nobody's.
      const { connection } = guest;
      await connection.setProtocolFeatures(
        guest.protocolFeatures & ~featureMask(ProtocolFeature.BACKEND_REQ),
      );
      await guest.activate();
      await guest.startQueue(0);
      assert.match((await errors.next()).message, /BACKEND_REQ/);
      const { descriptor, available, used } = guest.queues[0].deviceAddresses;
      for (const address of [descriptor, available, used]) {
        await guest.iommu.update(address);
      }
      await recording.completed("queueStart 0");
      assert.deepEqual(errors.pending, []);
    },
  );
});

test("IOTLB: with GPA_ADDRESSES an update leads to a guest physical address", async () => {
  const protocolFeatures = supportedProtocolFeatures |
    featureMask(ProtocolFeature.GPA_ADDRESSES);
  await withIommu(
    { guest: { protocolFeatures } },
    async (guest, { recording }) => {
      await guest.start();
      await echo(guest);
      assert.equal(recording.queues.get(0)!.addresses.space, "iova");
    },
  );
});

for (
  const [how, stop] of [
    ["stopping all queues", async (guest) => {
      const base = await guest.stopQueue(0);
      await guest.startQueue(0, { base });
    }],
    ["a reset of the device", async (guest) => {
      await guest.reset();
      await guest.startQueue(0);
    }],
    ["SET_FEATURES while stopped", async (guest) => {
      const { connection, features } = guest;
      const base = await guest.stopQueue(0);
      // What was told before is not what is meant from here on.
      await guest.iommu.update(guest.queues[0].deviceAddresses.descriptor);
      await connection.setFeatures(features, { ack: true });
      await guest.startQueue(0, { base });
    }],
  ] as readonly [
    string,
    (guest: Parameters<Parameters<typeof withIommu>[1]>[0]) => Promise<void>,
  ][]
) {
  test(`IOTLB: ${how} forgets all translations`, async () => {
    await withIommu({ guest: { queueCount: 1 } }, async (guest) => {
      await guest.start();
      await echo(guest);
      const areas = Object.values(guest.queues[0].deviceAddresses).map(pageOf);
      const asked = new Set<bigint>();
      guest.iommu.onMiss = ({ iova }) => void asked.add(pageOf(iova));
      await echo(guest);
      assert.ok(areas.every((area) => !asked.has(area)));
      asked.clear();
      await stop(guest);
      await echo(guest);
      assert.ok(areas.every((area) => asked.has(area)));
    });
  });
}

test("IOTLB: SET_FEATURES that repeats itself while queues run forgets nothing", async () => {
  await withIommu({}, async (guest) => {
    await guest.start();
    await echo(guest);
    const areas = Object.values(guest.queues[0].deviceAddresses).map(pageOf);
    const asked = new Set<bigint>();
    guest.iommu.onMiss = ({ iova }) => void asked.add(pageOf(iova));
    await guest.connection.setFeatures(guest.features, { ack: true });
    await echo(guest);
    assert.ok(areas.every((area) => !asked.has(area)));
  });
});

test("the driver's side needs a device that offers ACCESS_PLATFORM, and a channel", async () => {
  await assert.rejects(
    withIommu({ features: 0n }, () => Promise.resolve()),
    /does not offer ACCESS_PLATFORM/,
  );
  await assert.rejects(
    withIommu({ guest: { protocolFeatures: 0n } }, () => Promise.resolve()),
    /without BACKEND_REQ/,
  );
  assert.equal(supportedFeatures & platform, 0n);
});
