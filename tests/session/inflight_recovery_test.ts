// Inflight I/O tracking: GET_INFLIGHT_FD and SET_INFLIGHT_FD, resubmission
// after a reconnect, and the two ways to stop without waiting.
import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import {
  FrontendConnection,
  RefusedError,
  supportedFeatures,
} from "../../frontend/mod.ts";
import {
  featureMask,
  ProtocolFeature,
  recoveryProtocolFeatures,
} from "../../mod.ts";
import { test } from "../harness.ts";
import { within } from "../support/wait.ts";
import {
  formats,
  HeldDisk,
  inOrder,
  sector,
  withHeldDisk,
} from "./held_disk.ts";
import { serving } from "./served.ts";

const recovery = featureMask(
  ProtocolFeature.INFLIGHT_SHMFD,
  ProtocolFeature.GET_VRING_BASE_INFLIGHT,
  ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN,
);

test("a disk offers crash recovery, a device that says nothing of it does not", async () => {
  await withHeldDisk({}, async ({ client }) => {
    const { connection } = client.device;
    assert.equal(await connection.getProtocolFeatures() & recovery, recovery);
  });
  for (const protocolFeatures of [0n, recoveryProtocolFeatures]) {
    await serving({ protocolFeatures }, async ({ path }) => {
      using connection = await FrontendConnection.connect(path);
      const offered = await connection.getProtocolFeatures();
      assert.equal(offered & recovery, protocolFeatures);
      connection.close();
      await connection.closed;
    });
  }
});

