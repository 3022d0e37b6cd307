// The rules that implementations get wrong (vhost-user-spec.md section 1.8).
// Rules 2 and 7 are in sequencing_test.ts.

import assert from "node:assert/strict";
import { statSync } from "node:fs";
import { core } from "../../ffi/core.ts";
import {
  FrontendConnection,
  FrontendRequest as Request,
  GuestRam,
  ProtocolFeature,
  RefusedError,
  supportedFeatures,
  VirtioFeature,
} from "../../frontend/mod.ts";
import { featureMask } from "../../mod.ts";
import { encodeRequest } from "../../protocol/message.ts";
import { test } from "../harness.ts";
import { descriptorCount } from "../support/descriptors.ts";
import { eventually, within } from "../support/wait.ts";
import { assertWorks, echo, opened, serving, withGuest } from "./served.ts";

const version1 = featureMask(VirtioFeature.VERSION_1);
const replyAck = featureMask(ProtocolFeature.REPLY_ACK);

/** A connection with features and REPLY_ACK agreed on, and nothing else. */
async function acking(path: string): Promise<FrontendConnection> {
  const connection = await FrontendConnection.connect(path);
  const wanted = replyAck | featureMask(ProtocolFeature.CONFIG);
  await connection.setProtocolFeatures(
    wanted & await connection.getProtocolFeatures(),
  );
  await connection.setFeatures(
    version1 | featureMask(VirtioFeature.PROTOCOL_FEATURES),
  );
  return connection;
}

test("rule 1: PROTOCOL_FEATURES is bit 30, not the mask 30", async () => {
  // Bits 1 to 4, which are what a test by mask would find.
  const lowBits = 0x1en;
  const guest = {
    features: supportedFeatures & version1 | lowBits,
    queueCount: 1,
  };
  await withGuest(
    { features: lowBits, guest },
    async (guest, { recording }) => {
      assert.equal(guest.features, version1 | lowBits);
      await guest.activate();
      // No ENABLE comes: without the bit there is none.
      await guest.startQueue(0);
      await recording.completed("queueStart 0");
      await assertWorks(guest);
    },
  );
});

test("rule 3: the used index is read from guest memory at each start", async () => {
  const features = supportedFeatures;
  using ram = new GuestRam([{ size: 1 << 20 }]);
  await serving({}, async (served) => {
    await opened(served, { ram, features }, async (guest) => {
      await guest.activate();
      await guest.startQueue(0);
      for (let i = 0; i < 5; i++) await assertWorks(guest);
      await guest.stopQueue(0);
      // The guest reboots: its rings begin at 0 again.
      guest.queues[0].reset();
      await guest.startQueue(0, { base: 0 });
      for (let i = 0; i < 3; i++) await assertWorks(guest);
      // The back-end is another one: the rings go on where they are.
      const base = await guest.stopQueue(0);
      assert.equal(base, 3);
      await opened(served, { ram, features }, async (other) => {
        const { connection } = other;
        await other.activate();
        await connection.setVringNum(0, guest.queues[0].queueSize);
        await connection.setVringBase(0, base);
        await connection.setVringAddr(guest.vringAddress(0));
        await connection.setVringKick(0, guest.queues[0].kickFd);
        await connection.setVringCall(0, guest.queues[0].callFd);
        await connection.setVringEnable(0, true);
        for (let i = 0; i < 20; i++) await assertWorks(guest);
        connection.close();
        await connection.closed;
      });
    });
  });
});

test("rule 4: a kick that came before ENABLE, or before SET_VRING_KICK, is not lost", async () => {
  await withGuest({}, async (guest) => {
    const { connection } = guest;
    await guest.activate();
    for (const index of [0, 1]) {
      const driver = guest.queues[index];
      const send = () =>
        driver.submit({ readable: [Uint8Array.of(9)], writable: [1] });
      const answers = index === 0 ? [send()] : [];
      await connection.setVringNum(index, driver.queueSize);
      await connection.setVringAddr(guest.vringAddress(index));
      await connection.setVringCall(index, driver.callFd);
      await connection.setVringKick(index, driver.kickFd);
      await connection.barrier();
      if (index === 1) answers.push(send());
      await connection.setVringEnable(index, true);
      const kicks = driver.kicks;
      for (const answer of answers) await within(answer, "the request");
      assert.equal(driver.kicks, kicks);
    }
  });
});

test("rule 4: a start looks at the ring even when nobody ever kicked", async () => {
  await withGuest({}, async (guest) => {
    await guest.activate();
    const driver = guest.queues[0];
    const answer = driver.submit({
      readable: [Uint8Array.of(9)],
      writable: [1],
      kick: false,
    });
    await guest.connection.setVringNum(0, driver.queueSize);
    await guest.connection.setVringAddr(guest.vringAddress(0));
    await guest.connection.setVringCall(0, driver.callFd);
    await guest.connection.setVringKick(0, driver.kickFd);
    await guest.connection.setVringEnable(0, true);
    await within(answer, "the request");
    assert.equal(driver.kicks, 0);
  });
});

