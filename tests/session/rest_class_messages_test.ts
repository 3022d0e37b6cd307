// Messages of a class of devices, typed through customMessage: 19, 20, 26, 27
// and 33 (vhost-user-spec.md section 1.2).

import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import {
  FrontendRequest as Request,
  ProtocolFeature,
  RefusedError,
  supportedProtocolFeatures,
} from "../../frontend/mod.ts";
import {
  type CustomMessage,
  type CustomReply,
  featureMask,
  registerTarget,
  type TargetOps,
} from "../../mod.ts";
import { plainWire } from "../../protocol/layout.ts";
import { cryptoSession } from "../../protocol/crypto_payload.ts";
import { test } from "../harness.ts";
import { within } from "../support/wait.ts";
import { session } from "./crypto_session.ts";
import { type ServeOptions, withGuest } from "./served.ts";

const classFeatures = featureMask(
  ProtocolFeature.RARP,
  ProtocolFeature.NET_MTU,
  ProtocolFeature.CRYPTO_SESSION,
);
const guest = { protocolFeatures: supportedProtocolFeatures | classFeatures };

/** A target of all classes whose messages go to `take`. */
function classes(
  take: (message: CustomMessage) => CustomReply,
): ServeOptions & { readonly guest: typeof guest } {
  return {
    protocolFeatures: classFeatures,
    deviceType: "gpu",
    device: (): TargetOps => ({ customMessage: (_, message) => take(message) }),
    guest,
  };
}

test("NET_SET_MTU: arrives by name with its value; the device accepts or refuses", async () => {
  const seen: [string | undefined, unknown][] = [];
  const options = classes((message) => {
    seen.push([message.name, message.value]);
    if (message.name !== "NET_SET_MTU") return;
    return message.value > 9000n ? 1n : 0n;
  });
  await withGuest(
    { ...options, errorsExpected: true },
    async ({ connection }, { errors }) => {
      await connection.exchange(Request.NET_SET_MTU, 1500n, { ack: true });
      await connection.exchange(Request.NET_SET_MTU, 1501n);
      await connection.barrier();
      await assert.rejects(
        connection.exchange(Request.NET_SET_MTU, 65535n, { ack: true }),
        RefusedError,
      );
      assert.match((await errors.next()).message, /NET_SET_MTU.*answers 1/);
      assert.deepEqual(seen, [
        ["NET_SET_MTU", 1500n],
        ["NET_SET_MTU", 1501n],
        ["NET_SET_MTU", 65535n],
      ]);
    },
  );
});

test("SEND_RARP: arrives by name with the address in its low six bytes", async () => {
  const seen: [string | undefined, unknown][] = [];
  const options = classes(({ name, value }) => {
    seen.push([name, value]);
  });
  await withGuest(options, async ({ connection }) => {
    const address = 0x5634_1200_5452n;
    await connection.exchange(Request.SEND_RARP, address, { ack: true });
    assert.deepEqual(seen, [["SEND_RARP", address]]);
  });
});

test("CREATE_CRYPTO_SESSION: the session arrives decoded; a bigint is its id", async () => {
  const seen: unknown[] = [];
  const options = classes((message) => {
    seen.push(message.value);
    if (message.name === "CREATE_CRYPTO_SESSION") return 77n;
  });
  await withGuest(options, async ({ connection }) => {
    const made = await connection.exchange(
      Request.CREATE_CRYPTO_SESSION,
      session,
    );
    assert.deepEqual(made, { ...session, sessionId: 77n });
    await connection.exchange(Request.CLOSE_CRYPTO_SESSION, 77n, { ack: true });
    assert.deepEqual(seen, [session, 77n]);
  });
});

test("CREATE_CRYPTO_SESSION: the device may encode the whole reply", async () => {
  const options = classes((message) => {
    if (message.name !== "CREATE_CRYPTO_SESSION") return;
    return cryptoSession.encode({ ...message.value, sessionId: 5n }, plainWire);
  });
  await withGuest(options, async ({ connection }) => {
    const id = Request.CREATE_CRYPTO_SESSION;
    assert.equal((await connection.exchange(id, session)).sessionId, 5n);
  });
});

