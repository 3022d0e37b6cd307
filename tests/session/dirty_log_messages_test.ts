// SET_LOG_BASE, SET_LOG_FD and what is offered for them (vhost-user-spec.md
// sections 1.2, 1.5 "Log", rules 7 and 17 of 1.8).

import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import { check } from "../../ffi/errors.ts";
import {
  DirtyLog,
  FrontendConnection,
  FrontendRequest as Request,
  ProtocolFeature,
  RefusedError,
  VirtioFeature,
} from "../../frontend/mod.ts";
import {
  blkDevice,
  featureMask,
  hasFeature,
  memoryBacking,
  registerTarget,
} from "../../mod.ts";
import { test } from "../harness.ts";
import { descriptorCount, guestMappingCount } from "../support/descriptors.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { within } from "../support/wait.ts";
import {
  allocatePages,
  ask,
  assertPages,
  ramSize,
  withLogged,
} from "./logged.ts";
import { opened, serving, withGuest } from "./served.ts";

const logAll = featureMask(VirtioFeature.LOG_ALL);
const logShmfd = featureMask(ProtocolFeature.LOG_SHMFD);
const end = BigInt(ramSize);

test("LOG_ALL and LOG_SHMFD are offered by devices whose writes are logged, and by no other", async () => {
  for (const protocolFeatures of [0n, logShmfd]) {
    await withGuest({ protocolFeatures }, async ({ connection }) => {
      const features = await connection.getFeatures();
      assert.equal(features & logAll, protocolFeatures === 0n ? 0n : logAll);
      const offered = await connection.getProtocolFeatures();
      assert.equal(offered & logShmfd, protocolFeatures);
    });
  }
});

test("a disk can be migrated: it offers both", async () => {
  using folder = new TemporaryFolder();
  const address = folder.file("disk");
  await using disk = blkDevice({ backing: memoryBacking(1 << 20) });
  await using _target = await registerTarget({
    transport: "vhost-user",
    address,
    ...disk,
  });
  const connection = await FrontendConnection.connect(address);
  assert.ok(hasFeature(await connection.getFeatures(), VirtioFeature.LOG_ALL));
  assert.equal(await connection.getProtocolFeatures() & logShmfd, logShmfd);
  connection.close();
  await connection.closed;
});

test("rule 7: LOG_ALL is in device.features, not in Queue.features, and toggles without a stop", async () => {
  await withLogged({}, async (guest, { recording }) => {
    const queue = recording.queues.get(0)!;
    const features = () => recording.devices[0].features & logAll;
    assert.equal(features(), 0n);
    await guest.startLog();
    assert.equal(features(), logAll);
    assert.equal(queue.features & logAll, 0n);
    await guest.stopLog();
    assert.equal(features(), 0n);
    assert.equal(recording.count("queueStart 0"), 1);
    assert.equal(recording.count("queueStop 0"), 0);
    assert.equal(recording.count("deviceFeaturesChanged"), 3);
  });
});

test("rule 17: SET_LOG_BASE is replied to without NEED_REPLY, by a u64 of 0", async () => {
  await withLogged({}, async (guest) => {
    using log = new DirtyLog({ end });
    const { mmapSize, mmapOffset } = log.description;
    const payload = new Uint8Array(
      BigUint64Array.of(mmapSize, mmapOffset).buffer,
    );
    const reply = await within(
      guest.connection.request(Request.SET_LOG_BASE, payload, {
        fds: [log.fd],
      }),
      "the reply",
    );
    assert.equal(reply.flags, 5);
    assert.deepEqual(reply.payload, new Uint8Array(8));
    await ask(guest, allocatePages(guest, 1));
  });
});

test("SET_LOG_BASE without LOG_SHMFD, or without a descriptor, is refused", async () => {
  await serving(
    { errorsExpected: true, protocolFeatures: logShmfd },
    async (served) => {
      for (const protocolFeatures of [0n, logShmfd]) {
        await opened(served, { protocolFeatures }, async ({ connection }) => {
          await connection.barrier();
          connection.send(Request.SET_LOG_BASE, new Uint8Array(8));
          // Its reply would have to say something, and QEMU does not read it.
          await within(connection.closed, "the end of the connection");
          assert.match((await served.errors.next()).message, /SET_LOG_BASE/);
        });
      }
    },
  );
});

test("frontend: a log is refused where LOG_SHMFD is not negotiated", async () => {
  await withGuest({}, async (guest) => {
    await assert.rejects(guest.startLog(), { code: "OPTION" });
    await guest.stopLog();
    await guest.connection.barrier();
  });
});

test("the log and its descriptors go with the connection, a new log with the old one's", async () => {
  await serving(
    { protocolFeatures: logShmfd, queueCount: 1 },
    async ({ path }) => {
      await opened({ path }, { queueCount: 1 }, async (guest) => {
        await guest.start();
        const log = await guest.startLog();
        const mappings = guestMappingCount();
        const descriptors = descriptorCount();
        for (let i = 0; i < 10; i++) await guest.connection.setLogBase(log);
        assert.equal(guestMappingCount(), mappings);
        assert.ok(descriptorCount() <= descriptors);
      });
    },
  );
});