test("rule 4: queueKick is called at each start: a kick may have come before", async () => {
  await withGuest({ device: () => ({}) }, async (guest, { recording }) => {
    await guest.activate();
    await guest.connection.setVringNum(0, 16);
    await guest.connection.setVringAddr(guest.vringAddress(0));
    await guest.connection.setVringKick(0, guest.queues[0].kickFd);
    await guest.connection.setVringEnable(0, true);
    await guest.connection.barrier();
    assert.equal(guest.queues[0].kicks, 0);
    assert.equal(recording.kicks.get(0), 1);
  });
});

test("rule 5: NOFD in SET_VRING_CALL means that queue, and that it is not called", async () => {
  await withGuest({}, async (guest) => {
    await guest.start();
    await guest.connection.setVringCall(3, null);
    await guest.connection.barrier();
    const driver = guest.queues[3];
    const calls = driver.calls;
    const answer = driver.submit({
      readable: [Uint8Array.of(5)],
      writable: [1],
    });
    await eventually(() => driver.usedIndex === 1, "the request is used");
    assert.equal(driver.calls, calls);
    driver.poll();
    await answer;
    await assertWorks(guest, 0);
  });
});

test("rule 5: a queue without KICK descriptor is polled", async () => {
  await withGuest({}, async (guest, { recording }) => {
    const { connection } = guest;
    const driver = guest.queues[0];
    await guest.activate();
    await connection.setVringNum(0, driver.queueSize);
    await connection.setVringAddr(guest.vringAddress(0));
    await connection.setVringCall(0, driver.callFd);
    await connection.setVringKick(0, null);
    await connection.setVringEnable(0, true);
    await recording.completed("queueStart 0");
    assert.equal(recording.queues.get(0)?.isPolled, true);
    for (let i = 0; i < 3; i++) {
      await within(
        driver.submit({
          readable: [Uint8Array.of(i)],
          writable: [1],
          kick: false,
        }),
        "a request that nobody kicked for",
      );
    }
  });
});

test("a polled queue, which is never at rest, keeps neither messages nor kicks out", async () => {
  await serving({}, async (served) => {
    await opened(served, {}, async (other) => {
      await other.start();
      await opened(served, {}, async (guest) => {
        await guest.start();
        await guest.connection.setVringKick(0, null);
        for (let i = 0; i < 20; i++) {
          await within(guest.connection.barrier(), "a message");
          await assertWorks(other, i % 4);
          await assertWorks(guest, i % 4);
        }
      });
    });
  });
});

test("rule 6: SET_VRING_KICK does not disable the ring", async () => {
  await withGuest({}, async (guest, { recording }) => {
    const { connection } = guest;
    await guest.activate();
    await connection.setVringEnable(0, true);
    await guest.startQueue(0, { enable: false });
    await recording.completed("queueStart 0");
    await connection.setVringKick(0, guest.queues[0].kickFd);
    await recording.completed("queueStart 0", 2);
    await assertWorks(guest);
  });
});

test("rule 8: REPLY_ACK works for a front-end that never asked for the protocol features", async () => {
  await serving({}, async ({ path }) => {
    const connection = await FrontendConnection.connect(path);
    await connection.setProtocolFeatures(replyAck);
    await connection.setOwner({ ack: true });
    await connection.setFeatures(version1, { ack: true });
    connection.close();
    await connection.closed;
  });
});

test("rule 9: an unknown or failed request with NEED_REPLY is answered by a non-zero ack, and the connection stays", async () => {
  await serving({ errorsExpected: true }, async ({ path, errors }) => {
    const connection = await acking(path);
    assert.notEqual(await connection.acknowledged(1000), 0n);
    await assert.rejects(
      connection.setVringNum(0, 3, { ack: true }),
      RefusedError,
    );
    // Known, but its feature is not offered.
    assert.notEqual(
      await connection.acknowledged(Request.NET_SET_MTU, new Uint8Array(8)),
      0n,
    );
    assert.match(
      (await errors.next()).message,
      /request 1000.*unknown request 1000/,
    );
    assert.match((await errors.next()).message, /SET_VRING_NUM.*queue size 3/);
    assert.match((await errors.next()).message, /NET_SET_MTU.*NET_MTU/);
    await connection.setVringNum(0, 4, { ack: true });
    connection.close();
    await connection.closed;
  });
});