for (
  const [what, answer, reason] of [
    ["fails", () => {
      throw new Error("no such cipher");
    }, /no such cipher/],
    ["answers nothing", () => {}, /gives no session/],
    ["answers too few bytes", () => new Uint8Array(8), /device's reply/],
  ] as [string, () => CustomReply, RegExp][]
) {
  test(`CREATE_CRYPTO_SESSION: a device that ${what} makes session -1, and the connection stays`, async () => {
    await withGuest(
      { ...classes(answer), errorsExpected: true },
      async ({ connection }, { errors }) => {
        const id = Request.CREATE_CRYPTO_SESSION;
        assert.equal((await connection.exchange(id, session)).sessionId, -1n);
        assert.match((await errors.next()).message, reason);
        await connection.barrier();
      },
    );
  });
}

test("GPU_SET_SOCKET: arrives by name, with its descriptor, on a gpu only", async () => {
  const seen: [string | undefined, boolean][] = [];
  const take = (message: CustomMessage) => {
    const fd = message.takeDescriptor();
    seen.push([message.name, fd !== undefined]);
    if (fd !== undefined) core.descriptorClose(fd);
  };
  const ends = new Int32Array(2);
  core.socketPair(ends);
  try {
    const fds = [ends[1]];
    await withGuest(classes(take), async ({ connection }) => {
      const options = { fds, ack: true };
      await connection.exchange(Request.GPU_SET_SOCKET, null, options);
      assert.deepEqual(seen, [["GPU_SET_SOCKET", true]]);
    });
    await withGuest(
      { ...classes(take), deviceType: undefined, errorsExpected: true },
      async ({ connection }, { errors }) => {
        await assert.rejects(
          connection.exchange(Request.GPU_SET_SOCKET, null, { fds, ack: true }),
          RefusedError,
        );
        assert.match((await errors.next()).message, /is for gpu devices/);
        assert.equal(seen.length, 1);
      },
    );
  } finally {
    for (const fd of ends) core.descriptorClose(fd);
  }
});

test("class messages: GPU_SET_SOCKET without its descriptor, and a short payload, never reach the device", async () => {
  const options = classes(() => assert.fail("the device was asked"));
  await withGuest(
    { ...options, errorsExpected: true },
    async ({ connection }, { errors }) => {
      const none = new Uint8Array(0);
      assert.notEqual(
        await connection.acknowledged(Request.GPU_SET_SOCKET, none),
        0n,
      );
      assert.match((await errors.next()).message, /carries 0 descriptors/);
      assert.notEqual(
        await connection.acknowledged(Request.NET_SET_MTU, new Uint8Array(4)),
        0n,
      );
      assert.match((await errors.next()).message, /NET_SET_MTU/);
    },
  );
});

test("class messages: what the device did not declare is neither offered nor accepted", async () => {
  const options = classes(() => assert.fail("the device was asked"));
  await withGuest(
    {
      ...options,
      protocolFeatures: featureMask(ProtocolFeature.RARP),
      errorsExpected: true,
    },
    async ({ connection, protocolFeatures }, { errors }) => {
      assert.equal(
        protocolFeatures & classFeatures,
        featureMask(ProtocolFeature.RARP),
      );
      await assert.rejects(
        connection.exchange(Request.NET_SET_MTU, 1500n, { ack: true }),
        RefusedError,
      );
      assert.match((await errors.next()).message, /needs NET_MTU/);
      // A reply is due that has no way to say "refused" before negotiation.
      const reply = connection.exchange(Request.CREATE_CRYPTO_SESSION, session);
      await assert.rejects(within(reply, "the end of the connection"));
      assert.match((await errors.next()).message, /needs CRYPTO_SESSION/);
    },
  );
});

test("class messages: without customMessage nothing of the kind is offered", async () => {
  await withGuest(
    { protocolFeatures: classFeatures, guest, device: () => ({}) },
    ({ protocolFeatures }) => {
      assert.equal(protocolFeatures & classFeatures, 0n);
      return Promise.resolve();
    },
  );
});

test("protocolFeatures: only what a device can implement itself is an option", async () => {
  for (const bit of [ProtocolFeature.MQ, ProtocolFeature.XEN_MMAP, 40]) {
    await assert.rejects(
      registerTarget({
        transport: "vhost-user",
        address: "/nowhere",
        protocolFeatures: featureMask(ProtocolFeature.RARP, bit),
        device: () => ({}),
      }),
      { code: "OPTION", message: /Cannot use protocolFeatures/ },
    );
  }
});

test("an unknown request: a bigint is answered as a u64", async () => {
  const options = classes((message) => {
    assert.equal(message.name, undefined);
    return BigInt(message.request);
  });
  await withGuest(options, async ({ connection }) => {
    assert.equal(await connection.acknowledged(4242), 4242n);
  });
});
