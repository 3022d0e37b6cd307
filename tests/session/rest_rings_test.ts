// GPA_ADDRESSES and INBAND_NOTIFICATIONS (vhost-user-spec.md sections 1.2 to
// 1.4 and 1.6).

import assert from "node:assert/strict";
import {
  BackendRequest,
  FrontendRequest as Request,
  ProtocolFeature,
  RefusedError,
  ringAddress,
  supportedProtocolFeatures,
  type VhostUserDevice,
} from "../../frontend/mod.ts";
import { featureMask, type TargetOps } from "../../mod.ts";
import { test } from "../harness.ts";
import { Events, within } from "../support/wait.ts";
import { deferred } from "./deferred.ts";
import { assertWorks, withGuest } from "./served.ts";

const gpaAddresses = featureMask(ProtocolFeature.GPA_ADDRESSES);
const inBand = featureMask(ProtocolFeature.INBAND_NOTIFICATIONS);
const inBandGuest = {
  protocolFeatures: supportedProtocolFeatures | inBand,
};

/** Memory whose uva is not its gpa: what is mistaken for the other fails. */
const gpaGuest = {
  protocolFeatures: supportedProtocolFeatures | gpaAddresses,
};

test("GPA_ADDRESSES: ring addresses are guest physical once it is acked", async () => {
  await withGuest({ guest: gpaGuest }, async (guest, { recording }) => {
    assert.equal(guest.protocolFeatures & gpaAddresses, gpaAddresses);
    const { addresses } = guest.queues[0].ring;
    assert.notEqual(
      addresses.descriptor,
      guest.ram.toUva(addresses.descriptor),
    );
    await guest.activate();
    await guest.startQueue(0);
    for (let i = 0; i < 20; i++) await assertWorks(guest);
    const queue = recording.queues.get(0)!;
    assert.equal(queue.addresses.space, "gpa");
    assert.equal(queue.addresses.used, addresses.used);
  });
});

test("GPA_ADDRESSES: a front-end address is refused where a guest address is due", async () => {
  await withGuest(
    { guest: gpaGuest, errorsExpected: true },
    async (guest, { errors }) => {
      await guest.activate();
      const { connection } = guest;
      await connection.setVringNum(0, 16);
      const { addresses } = guest.queues[0].ring;
      const uva = (value: bigint) => ringAddress(guest.ram.toUva(value));
      await assert.rejects(
        connection.setVringAddr({
          ...guest.vringAddress(0),
          descriptor: uva(addresses.descriptor),
          available: uva(addresses.available),
          used: uva(addresses.used),
        }, { ack: true }),
        RefusedError,
      );
      assert.match((await errors.next()).message, /SET_VRING_ADDR/);
    },
  );
});

test("GPA_ADDRESSES: without it the same addresses are the front-end's", async () => {
  await withGuest({}, async (guest, { recording }) => {
    await guest.activate();
    await guest.startQueue(0);
    await assertWorks(guest);
    assert.equal(recording.queues.get(0)!.addresses.space, "uva");
  });
});

test("GPA_ADDRESSES: taking it back stops the queues that rely on it", async () => {
  await withGuest(
    { guest: gpaGuest, errorsExpected: true },
    async (guest, { recording, errors }) => {
      await guest.activate();
      await guest.startQueue(0);
      await assertWorks(guest);
      await guest.connection.setProtocolFeatures(
        guest.protocolFeatures & ~gpaAddresses,
        { ack: true },
      );
      await recording.completed("queueStop 0");
      // As front-end addresses they are nowhere: it does not start again.
      assert.match((await errors.next()).message, /Cannot start queue 0/);
    },
  );
});

/** Sets a queue up without a kick, a call or an error descriptor. */
async function setUpInBand(guest: VhostUserDevice, index = 0): Promise<void> {
  const { connection } = guest;
  await guest.activate();
  await connection.setVringCall(index, null);
  await connection.setVringNum(index, guest.queues[index].queueSize);
  await connection.setVringBase(index, 0);
  await connection.setVringAddr(guest.vringAddress(index));
  await connection.setVringEnable(index, true);
}

function kick(guest: VhostUserDevice, index = 0, num = 0): Promise<null> {
  return guest.connection.exchange(Request.VRING_KICK, { index, num }, {
    ack: true,
  });
}

/** It is offered on demand only: QEMU acks it without knowing it. */
const withInBandGuest: typeof withGuest = (options, body) =>
  withGuest({ protocolFeatures: inBand, ...options }, body);

test("INBAND_NOTIFICATIONS is offered only when the user asks for it", async () => {
  await withGuest({}, async ({ connection }) => {
    assert.equal(await connection.getProtocolFeatures() & inBand, 0n);
  });
});

test("INBAND_NOTIFICATIONS: a queue works by VRING_KICK and VRING_CALL alone", async () => {
  await withInBandGuest(
    { guest: inBandGuest },
    async (guest, { recording }) => {
      await setUpInBand(guest);
      const { connection, queues: [driver] } = guest;
      const calls = new Events<number>();
      connection.onBackendRequest = (message) => {
        if (message.id !== BackendRequest.BACKEND_VRING_CALL) return 1n;
        assert.equal(message.payload.num, 0);
        calls.push(message.payload.index);
        driver.poll();
      };
      await connection.barrier();
      assert.equal(recording.count("queueStart 0"), 0);
      await kick(guest);
      await recording.completed("queueStart 0");
      assert.equal(recording.queues.get(0)!.isPolled, false);
      for (let i = 0; i < 20; i++) {
        const answer = driver.submit({
          readable: [Uint8Array.of(i)],
          writable: [1],
          kick: false,
        });
        await kick(guest);
        assert.deepEqual(
          [...(await within(answer, "the request")).data[0]],
          [i],
        );
      }
      assert.equal(driver.kicks, 0);
      assert.equal(await calls.next(), 0);
      // Stopped, it is started again by the next kick.
      assert.equal(await connection.getVringBase(0), 20);
      await connection.setVringBase(0, 20);
      await connection.setVringAddr(guest.vringAddress(0));
      await connection.barrier();
      assert.equal(recording.count("queueStart 0"), 1);
      await kick(guest);
      await recording.completed("queueStart 0", 2);
    },
  );
});