for (
  const [name, id, payload] of [
    ["unknown", 1000, new Uint8Array(0)],
    ["failed", Request.SET_VRING_NUM, Uint8Array.of(0, 0, 0, 0, 3, 0, 0, 0)],
    [
      "failed with a reply of its own",
      Request.GET_VRING_BASE,
      Uint8Array.of(9, 0, 0, 0, 0, 0, 0, 0),
    ],
  ] as const
) {
  test(`rule 9: a request without NEED_REPLY that is ${name} ends the connection`, async () => {
    await serving({ errorsExpected: true }, async ({ path, errors }) => {
      const connection = await acking(path);
      connection.send(id, payload);
      await within(connection.closed, "the end of the connection");
      assert.equal((await errors.next()).code, "PROTOCOL");
      assert.equal(errors.pending.length, 0);
    });
  });
}

test("rule 9: an unknown request is the user's customMessage: reply, ack or failure", async () => {
  const device = () => ({
    ...echo(),
    customMessage: (
      _: unknown,
      message: { request: number; payload: Uint8Array },
    ) => {
      if (message.request === 1002) throw new Error("not today");
      return message.request === 1000
        ? message.payload.slice().reverse()
        : undefined;
    },
  });
  await serving({ device, errorsExpected: true }, async ({ path }) => {
    const connection = await acking(path);
    const reply = await connection.request(1000, Uint8Array.of(1, 2, 3));
    assert.deepEqual(reply.payload, Uint8Array.of(3, 2, 1));
    assert.equal(await connection.acknowledged(1001), 0n);
    assert.notEqual(await connection.acknowledged(1002), 0n);
    connection.close();
    await connection.closed;
  });
});

test("rule 10: a GET_CONFIG that fails is answered by a payload of zero bytes", async () => {
  let isGone = false;
  const device = () => ({
    ...echo(),
    getConfig: () => {
      if (isGone) throw new Error("the disk has gone");
      return Uint8Array.of(1, 2, 3, 4);
    },
  });
  await serving({ device, errorsExpected: true }, async ({ path }) => {
    const connection = await acking(path);
    assert.deepEqual(await connection.getConfig(1, 2), Uint8Array.of(2, 3));
    // Behind the device's own space are zeros, whatever was there before.
    assert.deepEqual(
      await connection.getConfig(2, 6),
      Uint8Array.of(3, 4, 0, 0, 0, 0),
    );
    isGone = true;
    await assert.rejects(connection.getConfig(0, 4), RefusedError);
    isGone = false;
    assert.deepEqual(await connection.getConfig(0, 1), Uint8Array.of(1));
    connection.close();
    await connection.closed;
  });
});

test("rule 10: partial and hostile SET_CONFIG are accepted or refused, by their bounds", async () => {
  const config = new Uint8Array(8);
  let writes = 0;
  const device = () => ({
    ...echo(),
    getConfig: () => config,
    setConfig: (_: unknown, offset: number, data: Uint8Array) => {
      writes++;
      config.set(data, offset);
    },
  });
  await serving({ device, errorsExpected: true }, async ({ path }) => {
    const connection = await acking(path);
    const set = (offset: number, size: number, flags = 0) =>
      connection.setConfig(offset, new Uint8Array(size).fill(offset + 1), {
        ack: true,
        flags,
      });
    await set(2, 3);
    await set(7, 1, 1);
    assert.deepEqual(
      await connection.getConfig(0, 8),
      Uint8Array.of(0, 0, 3, 3, 3, 0, 0, 8),
    );
    for (
      const [offset, size] of [[7, 2], [8, 1], [0, 9], [255, 1], [
        0xffff_ffff,
        1,
      ]]
    ) {
      await assert.rejects(set(offset, size), RefusedError);
    }
    await assert.rejects(set(0, 1, 2), RefusedError);
    // `size` says more than came.
    const lying = Uint8Array.of(0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 1);
    assert.notEqual(
      await connection.acknowledged(Request.SET_CONFIG, lying),
      0n,
    );
    assert.deepEqual(config, Uint8Array.of(0, 0, 3, 3, 3, 0, 0, 8));
    assert.equal(writes, 2);
    connection.close();
    await connection.closed;
  });
});

test("rule 11: a vring index is 32 bits, compared before it is cut", async () => {
  await serving({ errorsExpected: true }, async (served) => {
    const { recording, errors } = served;
    await opened(served, { acksAll: true }, async (guest) => {
      const { connection } = guest;
      await guest.start();
      for (const index of [4, 0x100, 0x10000, 0x1_0001, 0xffff_ffff]) {
        const ack = { ack: true };
        const address = { ...guest.vringAddress(0), index };
        for (
          const attempt of [
            connection.setVringNum(index, 8, ack),
            connection.setVringBase(index, 5, ack),
            connection.setVringAddr(address, ack),
            connection.setVringEnable(index, false, ack),
          ]
        ) await assert.rejects(attempt, RefusedError);
      }
      assert.equal(recording.count("queueStop 0"), 0);
      assert.equal(errors.pending.length, 20);
      for (const { message } of errors.pending) {
        assert.match(message, /: vring \d+ of 4$/);
      }
      await assertWorks(guest);
      await assert.rejects(connection.getVringBase(0x10000), {
        code: "CLOSED",
      });
    });
  });
});

