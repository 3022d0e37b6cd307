import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import { check } from "../../ffi/errors.ts";
import {
  BackendRequest,
  FrontendConnection,
  FrontendRequest as Request,
  RefusedError,
} from "../../frontend/mod.ts";
import { FLAG_NEED_REPLY, VERSION } from "../../protocol/message.ts";
import { ScriptedBackend } from "../support/scripted_backend.ts";
import { u64, withScriptedBackend } from "../support/scripted_backend.ts";
import { test } from "../harness.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";
import { withSocketPath } from "../support/temporary.ts";
import { within } from "../support/wait.ts";

test("replies belong to the requests in order", async () => {
  await withScriptedBackend(async (connection, backend) => {
    const features = connection.getFeatures();
    const status = connection.getStatus();
    const base = connection.getVringBase(3);
    const messages = [
      await backend.next(Request.GET_FEATURES),
      await backend.next(Request.GET_STATUS),
      await backend.next(Request.GET_VRING_BASE),
    ];
    assert.deepEqual([...messages[2].payload], [3, 0, 0, 0, 0, 0, 0, 0]);
    assert.deepEqual(messages.map(({ flags }) => flags), [1, 1, 1]);
    backend.reply(messages[0], u64((1n << 63n) | 5n));
    backend.reply(messages[1], u64(15n));
    backend.reply(messages[2], Uint8Array.of(3, 0, 0, 0, 0x34, 0x12, 0, 0));
    assert.equal(await features, (1n << 63n) | 5n);
    assert.equal(await status, 15);
    assert.equal(await base, 0x1234);
  });
});

test("an ack is asked for by NEED_REPLY, and a non-zero one is a refusal", async () => {
  await withScriptedBackend(async (connection, backend) => {
    const plain = connection.setOwner();
    await plain;
    assert.equal((await backend.next(Request.SET_OWNER)).flags, VERSION);
    const good = connection.setVringNum(1, 256, { ack: true });
    const first = await backend.next(Request.SET_VRING_NUM);
    assert.equal(first.flags, VERSION | FLAG_NEED_REPLY);
    assert.deepEqual([...first.payload], [1, 0, 0, 0, 0, 1, 0, 0]);
    backend.reply(first, u64(0n));
    await good;
    const refused = connection.setVringNum(1, 3, { ack: true });
    backend.reply(await backend.next(Request.SET_VRING_NUM), u64(22n));
    await assert.rejects(refused, (error: RefusedError) => {
      assert.ok(error instanceof RefusedError);
      assert.equal(error.request, "SET_VRING_NUM");
      assert.equal(error.ack, 22n);
      return true;
    });
    const raw = connection.acknowledged(Request.SET_OWNER);
    backend.reply(await backend.next(), u64(7n));
    assert.equal(await raw, 7n);
    assert.ok(connection.isOpen);
  });
});

test("an empty reply to GET_CONFIG is a refusal", async () => {
  await withScriptedBackend(async (connection, backend) => {
    const config = connection.getConfig(0, 60);
    const message = await backend.next(Request.GET_CONFIG);
    assert.equal(message.payload.length, 12 + 60);
    backend.reply(message, new Uint8Array(0));
    await assert.rejects(config, { name: "RefusedError" });
  });
});

for (
  const [what, options] of [
    ["NEED_REPLY echoed", { flags: 0xd }],
    ["no REPLY bit", { flags: 0x1 }],
    ["another version", { flags: 0x6 }],
    ["another request's id", { request: Request.GET_STATUS }],
  ] as const
) {
  test(`a reply with ${what} ends the connection`, async () => {
    await withScriptedBackend(async (connection, backend) => {
      const features = connection.getFeatures();
      const message = await backend.next(Request.GET_FEATURES);
      backend.reply(message, u64(0n), options);
      await assert.rejects(features, { code: "PROTOCOL" });
      assert.equal((await connection.closed)?.code, "PROTOCOL");
    });
  });
}

test("a reply of the wrong size is refused", async () => {
  await withScriptedBackend(async (connection, backend) => {
    const features = connection.getFeatures();
    backend.reply(await backend.next(), new Uint8Array(4));
    await assert.rejects(features, { code: "PROTOCOL" });
  });
});

test("what waits rejects when the back-end goes", async () => {
  await withScriptedBackend(async (connection, backend) => {
    const features = connection.getFeatures();
    const any = connection.receive();
    (await backend.next()).descriptors.close();
    backend.close();
    await assert.rejects(features, { code: "CLOSED" });
    assert.equal(await any, null);
    assert.equal(await connection.closed, undefined);
    await assert.rejects(connection.getFeatures(), { code: "CLOSED" });
    await assert.rejects(connection.setOwner(), { code: "CLOSED" });
    assert.equal(await connection.receive(), null);
    assert.equal(connection.sendRaw(new Uint8Array(1)), 0);
  });
});

test("descriptors go with the message and stay the sender's", async () => {
  await withoutDescriptorLeak(async () => {
    await withScriptedBackend(async (connection, backend) => {
      const fd = core.eventfdCreate();
      await connection.setVringKick(2, fd);
      await connection.setVringCall(2, null);
      const kick = await backend.next(Request.SET_VRING_KICK);
      assert.deepEqual([...kick.payload], [2, 0, 0, 0, 0, 0, 0, 0]);
      assert.equal(kick.descriptors.count, 1);
      const received = kick.descriptors.take()!;
      core.eventfdSignal(received);
      assert.equal(core.eventfdTake(fd), 1);
      core.descriptorClose(received);
      core.descriptorClose(fd);
      const call = await backend.next(Request.SET_VRING_CALL);
      assert.deepEqual([...call.payload], [2, 1, 0, 0, 0, 0, 0, 0]);
      assert.equal(call.descriptors.count, 0);
    });
  });
});