test("INBAND_NOTIFICATIONS: each VRING_KICK of a started queue reaches queueKick", async () => {
  await withInBandGuest(
    { guest: inBandGuest, device: () => ({}) },
    async (guest, { recording }) => {
      await setUpInBand(guest);
      await kick(guest);
      // The start itself looks once.
      assert.equal(recording.kicks.get(0), 1);
      await kick(guest);
      await kick(guest);
      assert.equal(recording.kicks.get(0), 3);
    },
  );
});

test("INBAND_NOTIFICATIONS: SET_VRING_KICK without a descriptor still asks for polling", async () => {
  await withInBandGuest(
    { guest: inBandGuest },
    async (guest, { recording }) => {
      await setUpInBand(guest);
      await guest.connection.setVringKick(0, null, { ack: true });
      await recording.completed("queueStart 0");
      assert.equal(recording.queues.get(0)!.isPolled, true);
    },
  );
});

test("INBAND_NOTIFICATIONS: a call descriptor is preferred over the message", async () => {
  await withInBandGuest(
    { guest: inBandGuest, errorsExpected: true },
    async (guest, { recording }) => {
      const seen = new Events<number>();
      guest.connection.onBackendRequest = ({ id }) => seen.push(id);
      await guest.activate();
      await guest.startQueue(0);
      for (let i = 0; i < 5; i++) await assertWorks(guest);
      // Messages keep their order: no call came before this one.
      recording.queues.get(0)!.fail("the test says so");
      assert.equal(await seen.next(), BackendRequest.BACKEND_VRING_ERR);
    },
  );
});

test("INBAND_NOTIFICATIONS: calls are one message until the front-end has read it", async () => {
  await withInBandGuest(
    { guest: inBandGuest, device: () => ({}), errorsExpected: true },
    async (guest, { recording }) => {
      await setUpInBand(guest);
      const calls = new Events<number>();
      const hold = deferred<void>();
      guest.connection.onBackendRequest = async (message) => {
        calls.push(message.id);
        await hold.promise;
      };
      await kick(guest);
      await recording.completed("queueStart 0");
      // The start's own call is the first; all of these are the second.
      assert.equal(await calls.next(), BackendRequest.BACKEND_VRING_CALL);
      for (let i = 0; i < 1000; i++) recording.queues.get(0)!.call();
      await guest.connection.barrier();
      assert.deepEqual(calls.pending, []);
      hold.resolve();
      assert.equal(await calls.next(), BackendRequest.BACKEND_VRING_CALL);
      // Its ack has been read when another one's has.
      recording.queues.get(0)!.fail("the test says so");
      assert.equal(await calls.next(), BackendRequest.BACKEND_VRING_ERR);
      assert.deepEqual(calls.pending, []);
    },
  );
});

test("INBAND_NOTIFICATIONS: a broken ring is told by VRING_ERR", async () => {
  await withInBandGuest(
    {
      guest: inBandGuest,
      errorsExpected: true,
      device: (): TargetOps => ({
        queueKick: (queue) => queue.fail("the test says so"),
      }),
    },
    async (guest, { errors }) => {
      await setUpInBand(guest, 1);
      const broken = new Events<number>();
      guest.connection.onBackendRequest = (message) => {
        if (message.id === BackendRequest.BACKEND_VRING_ERR) {
          broken.push(message.payload.index);
        }
      };
      await kick(guest, 1);
      assert.equal(await broken.next(), 1);
      assert.match((await errors.next()).message, /the test says so/);
    },
  );
});

test("INBAND_NOTIFICATIONS: VRING_KICK is refused with a num, or when it is not negotiated", async () => {
  await withInBandGuest(
    { guest: inBandGuest, errorsExpected: true },
    async (guest, { errors }) => {
      await assert.rejects(kick(guest, 0, 1), RefusedError);
      assert.match((await errors.next()).message, /num 1 is reserved/);
    },
  );
  await withInBandGuest({ errorsExpected: true }, async (guest, { errors }) => {
    await assert.rejects(kick(guest), RefusedError);
    assert.match((await errors.next()).message, /not negotiated/);
  });
});

for (const name of ["BACKEND_REQ", "REPLY_ACK"] as const) {
  test(`INBAND_NOTIFICATIONS without ${name} ends the connection`, async () => {
    await withInBandGuest(
      { errorsExpected: true },
      async (guest, { errors }) => {
        const { connection } = guest;
        const features = guest.protocolFeatures | inBand;
        connection.send(
          Request.SET_PROTOCOL_FEATURES,
          new Uint8Array(
            BigUint64Array.of(
              features & ~featureMask(ProtocolFeature[name]),
            ).buffer,
          ),
          { needReply: true },
        );
        await within(connection.closed, "the end of the connection");
        assert.match(
          (await errors.next()).message,
          new RegExp(`INBAND_NOTIFICATIONS needs .*${name}`),
        );
      },
    );
  });
}
