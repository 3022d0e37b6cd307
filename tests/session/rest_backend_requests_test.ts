// Shared objects, shared memory and host notifiers: messages 41 and 44, and 3
// and 6 to 10 of the back-end (vhost-user-spec.md sections 1.2, 1.3, 1.5).

import assert from "node:assert/strict";
import { statSync } from "node:fs";
import { core } from "../../ffi/core.ts";
import {
  BackendRequest,
  type BackendRequestHandler,
  FrontendRequest as Request,
  MessageSocket,
  ProtocolFeature,
  supportedProtocolFeatures,
  type VhostUserDevice,
  type VhostUserDeviceOptions,
} from "../../frontend/mod.ts";
import {
  type Device,
  featureMask,
  registerTarget,
  type TargetOps,
} from "../../mod.ts";
import { FLAG_REPLY, VERSION } from "../../protocol/message.ts";
import { test } from "../harness.ts";
import { within } from "../support/wait.ts";
import { echo, type Served, type ServeOptions, withGuest } from "./served.ts";

const all = supportedProtocolFeatures | featureMask(
  ProtocolFeature.BACKEND_SEND_FD,
  ProtocolFeature.HOST_NOTIFIER,
  ProtocolFeature.SHARED_OBJECT,
  ProtocolFeature.SHMEM,
);
const uuid = Uint8Array.from({ length: 16 }, (_, i) => 0xa0 + i);
const page = 4096;

/** Which file a descriptor is of, in both runtimes. */
function inodeOf(fd: number): number {
  return statSync(`/proc/self/fd/${fd}`).ino;
}

interface Seen {
  readonly id: number;
  readonly payload: unknown;
  /** Inode of the file that came along. */
  readonly inode: number | undefined;
}

/** Notes what the back-end asks; answers `answer`. */
function front(seen: Seen[], answer = () => 0n): BackendRequestHandler {
  return ({ id, payload }, descriptors) => {
    const fd = descriptors.peek()[0];
    const inode = fd === undefined ? undefined : inodeOf(fd);
    seen.push({ id, payload, inode });
    return answer();
  };
}

/** A guest with one running queue that has agreed to everything. */
function running(
  options: ServeOptions & { readonly guest?: VhostUserDeviceOptions },
  body: (
    device: Device,
    guest: VhostUserDevice,
    served: Served,
  ) => Promise<void>,
): Promise<void> {
  return withGuest({
    device: () => ({ ...echo(), getSharedObject: () => null }),
    sharedMemory: [0, 4 * page, 0, page],
    ...options,
    guest: { protocolFeatures: all, ...options.guest },
  }, async (guest, served) => {
    await guest.activate();
    await guest.startQueue(0);
    await served.recording.completed("queueStart 0");
    await body(served.recording.devices[0], guest, served);
  });
}

/** A file of the test's own; closed after `body`. */
async function withFile(
  body: (fd: number, inode: number) => Promise<void>,
): Promise<void> {
  const fd = core.memfdCreate(page);
  try {
    await body(fd, inodeOf(fd));
  } finally {
    core.descriptorClose(fd);
  }
}

test("SHARED_OBJECT_ADD and REMOVE carry the UUID; a refusal rejects", async () => {
  await running({}, async (device, { connection }) => {
    const seen: Seen[] = [];
    connection.onBackendRequest = front(seen);
    await device.addSharedObject(uuid);
    await device.removeSharedObject(uuid);
    assert.deepEqual(seen, [
      { id: 6, payload: uuid, inode: undefined },
      { id: 7, payload: uuid, inode: undefined },
    ]);
    connection.onBackendRequest = front(seen, () => 22n);
    await assert.rejects(device.addSharedObject(uuid), {
      code: "PROTOCOL",
      message: /BACKEND_SHARED_OBJECT_ADD.*answers 22/,
    });
  });
});