test("SET_LOG_FD: the eventfd is signalled when pages are marked, an old one is closed, any other file refused", async () => {
  await withLogged({ errorsExpected: true }, async (guest, { errors }) => {
    const { connection } = guest;
    await guest.startLog({ rings: false });
    const events = [0, 1].map(() =>
      check(core.eventfdCreate(), "Cannot make an eventfd")
    );
    const pages = allocatePages(guest, 2);
    try {
      await connection.setLogFd(events[0], { ack: true });
      await ask(guest, pages);
      assert.equal(core.eventfdTake(events[0]), 1);
      const before = descriptorCount();
      await connection.setLogFd(events[1], { ack: true });
      assert.ok(descriptorCount() <= before);
      await ask(guest, pages + 0x1000n);
      assert.equal(core.eventfdTake(events[0]), 0);
      assert.equal(core.eventfdTake(events[1]), 1);
      // What is marked already is no news.
      await ask(guest, pages);
      assert.equal(core.eventfdTake(events[1]), 0);
      await assert.rejects(
        connection.setLogFd(guest.ram.regions[0].fd, { ack: true }),
        RefusedError,
      );
      assert.match((await errors.next()).message, /not an eventfd/);
      assert.ok(descriptorCount() <= before);
    } finally {
      for (const fd of events) core.descriptorClose(fd);
    }
  });
});

test("RESET_DEVICE drops the log: nothing is marked in it any more", async () => {
  await withLogged({}, async (guest) => {
    using log = new DirtyLog({ end });
    const { connection } = guest;
    await guest.startLog({ rings: true });
    await connection.setLogBase(log);
    const pages = allocatePages(guest, 1);
    await ask(guest, pages);
    assert.ok(log.isDirty(pages));
    log.take();
    const mappings = guestMappingCount();
    await guest.reset();
    await guest.start();
    await ask(guest, pages);
    log.take();
    await ask(guest, pages);
    assertPages(log, []);
    assert.equal(guestMappingCount(), mappings - 1);
  });
});

test("RESET_OWNER keeps the log", async () => {
  await withLogged({}, async (guest) => {
    const log = await guest.startLog({ rings: false });
    await guest.connection.resetOwner();
    const pages = allocatePages(guest, 1);
    await ask(guest, pages);
    assertPages(log, [pages]);
  });
});

test("SET_CONFIG: a migration's write is told from the driver's", async () => {
  const writes: string[] = [];
  await withGuest({
    device: () => ({
      getConfig: () => new Uint8Array(8),
      setConfig(_device, offset, data, reason) {
        writes.push(`${reason} ${offset} ${[...data]}`);
      },
    }),
    errorsExpected: true,
  }, async ({ connection }, { errors }) => {
    const data = Uint8Array.of(1, 2);
    await connection.setConfig(0, data, { ack: true });
    await connection.setConfig(2, data, { ack: true, flags: 1 });
    await assert.rejects(
      connection.setConfig(4, data, { ack: true, flags: 2 }),
      RefusedError,
    );
    assert.match((await errors.next()).message, /flags 2/);
    assert.deepEqual(writes, ["frontend 0 1,2", "migration 2 1,2"]);
  });
});

test("SET_CONFIG: a disk takes from a migration its write cache, and lets the rest be", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("disk");
  await using disk = blkDevice({ backing: memoryBacking(1 << 20) });
  await using _target = await registerTarget({
    transport: "vhost-user",
    address: path,
    ...disk,
  });
  await opened({ path }, { queueCount: 1 }, async (guest) => {
    await guest.activate();
    const config = await guest.getConfig(0, 60);
    const writeback = 32;
    assert.equal(config[writeback], 0);
    const all = config.slice();
    all.fill(0xee);
    all[writeback] = 1;
    await guest.connection.setConfig(0, all, { ack: true, flags: 1 });
    const after = await guest.getConfig(0, 60);
    config[writeback] = 1;
    assert.deepEqual(after, config);
  });
});

test("device.markDirty and queue.markUsed log what plain TypeScript has written", async () => {
  await withLogged({}, async (guest, { recording }) => {
    const [device] = recording.devices;
    const queue = recording.queues.get(0)!;
    device.markDirty(0x5000n, 1);
    queue.markUsed(0, 4);
    const log = await guest.startLog({ rings: false });
    device.markDirty(0x5fffn, 2);
    device.markDirty(0x9000n, 0);
    device.markDirty(-1n, 1);
    device.markDirty(2n ** 64n, 1);
    device.markDirty(2n ** 64n - 1n, 2 ** 60);
    device.markDirty(end, 1);
    queue.markUsed(0, 4);
    assertPages(log, [0x5000n, 0x6000n]);
    await guest.startLog({ buffers: false });
    assert.equal(queue.logAddress, guest.vringAddress(0).log);
  });
});

test("queue.markUsed marks from the log address on, while the queue is started", async () => {
  await withLogged({}, async (guest, { recording }) => {
    const queue = recording.queues.get(0)!;
    await guest.startLog({ buffers: false });
    using log = new DirtyLog({ end });
    await guest.connection.setLogBase(log);
    const address = queue.logAddress!;
    log.take();
    queue.markUsed(0x3000, 4);
    assertPages(log, [(address + 0x3000n) & ~0xfffn]);
    await guest.stop();
    log.take();
    queue.markUsed(0x3000, 4);
    assert.equal(queue.logAddress, null);
    assertPages(log, []);
  });
});
