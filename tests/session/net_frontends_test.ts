// What front-ends of network devices send that others do not, as traced.
import assert from "node:assert/strict";
import { echoEnd, netDevice, registerTarget } from "../../mod.ts";
import {
  featureMask,
  FrontendConnection,
  FrontendRequest,
  gpa,
  hasFeature,
  type PackedDriver,
  ProtocolFeature,
  RefusedError,
  type SplitDriver,
  supportedProtocolFeatures,
  VhostUserDevice,
  VirtioFeature,
} from "../../frontend/mod.ts";
import { frameOf, ServedNet, swapped } from "../devices/net_guest.ts";
import { test } from "../harness.ts";
import { withSocketPath } from "../support/temporary.ts";
import { within } from "../support/wait.ts";

function serveEcho(body: (path: string) => Promise<void>): Promise<void> {
  return withSocketPath(async (address) => {
    await using _target = await registerTarget({
      transport: "vhost-user",
      address,
      onError: () => {},
      ...netDevice({ end: echoEnd() }),
    });
    await body(address);
  });
}

test("QEMU: rings are enabled before SET_FEATURES, by who knows protocol features", () =>
  serveEcho(async (path) => {
    const connection = await FrontendConnection.connect(path);
    const offered = await connection.getFeatures();
    const protocolFeatures = supportedProtocolFeatures &
      await connection.getProtocolFeatures();
    await connection.setProtocolFeatures(protocolFeatures);
    await connection.setVringEnable(0, true, { ack: true });
    // Who then does not take PROTOCOL_FEATURES has no such message.
    const without = offered & ~featureMask(VirtioFeature.PROTOCOL_FEATURES);
    await connection.setFeatures(without, { ack: true });
    await assert.rejects(
      connection.setVringEnable(0, true, { ack: true }),
      RefusedError,
    );
    connection.close();
    await connection.closed;
  }));

test("QEMU: a region that each queue pair adds goes when each has removed it", () =>
  serveEcho(async (path) => {
    const device = await VhostUserDevice.open({ path, start: false });
    assert.ok(
      hasFeature(device.protocolFeatures, ProtocolFeature.CONFIGURE_MEM_SLOTS),
    );
    const { connection, ram } = device;
    const [region] = ram.regions;
    await device.activate();
    await connection.addMemRegion(region, { ack: true });
    await connection.removeMemRegion(region, { ack: true });
    // It is still there: a ring in it can be set up.
    await device.startQueue(0);
    await connection.barrier();
    await device.stopQueue(0);
    await connection.removeMemRegion(region, { ack: true });
    await assert.rejects(
      connection.removeMemRegion(region, { ack: true }),
      RefusedError,
    );
    // A part of it, or another address, is no repetition.
    await connection.addMemRegion(region, { ack: true });
    const { description, fd } = region;
    for (
      const other of [
        { ...description, size: description.size / 2n },
        { ...description, gpa: gpa(description.gpa + 0x1000n) },
      ]
    ) {
      await assert.rejects(
        connection.addMemRegion({ description: other, fd }, { ack: true }),
        RefusedError,
      );
    }
    await device.close();
  }));

test("virtio_user: the base of a packed ring comes without its upper half", async () => {
  await using served = await ServedNet.start({ end: echoEnd() });
  const card = await served.card({ packed: true, start: false });
  const { device } = card;
  await device.activate();
  await device.startQueue(0, { base: 0x8000 });
  await device.startQueue(1, { base: 0x8000 });
  const frame = frameOf(60);
  await within(card.send(frame), "sent");
  assert.deepEqual((await card.receive()).bytes, swapped(frame));
  assert.equal((card.transmitQueue() as PackedDriver).usedPosition, 0x8002);
});

test("virtio_user: split rings go on after a reconnect, whose base is 0", async () => {
  await using served = await ServedNet.start({ end: echoEnd() });
  const card = await served.card();
  for (let round = 0; round < 3; round++) {
    for (let i = 0; i < 10; i++) {
      const frame = frameOf(60, { seed: i });
      await within(card.send(frame), "sent");
      assert.deepEqual((await card.receive()).bytes, swapped(frame));
    }
    for (const index of [0, 1]) {
      await card.device.stopQueue(index);
      await card.device.startQueue(index, { base: 0 });
    }
  }
  assert.equal((card.transmitQueue() as SplitDriver).usedIndex, 30);
  // And that is what it answers.
  const state = { index: 1, num: 0 };
  const { num } = await card.device.connection.exchange(
    FrontendRequest.GET_VRING_BASE,
    state,
  );
  assert.equal(num, 30);
});