test("SHARED_OBJECT_LOOKUP returns the reply's descriptor, null without one or when refused", async () => {
  await running({}, async (device, { connection }) => {
    const ends = new Int32Array(2);
    core.socketPair(ends);
    using channel = new MessageSocket(ends[0], "the front-end's end");
    const fds = [ends[1]];
    await connection.exchange(Request.SET_BACKEND_REQ_FD, null, {
      fds,
      ack: true,
    });
    core.descriptorClose(ends[1]);
    await withFile(async (fd, inode) => {
      const answers = [
        { value: 0n, fds: [fd], isFound: true },
        { value: 0n, fds: [], isFound: false },
        // A descriptor beside an error is closed.
        { value: 1n, fds: [fd], isFound: false },
      ];
      for (const { value, fds, isFound } of answers) {
        const looked = device.lookUpSharedObject(uuid);
        const request = await within(channel.receive(), "the lookup");
        assert.equal(
          request?.request,
          BackendRequest.BACKEND_SHARED_OBJECT_LOOKUP,
        );
        assert.deepEqual(new Uint8Array(request.payload), uuid);
        channel.send(
          request.request,
          new Uint8Array(BigUint64Array.of(value).buffer),
          { flags: VERSION | FLAG_REPLY, fds },
        );
        const found = await within(looked, "the answer");
        assert.equal(found !== null, isFound);
        if (found === null) continue;
        assert.equal(inodeOf(found), inode);
        core.descriptorClose(found);
      }
      // The channel ends while a lookup waits.
      const looked = device.lookUpSharedObject(uuid);
      channel.close();
      await assert.rejects(within(looked, "the end"), { code: "CLOSED" });
      await channel.closed;
    });
  });
});

test("GET_SHARED_OBJECT: the op's descriptor comes with the reply; null and failure come without", async () => {
  await withFile(async (fd, inode) => {
    const asked: Uint8Array[] = [];
    const device = (): TargetOps => ({
      getSharedObject: (_, uuid) => {
        asked.push(uuid);
        if (uuid[0] === 1) throw new Error("no such object");
        return uuid[0] === 0 ? null : fd;
      },
    });
    await running(
      { device, errorsExpected: true },
      async (_, { connection }, { errors }) => {
        const ask = async (first: number) => {
          const which = Uint8Array.from(uuid);
          which[0] = first;
          const id = Request.GET_SHARED_OBJECT;
          const { payload, descriptors } = await connection.request(id, which);
          assert.deepEqual(asked.at(-1), which);
          assert.equal(payload.length, 0);
          const fd = descriptors.take();
          const inode = fd === undefined ? null : inodeOf(fd);
          if (fd !== undefined) core.descriptorClose(fd);
          descriptors.close();
          return inode;
        };
        assert.equal(await ask(0xa0), inode);
        assert.equal(await ask(0), null);
        assert.equal(await ask(1), null);
        assert.match((await errors.next()).message, /getSharedObject.*no such/);
        assert.equal(await ask(0xa0), inode);
      },
    );
  });
});

test("GET_SHMEM_CONFIG tells the sizes by id, holes and all, in 2056 bytes", async () => {
  await running({}, async (_, { connection }) => {
    const reply = await connection.request(Request.GET_SHMEM_CONFIG);
    assert.equal(reply.payload.length, 2056);
    const config = await connection.exchange(Request.GET_SHMEM_CONFIG, null);
    assert.equal(config.regionCount, 2);
    assert.deepEqual(
      config.sizes.slice(0, 5),
      [0n, BigInt(4 * page), 0n, BigInt(page), 0n],
    );
    assert.equal(config.sizes.length, 256);
  });
});

test("SHMEM_MAP and UNMAP: the file, the range, the access; a whole mapping goes", async () => {
  await running({}, async (device, { connection }) => {
    const seen: Seen[] = [];
    connection.onBackendRequest = front(seen);
    await withFile(async (fd, inode) => {
      const size = 2 * page;
      await device.mapShared(1, {
        fd,
        fdOffset: 3 * page,
        offset: page,
        size,
        isWritable: true,
      });
      await device.mapShared(3, { fd, offset: 0, size: page });
      await device.unmapShared(1, page, size);
      const range = { shmid: 1, shmOffset: BigInt(page), size: BigInt(size) };
      assert.deepEqual(seen, [
        {
          id: 9,
          payload: { ...range, fdOffset: BigInt(3 * page), flags: 1n },
          inode,
        },
        {
          id: 9,
          payload: {
            shmid: 3,
            shmOffset: 0n,
            size: BigInt(page),
            fdOffset: 0n,
            flags: 0n,
          },
          inode,
        },
        {
          id: 10,
          payload: { ...range, fdOffset: 0n, flags: 0n },
          inode: undefined,
        },
      ]);
      // Free again.
      await device.mapShared(1, { fd, offset: 0, size: 4 * page });
    });
  });
});