for (const { packed, format } of formats) {
  // 16 + 16 bytes per descriptor, or 32 + 32, each queue's part at 64.
  const stride = packed ? 576 : 320;

  test(`GET_INFLIGHT_FD answers a region that fits ${format} rings and cannot shrink`, async () => {
    await withHeldDisk({ packed, start: false }, async ({ client }) => {
      const { device } = client;
      await device.connection.setFeatures(device.features);
      const { description, fd } = await device.connection.getInflightFd(2, 16);
      assert.deepEqual(description, {
        mmapSize: BigInt(2 * stride),
        mmapOffset: 0n,
        numQueues: 2,
        queueSize: 16,
      });
      assert.equal(core.fileSize(fd), 2 * stride);
      assert.equal(core.memfdResize(fd, 0), -1);
      assert.equal(core.memfdResize(fd, 4096), -1);
      core.descriptorClose(fd);
      // The machine was reset: another one.
      const other = await device.connection.getInflightFd(1, 16);
      assert.equal(other.description.mmapSize, BigInt(stride));
      core.descriptorClose(other.fd);
    });
  });

  test(`requests in flight come again after a reconnect, oldest first, before new ones (${format})`, async () => {
    await withHeldDisk({ packed }, async ({ disk, client }) => {
      const { device } = client;
      const offsets = [512, 0, 2048, 1024];
      const writes = offsets.map((offset, i) =>
        client.write(offset, sector(i + 1))
      );
      await disk.held(4);
      // Out of order, so that the ring's own memory of the others is gone.
      disk.release("write 2048");
      await within(writes[2], "the write that was completed");
      await within(device.reconnect(), "the reconnect");
      await disk.held(3);
      const later = client.write(4096, sector(9));
      await disk.held(4);
      assert.deepEqual(disk.names.slice(4), [
        "write 512",
        "write 0",
        "write 1024",
        "write 4096",
      ]);
      disk.open();
      await within(Promise.all([...writes, later]), "all writes");
      const [driver] = device.queues;
      assert.deepEqual(driver.strays, [], "no head came back twice");
      assert.equal(driver.usedCount, 5);
      assert.deepEqual(disk.bytes.subarray(512, 1024), sector(1));
      assert.deepEqual(disk.bytes.subarray(4096, 4608), sector(9));
      assert.deepEqual(await client.read(1024, 512), sector(4));
    });
  });

  test(`a second reconnect finds what the first had resubmitted (${format})`, async () => {
    await withHeldDisk({ packed }, async ({ disk, client }) => {
      const writes = [0, 512, 1024].map((at) => client.write(at, sector(1)));
      await disk.held(3);
      for (const round of [1, 2, 3]) {
        await within(client.device.reconnect(), "the reconnect");
        await disk.held(3);
        assert.equal(disk.names.length, 3 + 3 * round);
      }
      assert.deepEqual(disk.names.slice(9), [
        "write 0",
        "write 512",
        "write 1024",
      ]);
      disk.open();
      await within(Promise.all(writes), "all writes");
      assert.equal(client.device.queues[0].usedCount, 3);
    });
  });

  test(`GET_VRING_BASE_SKIP_DRAIN leaves requests in flight to the next start (${format})`, async () => {
    await withHeldDisk({ packed }, async ({ disk, client }) => {
      const { device } = client;
      const [driver] = device.queues;
      const writes = [0, 512, 1024].map((at) => client.write(at, sector(5)));
      await disk.held(3);
      disk.release("write 512");
      await within(writes[1], "the write that was completed");
      const base = await within(
        device.stopQueue(0, { skipDrain: true }),
        "the stop",
      );
      if (!packed) assert.equal(base, 3);
      assert.equal(driver.inFlight, 2);
      // What was cancelled has touched neither the disk nor the guest.
      assert.deepEqual(disk.calls, []);
      assert.deepEqual(disk.bytes.subarray(0, 512), sector(0));
      await device.startQueue(0);
      await disk.held(2);
      assert.deepEqual(disk.names.slice(3), ["write 0", "write 1024"]);
      disk.open();
      await within(Promise.all(writes), "all writes");
      assert.equal(driver.usedCount, 3);
    });
  });

  test(`GET_VRING_BASE drains, also what was left by a disable (${format})`, async () => {
    await withHeldDisk({ packed }, async ({ disk, client }) => {
      const { device } = client;
      const writes = [0, 512].map((at) => client.write(at, sector(5)));
      await disk.held(2);
      await device.enableQueue(0, false);
      assert.deepEqual(disk.calls, [], "a disable waits for nobody");
      const stopped = device.connection.getVringBase(0);
      await disk.held(2);
      let isStopped = false;
      stopped.then(() => isStopped = true);
      disk.release("write 0");
      await disk.held(1);
      assert.equal(isStopped, false);
      disk.release("write 512");
      await within(stopped, "the stop");
      device.queues[0].poll();
      await within(Promise.all(writes), "all writes");
      assert.equal(device.queues[0].inFlight, 0);
    });
  });

  test(`GET_VRING_BASE leaves requests in flight where only bit 20 is negotiated (${format})`, async () => {
    const protocolFeatures = featureMask(
      ProtocolFeature.MQ,
      ProtocolFeature.REPLY_ACK,
      ProtocolFeature.CONFIG,
      ProtocolFeature.INFLIGHT_SHMFD,
    );
    await withHeldDisk(
      { packed, protocolFeatures, recovers: false },
      async ({ disk, client }) => {
        const { device } = client;
        const write = client.write(0, sector(7));
        await disk.held(1);
        // Without bit 20 the stop waits.
        const stopped = device.stopQueue(0);
        let isStopped = false;
        stopped.then(() => isStopped = true);
        disk.release("write 0");
        await within(stopped, "the stop");
        assert.equal(isStopped, true);
        await within(write, "the write");
      },
    );
    await withHeldDisk(
      {
        packed,
        recovers: false,
        protocolFeatures: protocolFeatures |
          featureMask(ProtocolFeature.GET_VRING_BASE_INFLIGHT),
      },
      async ({ disk, client }) => {
        const { device } = client;
        const write = client.write(0, sector(7));
        await disk.held(1);
        await within(device.stopQueue(0), "the stop");
        assert.equal(device.queues[0].inFlight, 1);
        await device.startQueue(0);
        await disk.held(1);
        disk.open();
        await within(write, "the write");
      },
    );
  });
}

for (const { packed, format } of formats) {
  test(`a driver that begins its ring anew finds nothing of the old one (${format})`, async () => {
    await withHeldDisk({ packed }, async ({ disk, client }) => {
      const { device } = client;
      const done = client.write(0, sector(1));
      await disk.held(1);
      disk.release("write 0");
      await within(done, "the first write");
      const lost = client.write(512, sector(2));
      lost.catch(() => {});
      await disk.held(1);
      // In flight, and given up by the driver with its ring.
      await device.stopQueue(0, { skipDrain: true });
      await device.resetQueue(0);
      await assert.rejects(lost, /the driver closed/);
      await device.startQueue(0);
      const write = client.write(1024, sector(3));
      await disk.held(1);
      assert.deepEqual(disk.names.slice(2), ["write 1024"]);
      disk.open();
      await within(write, "a write on the new ring");
      // And that one is tracked.
      disk.isOpen = false;
      const later = client.write(1536, sector(4));
      await disk.held(1);
      await within(device.reconnect(), "the reconnect");
      await disk.held(1);
      disk.open();
      await within(later, "the write that came again");
      assert.deepEqual(device.queues[0].strays, []);
    });
  });
}