test("a message can be sent in pieces, and its answer received", async () => {
  await withScriptedBackend(async (connection, backend) => {
    const bytes = Uint8Array.of(1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0);
    assert.equal(connection.sendRaw(bytes.subarray(0, 5)), 5);
    assert.equal(connection.sendRaw(bytes.subarray(5)), 7);
    const message = await backend.next(Request.GET_FEATURES);
    backend.reply(message, u64(42n));
    const answer = await connection.receive();
    assert.deepEqual(answer?.payload, u64(42n));
  });
});

test("sending raw ends when the socket is full", async () => {
  await withScriptedBackend((connection) => {
    const bytes = new Uint8Array(65536);
    let total = 0;
    for (;;) {
      const count = connection.sendRaw(bytes);
      if (count === 0) break;
      total += count;
    }
    assert.ok(total > 0);
    return Promise.resolve();
  });
});

test("unread messages and their descriptors go with the connection", async () => {
  await withoutDescriptorLeak(async () => {
    await withScriptedBackend(async (connection, backend) => {
      const fd = core.eventfdCreate();
      const message = { request: 1, flags: 5, payload: u64(1n), fds: [fd, fd] };
      backend.channel.send(message);
      backend.channel.send(message);
      core.descriptorClose(fd);
      const first = await connection.receive();
      assert.equal(first?.descriptors.count, 2);
      first?.descriptors.close();
    });
  });
});

test("a paused connection leaves replies in the socket", async () => {
  await withScriptedBackend(async (connection, backend) => {
    connection.pause();
    // One read is always under way: it takes the first.
    for (let i = 0n; i < 3n; i++) {
      backend.channel.send({ request: 1, flags: 5, payload: u64(i) });
    }
    const first = await connection.receive();
    assert.deepEqual(first?.payload, u64(0n));
    let isTaken = false;
    const second = connection.receive().finally(() => isTaken = true);
    const turn = connection.acknowledged(Request.SET_OWNER);
    const message = await backend.next(Request.SET_OWNER);
    assert.equal(isTaken, false);
    connection.resume();
    assert.deepEqual((await second)?.payload, u64(1n));
    backend.reply(message, u64(0n));
    // The third unasked message comes in the place of the ack.
    await assert.rejects(turn, { code: "PROTOCOL" });
  });
});

test("the back-end's own requests are answered as the handler says", async () => {
  await withoutDescriptorLeak(async () => {
    await withScriptedBackend(async (connection, backend) => {
      const seen: string[] = [];
      connection.onBackendRequest = (message) => {
        seen.push(message.row.name);
        if (message.id === 4) throw new Error("no");
        return message.id === 2 ? 5n : undefined;
      };
      const requests = await connection.setBackendChannel();
      const message = await backend.next(Request.SET_BACKEND_REQ_FD);
      const own = new ScriptedBackend(message.descriptors.take()!);
      const ask = async (request: number, payload: Uint8Array) => {
        own.channel.send({ request, flags: 0x9, payload });
        return (await own.next(request)).payload;
      };
      assert.deepEqual(await ask(2, new Uint8Array(0)), u64(5n));
      assert.deepEqual(await ask(4, new Uint8Array(8)), u64(1n));
      own.channel.send({ request: 2, flags: 0x1, payload: new Uint8Array(0) });
      assert.deepEqual(await ask(5, new Uint8Array(8)), u64(0n));
      assert.deepEqual(seen, [
        "BACKEND_CONFIG_CHANGE_MSG",
        "BACKEND_VRING_CALL",
        "BACKEND_CONFIG_CHANGE_MSG",
        "BACKEND_VRING_ERR",
      ]);
      own.channel.send({ request: 99, flags: 1, payload: new Uint8Array(0) });
      assert.equal((await requests.closed)?.code, "PROTOCOL");
      own.close();
    });
  });
});

test("an answer may carry a descriptor, and a lookup is answered unasked", async () => {
  await withoutDescriptorLeak(async () => {
    await withScriptedBackend(async (connection, backend) => {
      const fd = check(core.memfdCreate(4096), "Cannot make a file");
      connection.onBackendRequest = ({ id }) =>
        id === BackendRequest.BACKEND_SHARED_OBJECT_LOOKUP
          ? { value: 0n, fds: [fd] }
          : 0n;
      await connection.setBackendChannel();
      const message = await backend.next(Request.SET_BACKEND_REQ_FD);
      const own = new ScriptedBackend(message.descriptors.take()!);
      const request = BackendRequest.BACKEND_SHARED_OBJECT_LOOKUP;
      // By the table it has a reply, so NEED_REPLY makes no difference.
      for (const flags of [0x9, 0x1]) {
        own.channel.send({ request, flags, payload: new Uint8Array(16) });
        const reply = await own.next(request);
        assert.equal(reply.flags, 0x5);
        assert.deepEqual(reply.payload, u64(0n));
        const received = reply.descriptors.take()!;
        assert.equal(core.fileSize(received), 4096);
        core.descriptorClose(received);
      }
      core.descriptorClose(fd);
      own.close();
    });
  });
});

test("connecting to nobody is one sentence and leaves nothing", async () => {
  await withoutDescriptorLeak(async () => {
    await withSocketPath(async (path) => {
      await assert.rejects(FrontendConnection.connect(path), {
        code: "SYSTEM",
        message: `Cannot connect to ${path}: ENOENT`,
      });
    });
  });
});

test("a connection closed here ends for the back-end at once", async () => {
  await withScriptedBackend(async (connection, backend) => {
    const end = backend.channel.receive();
    connection.close();
    assert.equal(await within(end, "end of the stream"), null);
    assert.equal(await connection.closed, undefined);
  });
});