test("SHMEM_MAP: nothing overlaps and nothing leaves the region, also while a map is under way", async () => {
  await running({}, async (device, { connection }) => {
    const seen: Seen[] = [];
    connection.onBackendRequest = front(seen);
    await withFile(async (fd) => {
      const map = (shmid: number, offset: number, size: number) =>
        device.mapShared(shmid, { fd, offset, size });
      const first = map(1, page, 2 * page);
      const refused = { code: "OPTION", message: /Cannot map/ };
      await assert.rejects(map(1, 2 * page, page), refused);
      await first;
      for (
        const [shmid, offset, size] of [
          [1, page, 2 * page],
          [1, 0, 4 * page],
          [1, 2 * page, page],
          [1, 3 * page, 2 * page],
          [1, 4 * page, page],
          [1, 3 * page, 0],
          [1, -page, page],
          [0, 0, page],
          [2, 0, page],
          [256, 0, page],
        ]
      ) await assert.rejects(map(shmid, offset, size), refused);
      await map(1, 0, page);
      await map(1, 3 * page, page);
      assert.equal(seen.length, 3);
      const noWhole = { code: "OPTION", message: /no whole mapping/ };
      await assert.rejects(device.unmapShared(1, page, page), noWhole);
      await assert.rejects(device.unmapShared(1, 0, 4 * page), noWhole);
      const gone = device.unmapShared(1, page, 2 * page);
      await assert.rejects(device.unmapShared(1, page, 2 * page), noWhole);
      await gone;
      assert.equal(seen.length, 4);
    });
  });
});

test("SHMEM_MAP: what the front-end refuses is not mapped; what it keeps stays mapped", async () => {
  await running({}, async (device, { connection }) => {
    let answer = 1n;
    connection.onBackendRequest = () => answer;
    await withFile(async (fd) => {
      const mapping = { fd, offset: 0, size: page };
      await assert.rejects(device.mapShared(1, mapping), { code: "PROTOCOL" });
      answer = 0n;
      await device.mapShared(1, mapping);
      answer = 1n;
      const refused = { code: "PROTOCOL" };
      await assert.rejects(device.unmapShared(1, 0, page), refused);
      await assert.rejects(device.mapShared(1, mapping), { code: "OPTION" });
      answer = 0n;
      await device.unmapShared(1, 0, page);
    });
  });
});

for (const by of ["RESET_DEVICE", "status 0"]) {
  test(`SHMEM: a reset by ${by} leaves nothing mapped`, async () => {
    await running({}, async (device, guest, { recording }) => {
      const { connection } = guest;
      const seen: Seen[] = [];
      connection.onBackendRequest = front(seen);
      await withFile(async (fd) => {
        await device.mapShared(1, { fd, offset: 0, size: 4 * page });
        if (by === "RESET_DEVICE") await connection.resetDevice({ ack: true });
        else await connection.setStatus(0, { ack: true });
        await guest.startQueue(0, { base: 0 });
        await recording.completed("queueStart 0", 2);
        await device.mapShared(1, { fd, offset: page, size: page });
        // The front-end unmaps by itself: nothing asked it to.
        assert.deepEqual(seen.map(({ id }) => id), [9, 9]);
      });
    });
  });
}