test("rule 15: a message may come in pieces, and several at once", async () => {
  await serving({}, async ({ path, recording }) => {
    const connection = await FrontendConnection.connect(path);
    const features = new Uint8Array(8);
    new DataView(features.buffer).setBigUint64(0, version1, true);
    const bytes = encodeRequest(Request.SET_FEATURES, features);
    for (let at = 0; at < bytes.length; at++) {
      connection.sendRaw(bytes.subarray(at, at + 1));
      await new Promise((resolve) => setImmediate(resolve));
    }
    await recording.completed("deviceFeaturesChanged");
    assert.equal(recording.devices[0].features, version1);

    features.fill(0);
    const all = new Uint8Array(4 * bytes.length);
    for (let i = 0; i < 3; i++) all.set(bytes, i * bytes.length);
    all.set(encodeRequest(Request.SET_FEATURES, features), 3 * bytes.length);
    connection.sendRaw(all.subarray(0, all.length - 3));
    await new Promise((resolve) => setImmediate(resolve));
    connection.sendRaw(all.subarray(all.length - 3));
    await recording.completed("deviceFeaturesChanged", 2);
    assert.equal(recording.devices[0].features, 0n);
    connection.close();
    await connection.closed;
  });
});

for (const count of [9, 32]) {
  test(`rule 16: ${count} descriptors in one message end the connection, and all are closed`, async () => {
    await serving({ errorsExpected: true }, async ({ path, errors }) => {
      const connection = await acking(path);
      await connection.barrier();
      const before = descriptorCount();
      const fds = Array.from({ length: count }, () => core.eventfdCreate());
      connection.sendRaw(encodeRequest(Request.GET_FEATURES, null), fds);
      for (const fd of fds) core.descriptorClose(fd);
      await within(connection.closed, "the end of the connection");
      assert.match((await errors.next()).message, /descriptors/);
      await eventually(() => descriptorCount() < before, "all are closed");
    });
  });
}

test("rule 21: slots and queues are as many after a reconnect, whatever happened before", async () => {
  await serving({}, async (served) => {
    for (let round = 0; round < 3; round++) {
      await opened(served, {}, async (guest) => {
        assert.equal(await guest.connection.getMaxMemSlots(), 509);
        assert.equal(await guest.connection.getQueueNum(), 4);
        await guest.start();
        for (let i = 0; i < 5; i++) {
          await guest.addRegion(guest.ram.addRegion({ size: 4096 }));
        }
        assert.equal(await guest.connection.getMaxMemSlots(), 509);
      });
    }
  });
});

test("rule 23: SET_VRING_ENABLE of a ring without NUM, ADDR and KICK succeeds", async () => {
  await withGuest({}, async (guest, { recording }) => {
    await guest.activate();
    for (let index = 0; index < 4; index++) {
      await guest.connection.setVringEnable(index, true, { ack: true });
    }
    assert.deepEqual(
      recording.begun.filter((op) => op.startsWith("queue")),
      [],
    );
    // Once it is set up it runs: it is enabled.
    await guest.startQueue(2, { enable: false });
    await assertWorks(guest, 2);
  });
});

test("rule 24: regions need not be whole pages, and gpa may equal uva", async () => {
  const regions = [
    { size: 0x20123, gpa: 0x10000n, uva: 0x10000n },
    { size: 0x777, gpa: 0x40000n, uva: 0x40000n },
    { size: 0x10001, gpa: 0x50000n, uva: 0x50000n, mmapOffset: 0x3000 },
  ];
  await withGuest({ guest: { regions } }, async (guest, { recording }) => {
    await guest.start();
    for (let index = 0; index < 4; index++) await assertWorks(guest, index);
    assert.deepEqual(
      recording.devices[0].memory.map(({ size }) => size),
      regions.map(({ size }) => size),
    );
  });
});

test("rule 25: one listener, one socket file, whatever front-ends do", async () => {
  await serving({}, async (served) => {
    const inode = () => statSync(served.path).ino;
    const first = inode();
    for (let round = 0; round < 5; round++) {
      await opened(served, {}, (guest) => guest.start());
      assert.equal(inode(), first);
    }
    // Connections that come while others go are all served.
    await Promise.all(
      Array.from({ length: 8 }, () =>
        opened(served, {}, async (guest) => {
          await guest.start();
          await assertWorks(guest);
        })),
    );
    assert.equal(inode(), first);
  });
});