test("a write that cannot be cancelled is waited for, and not done twice", async () => {
  const held = new HeldDisk(false);
  await withHeldDisk({}, async ({ disk, client }) => {
    const write = client.write(0, sector(3));
    const read = client.read(512, 512);
    await disk.held(2);
    const stopped = client.device.stopQueue(0, { skipDrain: true });
    let isStopped = false;
    stopped.then(() => isStopped = true);
    disk.release("read 512");
    await disk.held(1);
    disk.release("write 0");
    await within(stopped, "the stop");
    await within(Promise.all([write, read]), "both");
    assert.equal(isStopped, true);
    await client.device.startQueue(0);
    disk.open();
    await client.write(1024, sector(1));
    assert.deepEqual(disk.names, ["write 0", "read 512", "write 1024"]);
  }, held);
});

test("a reset takes the region away, and the next start gets another", async () => {
  await withHeldDisk({}, async ({ disk, client }) => {
    const { device } = client;
    disk.isOpen = true;
    await client.write(0, sector(1));
    const before = device.inflight?.fd;
    assert.notEqual(before, undefined);
    await device.reset();
    assert.equal(device.inflight, null);
    await device.start();
    assert.notEqual(device.inflight, null);
    await client.write(512, sector(2));
    assert.deepEqual(
      await client.read(0, 1024),
      (() => {
        const both = new Uint8Array(1024).fill(1);
        both.fill(2, 512);
        return both;
      })(),
    );
  });
});

test("a region tracks again after RESET_DEVICE only when it is sent again", async () => {
  await withHeldDisk({}, async ({ disk, client }) => {
    const { device } = client;
    const write = client.write(0, sector(1));
    await disk.held(1);
    await device.stopQueue(0, { skipDrain: true });
    await device.connection.resetDevice({ ack: true });
    await device.connection.setInflightFd(device.inflight!, { ack: true });
    await device.startQueue(0);
    await disk.held(1);
    disk.open();
    await within(write, "the write");
  });
});

test("bits 20 and 23 need those that they are for", async () => {
  await withHeldDisk({}, async ({ client, errors }) => {
    const { connection } = client.device;
    const {
      REPLY_ACK,
      INFLIGHT_SHMFD: tracking,
      GET_VRING_BASE_INFLIGHT: inflight,
      GET_VRING_BASE_SKIP_DRAIN: skipDrain,
    } = ProtocolFeature;
    for (const bits of [[inflight], [tracking, skipDrain], [skipDrain]]) {
      const features = featureMask(REPLY_ACK, ...bits);
      await assert.rejects(
        connection.setProtocolFeatures(features, { ack: true }),
        RefusedError,
      );
      assert.match(errors.pop() ?? "", /needs .* too/);
    }
    assert.deepEqual(errors, []);
  });
});

for (const { packed, format } of formats) {
  test(`IN_ORDER: what was held back comes again with what held it (${format})`, async () => {
    const features = supportedFeatures | inOrder;
    await withHeldDisk({ packed, features }, async ({ disk, client }) => {
      const { device } = client;
      assert.equal(device.features & inOrder, inOrder);
      const writes = [0, 512, 1024, 1536].map((at) =>
        client.write(at, sector(at / 512 + 1))
      );
      await disk.held(4);
      disk.release("write 0");
      await within(writes[0], "the first write");
      disk.release("write 1024");
      await disk.held(2);
      // The guest must not see it before the one at 512.
      assert.equal(device.queues[0].usedCount, 1);
      await within(device.reconnect(), "the reconnect");
      await disk.held(3);
      assert.deepEqual(disk.names.slice(4), [
        "write 512",
        "write 1024",
        "write 1536",
      ]);
      disk.open();
      await within(Promise.all(writes), "all writes");
      assert.equal(device.queues[0].usedCount, 4);
    });
  });
}