test("VRING_HOST_NOTIFIER: the queue's area and file, then none; a refusal rejects", async () => {
  await running({}, async (_, { connection }, { recording }) => {
    const seen: Seen[] = [];
    connection.onBackendRequest = front(seen);
    const queue = recording.queues.get(0)!;
    await withFile(async (fd, inode) => {
      await queue.setHostNotifier({ fd, offset: page, size: page });
      await queue.setHostNotifier(null);
      const vring = { index: 0, hasDescriptor: true, reserved: 0n };
      assert.deepEqual(seen, [
        {
          id: 3,
          payload: { vring, size: BigInt(page), offset: BigInt(page) },
          inode,
        },
        {
          id: 3,
          payload: {
            vring: { ...vring, hasDescriptor: false },
            size: 0n,
            offset: 0n,
          },
          inode: undefined,
        },
      ]);
      connection.onBackendRequest = front(seen, () => 1n);
      const area = { fd, offset: 0, size: page };
      const refused = { code: "PROTOCOL", message: /answers 1/ };
      await assert.rejects(queue.setHostNotifier(area), refused);
      await connection.getVringBase(0);
      await assert.rejects(queue.setHostNotifier(area), { code: "CLOSED" });
    });
  });
});

test("trace: the device's own requests and their answers have a line each, with their descriptors", async () => {
  const lines: string[] = [];
  const trace = (line: string) => void lines.push(line);
  await running({ trace }, async (device, { connection }, { recording }) => {
    const queue = recording.queues.get(0)!;
    await withFile(async (fd) => {
      lines.length = 0;
      connection.onBackendRequest = front([]);
      await queue.setHostNotifier({ fd, offset: page, size: page });
      connection.onBackendRequest = front([], () => 22n);
      await assert.rejects(device.addSharedObject(uuid));
      connection.onBackendRequest = front([]);
      await device.lookUpSharedObject(uuid);
    });
    const text = "a0a1a2a3a4a5a6a7a8a9aaabacadaeaf";
    assert.deepEqual(lines, [
      "-> 3 BACKEND_VRING_HOST_NOTIFIER_MSG index=0 size=4096 offset=4096 fds=1 [need_reply]",
      "<- 3 BACKEND_VRING_HOST_NOTIFIER_MSG ack=0",
      `-> 6 BACKEND_SHARED_OBJECT_ADD uuid=${text} [need_reply]`,
      "<- 6 BACKEND_SHARED_OBJECT_ADD ack=22",
      `-> 8 BACKEND_SHARED_OBJECT_LOOKUP uuid=${text} [need_reply]`,
      "<- 8 BACKEND_SHARED_OBJECT_LOOKUP u64=0x0",
    ]);
  });
});

test("requests of the device: refused when their feature is not negotiated", async () => {
  const guest = { protocolFeatures: supportedProtocolFeatures };
  await running({ guest }, async (device, _, { recording }) => {
    const queue = recording.queues.get(0)!;
    await withFile(async (fd) => {
      const area = { fd, offset: 0, size: page };
      for (
        const attempt of [
          () => device.addSharedObject(uuid),
          () => device.lookUpSharedObject(uuid),
          () => device.mapShared(1, area),
          () => queue.setHostNotifier(area),
        ]
      ) {
        await assert.rejects(attempt, {
          code: "PROTOCOL",
          message: /not negotiated/,
        });
      }
    });
  });
});

test("requests of the device: none while all queues are stopped (suspended)", async () => {
  await running({}, async (device, { connection }) => {
    const seen: Seen[] = [];
    connection.onBackendRequest = front(seen);
    await connection.getVringBase(0);
    await assert.rejects(device.addSharedObject(uuid), {
      code: "PROTOCOL",
      message: /all queues are stopped/,
    });
    assert.deepEqual(seen, []);
  });
});

test("SHARED_OBJECT and SHMEM are offered only by devices that have them", async () => {
  const mask = featureMask(
    ProtocolFeature.SHARED_OBJECT,
    ProtocolFeature.SHMEM,
  );
  const guest = { protocolFeatures: all };
  await withGuest({ guest }, ({ protocolFeatures }) => {
    assert.equal(protocolFeatures & mask, 0n);
    return Promise.resolve();
  });
});

test("sharedMemory: sizes are whole pages, of at most 256 regions", async () => {
  for (
    const sharedMemory of [[100], [-page], [0.5], [2 ** 60], Array(257).fill(0)]
  ) {
    await assert.rejects(
      registerTarget({
        transport: "vhost-user",
        address: "/nowhere",
        sharedMemory,
        device: () => ({}),
      }),
      { code: "OPTION", message: /Cannot use sharedMemory/ },
    );
  }
});
