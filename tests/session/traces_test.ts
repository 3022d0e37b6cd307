// What real front-ends send, message by message (vhost-user-spec.md 1.7).

import assert from "node:assert/strict";
import {
  type BackendRequests,
  FrontendConnection,
  gpa,
  GuestRam,
  ProtocolFeature,
  ringAddress,
  SplitDriver,
  VirtioFeature,
} from "../../frontend/mod.ts";
import { featureMask } from "../../mod.ts";
import { test } from "../harness.ts";
import { within } from "../support/wait.ts";
import { echo, type Served, serving } from "./served.ts";

const features = featureMask(
  VirtioFeature.RING_INDIRECT_DESC,
  VirtioFeature.RING_EVENT_IDX,
  VirtioFeature.VERSION_1,
  VirtioFeature.PROTOCOL_FEATURES,
);

/** A front-end's parts: memory as QEMU lays it out, and two drivers. */
async function guest(
  { path }: Served,
  body: (parts: {
    connection: FrontendConnection;
    ram: GuestRam;
    drivers: SplitDriver[];
  }) => Promise<void>,
): Promise<void> {
  const ram = new GuestRam([
    { size: 0xc0000 },
    { size: 0x100000, gpa: 0x100000n, mmapOffset: 0x1000 },
  ]);
  const drivers = [0, 1].map(() =>
    new SplitDriver(ram, { queueSize: 128, features })
  );
  const connection = await FrontendConnection.connect(path);
  try {
    await body({ connection, ram, drivers });
  } finally {
    connection.close();
    await connection.closed;
    for (const driver of drivers) driver.close();
    ram.close();
  }
}

function address(ram: GuestRam, driver: SplitDriver, index: number) {
  const { descriptor, available, used } = driver.ring.addresses;
  return {
    index,
    flags: 0,
    descriptor: ringAddress(ram.toUva(descriptor)),
    available: ringAddress(ram.toUva(available)),
    used: ringAddress(ram.toUva(used)),
    // There even with no logging.
    log: gpa(used),
  };
}

async function assertAnswers(driver: SplitDriver): Promise<void> {
  const answer = await within(
    driver.submit({ readable: [Uint8Array.of(1, 2, 3)], writable: [3] }),
    "a request",
  );
  assert.deepEqual(answer.data[0], Uint8Array.of(1, 2, 3));
}

const ack = { ack: true };

test("trace: QEMU 7.2's vhost-user-blk under SeaBIOS, from the handshake to a reboot", async () => {
  const config = new Uint8Array(60).fill(7);
  const device = () => ({ ...echo(), getConfig: () => config });
  await serving(
    { device, queueCount: 2 },
    (served) =>
      guest(served, async ({ connection, ram, drivers }) => {
        const { recording } = served;
        assert.equal(await connection.getFeatures() & features, features);
        const offered = await connection.getProtocolFeatures();
        const acked = featureMask(
          ProtocolFeature.MQ,
          ProtocolFeature.REPLY_ACK,
          ProtocolFeature.BACKEND_REQ,
          ProtocolFeature.CONFIG,
          ProtocolFeature.CONFIGURE_MEM_SLOTS,
          ProtocolFeature.STATUS,
        );
        assert.equal(offered & acked, acked);
        await connection.setProtocolFeatures(acked);
        assert.equal(await connection.getQueueNum(), 2);
        assert.equal(await connection.getMaxMemSlots(), 509);
        const channel: BackendRequests = await connection.setBackendChannel(
          ack,
        );
        await connection.setOwner();
        await connection.getFeatures();
        for (const index of [0, 1]) {
          await connection.setVringCall(index, drivers[index].callFd);
          await connection.setVringErr(index, drivers[index].callFd);
        }
        assert.deepEqual(
          await connection.getConfig(0, 57),
          config.subarray(0, 57),
        );

        // The BIOS's driver starts: twice, as at the boot and after a reboot.
        for (let boot = 0; boot < 2; boot++) {
          await connection.setFeatures(features);
          await connection.getStatus();
          await connection.setStatus(11);
          for (const index of [0, 1]) {
            await connection.setVringCall(index, drivers[index].callFd);
          }
          await connection.setFeatures(features);
          assert.equal(await connection.getStatus(), 11);
          await connection.setStatus(11);
          for (const region of ram.regions) {
            await connection.addMemRegion(region, ack);
          }
          await connection.setVringNum(0, 128);
          await connection.setVringBase(0, 0);
          await connection.setVringAddr(address(ram, drivers[0], 0));
          await connection.setVringKick(0, drivers[0].kickFd);
          // Queue 1 was never set up.
          for (const index of [0, 1]) {
            await connection.setVringEnable(index, true, ack);
          }
          assert.equal(await connection.getStatus(), 11);
          await connection.setStatus(15);
          drivers[0].kick();
          for (let i = 0; i < 3; i++) {
            await assertAnswers(drivers[0]);
          }

          for (const index of [0, 1]) {
            await connection.setVringEnable(index, false, ack);
          }
          assert.equal(await connection.getVringBase(0), 3);
          assert.equal(await connection.getVringBase(1), 0);
          await connection.setStatus(0);
          for (const region of ram.regions) {
            await connection.removeMemRegion(region, ack);
          }
          drivers[0].reset();
          assert.equal(recording.count("queueStart 0"), boot + 1);
          assert.equal(recording.count("queueStop 0"), boot + 1);
          assert.equal(recording.count("queueStart 1"), 0);
        }
        channel.close();
        assert.equal(recording.count("deviceFeaturesChanged"), 1);
      }),
  );
});

