/** Who is served when, and how a front-end's end is noticed. */

import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import { Errno } from "../../ffi/errors.ts";
import { FrontendConnection, VhostUserDevice } from "../../frontend/mod.ts";
import { VdpaDevice } from "../../transports/pci_vdpa/device.ts";
import { PciVdpaTransport } from "../../transports/pci_vdpa/transport.ts";
import type { Connection, TransportHost } from "../../transports/transport.ts";
import { test } from "../harness.ts";
import { FrontendListener } from "../session/frontend_listener.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { VirtioPciModel } from "../support/virtio_pci_model.ts";
import { within } from "../support/wait.ts";
import {
  allFeatures,
  Bit,
  exercise,
  openVdpaGuest,
  servingVdpa,
} from "./vdpa_served.ts";

test("front-ends take turns, in the order in which they come", () =>
  servingVdpa({}, async (served) => {
    const first = await openVdpaGuest(served);
    const others = [0, 1, 2].map(() => openVdpaGuest(served));
    await exercise(first);
    assert.equal(served.target.devices.length, 1);
    await first.close();
    for (const other of others) {
      const guest = await other;
      await exercise(guest, 4);
      assert.equal(served.target.devices.length, 1);
      await guest.close();
    }
    assert.equal(served.models.length, 1, "one device for all");
  }));

test("who gives up waiting is forgotten, and too many are sent away", () =>
  servingVdpa({ errorsExpected: true }, async (served) => {
    const first = await openVdpaGuest(served);
    const waiting = await Promise.all(
      Array.from({ length: 17 }, () => FrontendConnection.connect(served.path)),
    );
    const error = await served.errors.next();
    assert.match(error.message, /16 front-ends wait for PCI-vDPA:/);
    await within(waiting[16].closed, "the last one");
    for (const connection of waiting) connection.close();
    await exercise(first);
    await first.close();
    const next = await openVdpaGuest(served);
    await exercise(next, 4);
    await next.close();
  }));

/** How far a front-end gets before it goes. */
const steps: ((guest: VhostUserDevice) => Promise<unknown>)[] = [
  (guest) => guest.connection.setFeatures(guest.features),
  (guest) => guest.sendMemory(),
  (guest) => guest.connection.setVringNum(0, 64),
  (guest) => guest.connection.setVringBase(0, 0),
  (guest) => guest.connection.setVringAddr(guest.vringAddress(0)),
  (guest) => guest.connection.setVringCall(0, guest.queues[0].callFd),
  (guest) => guest.connection.setVringKick(0, guest.queues[0].kickFd),
  (guest) => guest.enableQueue(0, true),
  (guest) => Promise.resolve(guest.queues[0].kick()),
  (guest) => guest.startQueue(1),
  (guest) => guest.enableQueue(0, false),
  (guest) => guest.connection.getVringBase(0),
  (guest) => guest.connection.resetDevice({ ack: true }),
];

for (const reset of [Bit.RING_RESET, 0n]) {
  test(`a front-end may go after each step${reset ? "" : ", without RING_RESET"}`, () =>
    servingVdpa(
      { features: allFeatures & ~Bit.RING_RESET | reset },
      async (served) => {
        for (let count = 0; count <= steps.length; count++) {
          const guest = await VhostUserDevice.open({
            path: served.path,
            features: ~0n,
            start: false,
            queueCount: 2,
            queueSize: 64,
            ramSize: 1 << 20,
          });
          for (const step of steps.slice(0, count)) await step(guest);
          guest.connection.close();
          await guest.close();
          await served.nobody();
          assert.equal(served.model.dma.count, 0);
          assert.equal(served.model.status & 4, 0, "the device is reset");
        }
        const guest = await openVdpaGuest(served);
        await exercise(guest);
        await guest.close();
      },
    ));
}

test("a target is unregistered while a guest works, and while one waits", () =>
  servingVdpa({}, async (served) => {
    const guest = await openVdpaGuest(served);
    await exercise(guest);
    const waiting = await FrontendConnection.connect(served.path);
    await within(served.target.unregister(), "unregister");
    await within(waiting.closed, "who waited");
    assert.ok(served.model.isClosed);
    await guest.close();
  }));

test("the socket is told of each front-end's end, also of one that only waited", async () => {
  const model = new VirtioPciModel({ deviceId: 0x1042, features: allFeatures });
  const served: Connection[] = [];
  const ended: Connection[] = [];
  let socket: TransportHost | undefined;
  const transport = new PciVdpaTransport({
    name: "PCI-vDPA:model",
    openDevice: () => VdpaDevice.open(model),
    openSocket(inner) {
      socket = inner;
      return {
        close() {},
        disconnected: (connection) => void ended.push(connection),
      };
    },
  }, {
    queueCount: 1,
    deviceType: undefined,
    connected(connection) {
      served.push(connection);
      return new Promise(() => {});
    },
    failed: (error) => assert.fail(error),
    ended: () => assert.fail("nobody has said so"),
  });
  await transport.start();
  const connections = ["one", "two"].map((name) =>
    ({ name, protocolFeatures: 0n, close() {} }) as Connection
  );
  const told = connections.map((connection) => socket!.connected(connection));
  const closed = transport.close();
  await within(told[1], "who waited");
  transport.disconnected(served[0]);
  await within(told[0], "who was served");
  await within(closed, "close");
  assert.deepEqual(ended.map(({ name }) => name), ["two", "one"]);
  assert.ok(model.isClosed);
});

test("a front-end that listens is connected to, and again", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("frontend.sock");
  using listener = new FrontendListener(path);
  await servingVdpa({
    target: {
      socketPath: path,
      connect: true,
      reconnect: { minDelayMs: 1, maxDelayMs: 2 },
    },
  }, async () => {
    for (let round = 0; round < 3; round++) {
      const guest = await VhostUserDevice.open({
        fd: await listener.accepted.next(),
        queueCount: 2,
        queueSize: 64,
        ramSize: 1 << 20,
      });
      await exercise(guest, 4);
      await guest.close();
    }
  });
});

for (
  const [name, device] of Object.entries({
    "is served, and the target ends with it": () => ({}),
    "for which no device can be made ends the target": () => {
      throw new Error("no device");
    },
  })
) {
  test(`an inherited connection ${name}`, () => {
    const ends = new Int32Array(2);
    core.socketPair(ends);
    const isServed = name.startsWith("is served");
    return servingVdpa({
      target: { socketPath: { fd: ends[1] }, device },
      errorsExpected: !isServed,
    }, async ({ target, model }) => {
      const [fd] = ends;
      if (isServed) {
        const guest = await openVdpaGuest({ path: "" }, {
          path: undefined,
          fd,
        });
        await exercise(guest, 4);
        await guest.close();
      } else core.descriptorClose(fd);
      await within(target.closed, "the end of the target");
      assert.ok(model.isClosed);
    });
  });
}

test("an inherited connection for which there is no memory left ends the target", async () => {
  const ends = new Int32Array(2);
  core.socketPair(ends);
  const { memoryCreate } = core;
  try {
    await servingVdpa({
      target: { socketPath: { fd: ends[1] } },
      prepare: () => Object.assign(core, { memoryCreate: () => -Errno.EMFILE }),
      errorsExpected: true,
    }, async ({ target, errors }) => {
      assert.match((await errors.next()).message, /guest memory: EMFILE/);
      await within(target.closed, "the end of the target");
      core.descriptorClose(ends[0]);
    });
  } finally {
    Object.assign(core, { memoryCreate });
  }
});