test("trace: DPDK's virtio-user 22.11", async () => {
  await serving(
    { queueCount: 2 },
    (served) =>
      guest(served, async ({ connection, ram, drivers }) => {
        await connection.setOwner();
        await connection.getFeatures();
        const offered = await connection.getProtocolFeatures();
        assert.equal(offered & 0x10009n, 0x10009n);
        await connection.setProtocolFeatures(0x10009n);
        for (const index of [0, 1]) {
          await connection.setVringCall(index, drivers[index].callFd);
        }
        await connection.setFeatures(features);
        await connection.setStatus(11, ack);
        for (let i = 0; i < 2; i++) {
          assert.equal(await connection.getStatus(), 11);
        }
        await connection.setMemTable(ram.regions, ack);
        for (const index of [0, 1]) {
          await connection.setVringNum(index, 128);
          await connection.setVringBase(index, 0);
          await connection.setVringAddr(address(ram, drivers[index], index));
          await connection.setVringKick(index, drivers[index].kickFd);
        }
        for (const index of [0, 1]) {
          await connection.setVringEnable(index, true);
        }
        await connection.setStatus(15, ack);
        for (const driver of drivers) {
          await assertAnswers(driver);
        }

        for (const index of [0, 1]) {
          await connection.setVringEnable(index, false);
        }
        for (const index of [0, 1]) {
          assert.equal(await connection.getVringBase(index), 1);
        }
        const { recording } = served;
        assert.deepEqual(recording.begun, [
          "deviceCreate",
          "deviceFeaturesChanged",
          "deviceInit",
          "queueStart 0",
          "queueStart 1",
          "queueStop 0",
          "queueStop 1",
        ]);
      }),
  );
});

test("trace: QEMU before 7.2 does not ack PROTOCOL_FEATURES: no ENABLE, the queues run", async () => {
  const known = features & ~featureMask(VirtioFeature.PROTOCOL_FEATURES);
  await serving(
    { queueCount: 2 },
    (served) =>
      guest(served, async ({ connection, ram, drivers }) => {
        await connection.getFeatures();
        await connection.getProtocolFeatures();
        await connection.setProtocolFeatures(
          featureMask(ProtocolFeature.REPLY_ACK),
        );
        await connection.setOwner();
        await connection.setFeatures(known);
        await connection.setMemTable(ram.regions, ack);
        for (const index of [0, 1]) {
          await connection.setVringNum(index, 128);
          await connection.setVringBase(index, 0);
          await connection.setVringAddr(address(ram, drivers[index], index));
          await connection.setVringKick(index, drivers[index].kickFd);
          await connection.setVringCall(index, drivers[index].callFd);
        }
        for (const driver of drivers) await assertAnswers(driver);
        for (const index of [0, 1]) {
          assert.equal(await connection.getVringBase(index), 1);
        }
      }),
  );
});
