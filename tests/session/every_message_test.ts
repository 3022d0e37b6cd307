// One test for each row of the table of the front-end's messages
// (vhost-user-spec.md section 1.2): a valid message is accepted, and answered
// by what its row says: once, with NEED_REPLY or without it, with as many
// descriptors, with the flags that QEMU takes, or not at all. What the messages
// do is the matter of the other files; docs/compliance.md says which.

import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import { check } from "../../ffi/errors.ts";
import {
  FrontendRequest as Request,
  type FrontendRequestId,
  ProtocolFeature,
  RefusedError,
  supportedFeatures,
  type VhostUserDevice,
  VirtioFeature,
} from "../../frontend/mod.ts";
import { featureMask, type TargetOps, virtqueueFeatures } from "../../mod.ts";
import {
  findFrontendRow,
  type FrontendRequestName,
  frontendRequests,
  type FrontendRow,
} from "../../protocol/frontend_request.ts";
import { type Codec, plainWire } from "../../protocol/layout.ts";
import { payloadCodecs, replyDue } from "../../protocol/request_row.ts";
import { isClassMessage } from "../../session/class_messages.ts";
import { handlers } from "../../session/handlers.ts";
import { openUserfault } from "../../session/postcopy.ts";
import type { Message } from "../../transports/transport.ts";
import { test } from "../harness.ts";
import { within } from "../support/wait.ts";
import { session } from "./crypto_session.ts";
import { echo, type ServeOptions, withGuest } from "./served.ts";

const page = 4096;
const uuid = Uint8Array.from({ length: 16 }, (_, i) => i);
/** A device that implements whatever a message may need. */
function everything(): TargetOps {
  return {
    ...echo(),
    getConfig: () => new Uint8Array(64).fill(7),
    setConfig: () => {},
    customMessage: (_, { name }) => name === "CREATE_CRYPTO_SESSION" ? 9n : 0n,
    getSharedObject: () => null,
    transferState: () => {},
  };
}

const usual: ServeOptions = {
  device: everything,
  deviceType: "gpu",
  sharedMemory: [page],
  protocolFeatures: featureMask(
    ProtocolFeature.RARP,
    ProtocolFeature.NET_MTU,
    ProtocolFeature.CRYPTO_SESSION,
  ),
};
const inBand: ServeOptions = {
  ...usual,
  protocolFeatures: featureMask(ProtocolFeature.INBAND_NOTIFICATIONS),
};
const logged: ServeOptions = {
  ...usual,
  protocolFeatures: featureMask(ProtocolFeature.LOG_SHMFD),
};
/** Crash recovery, and what builds on it. */
const recovery: ServeOptions = {
  ...usual,
  protocolFeatures: featureMask(
    ProtocolFeature.INFLIGHT_SHMFD,
    ProtocolFeature.GET_VRING_BASE_INFLIGHT,
    ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN,
  ),
};
const postcopy: ServeOptions = { ...usual, postcopy: true };

/** What a message is sent with. */
class Scene {
  readonly guest: VhostUserDevice;
  readonly #owned: number[] = [];

  constructor(guest: VhostUserDevice) {
    this.guest = guest;
  }

  /** A descriptor that is closed with the scene. */
  own(fd: number): number {
    this.#owned.push(check(fd, "Cannot make a descriptor"));
    return fd;
  }

  /** Sends a message that must come before; its reply's first descriptor. */
  async before(
    id: FrontendRequestId,
    payload: Uint8Array = new Uint8Array(0),
    fds: number[] = [],
  ): Promise<{ reply: Message; fd: number | undefined }> {
    const { connection } = this.guest;
    const reply = await within(
      connection.request(id, payload, { fds, needReply: true }),
      "what comes before",
    );
    const fd = reply.descriptors.take();
    if (fd !== undefined) this.own(fd);
    reply.descriptors.close();
    return { reply, fd };
  }

  close(): void {
    for (const fd of this.#owned) core.descriptorClose(fd);
  }
}

interface Recipe {
  readonly serve?: ServeOptions;
  /** Protocol features acked; all that are offered unless given. */
  readonly protocolFeatures?: bigint;
  /** The decoded payload; null unless given. */
  readonly payload?: (scene: Scene) => unknown;
  readonly fds?: (scene: Scene) => number[];
  /** What must come before. */
  readonly before?: (scene: Scene) => unknown;
  /** What the reply must hold. */
  readonly reply?: (value: never, scene: Scene) => void;
}

const zero = (value: bigint) => assert.equal(value, 0n);
const state = (num: number) => () => ({ index: 1, num });
const eventFile = ({ guest }: Scene) => [guest.queues[1].kickFd];
const withFile = () => ({ index: 1, hasDescriptor: true, reserved: 0n });
const region = ({ guest }: Scene) => guest.ram.regions[0].description;
const regionFile = ({ guest }: Scene) => [guest.ram.regions[0].fd];
const file = (scene: Scene) => [scene.own(core.memfdCreate(page))];
const config = () => ({ offset: 8, flags: 0, data: new Uint8Array(4) });

/** A socket whose other end is ours too. */
function socket(scene: Scene): number[] {
  const ends = new Int32Array(2);
  check(core.socketPair(ends), "Cannot make a socket");
  for (const fd of ends) scene.own(fd);
  return [ends[1]];
}

/** Asks for an inflight region, and keeps what came. */
const inflight = new WeakMap<Scene, { fd: number; payload: unknown }>();
async function askForInflight(scene: Scene): Promise<void> {
  const codec: Codec<unknown> = payloadCodecs.inflight;
  const asked = {
    mmapSize: 0n,
    mmapOffset: 0n,
    numQueues: 4,
    queueSize: 16,
  };
  const { reply, fd } = await scene.before(
    Request.GET_INFLIGHT_FD,
    codec.encode(asked, plainWire),
  );
  const decoded = codec.decode(reply.payload, plainWire);
  assert.ok(decoded.ok && fd !== undefined);
  inflight.set(scene, { fd, payload: decoded.value });
}

const recipes: Readonly<Record<FrontendRequestName, Recipe>> = {
  GET_FEATURES: {
    reply: (value: bigint, { guest }) =>
      assert.equal(value & guest.features, guest.features),
  },
  SET_FEATURES: { payload: ({ guest }) => guest.features },
  SET_OWNER: {},
  RESET_OWNER: {},
  SET_MEM_TABLE: { payload: (scene) => [region(scene)], fds: regionFile },
  SET_LOG_BASE: {
    serve: logged,
    payload: () => ({
      kind: "log",
      mmapSize: BigInt(page),
      mmapOffset: 0n,
    }),
    fds: file,
  },
  SET_LOG_FD: { serve: logged, fds: eventFile },
  SET_VRING_NUM: { payload: state(16) },
  SET_VRING_ADDR: { payload: ({ guest }) => guest.vringAddress(1) },
  SET_VRING_BASE: { payload: state(5) },
  GET_VRING_BASE: {
    before: ({ guest }) => guest.connection.setVringBase(1, 5),
    payload: state(0),
    reply: (value: unknown) => assert.deepEqual(value, { index: 1, num: 5 }),
  },
  SET_VRING_KICK: { payload: withFile, fds: eventFile },
  SET_VRING_CALL: { payload: withFile, fds: eventFile },
  SET_VRING_ERR: { payload: withFile, fds: eventFile },
  GET_PROTOCOL_FEATURES: {
    reply: (value: bigint, { guest }) =>
      assert.equal(value, guest.protocolFeatures),
  },
  SET_PROTOCOL_FEATURES: { payload: ({ guest }) => guest.protocolFeatures },
  GET_QUEUE_NUM: { reply: (value: bigint) => assert.equal(value, 4n) },
  SET_VRING_ENABLE: { payload: state(1) },
  SEND_RARP: { payload: () => 0x0102_0304_0506n },
  NET_SET_MTU: { payload: () => 1500n },
  SET_BACKEND_REQ_FD: { fds: socket },
  IOTLB_MSG: {
    serve: {
      ...usual,
      features: virtqueueFeatures |
        featureMask(VirtioFeature.ACCESS_PLATFORM),
    },
    // With it the entry would lead to a guest address.
    protocolFeatures: ~featureMask(ProtocolFeature.GPA_ADDRESSES),
    before: async ({ guest }) => {
      const { connection, features } = guest;
      const platform = featureMask(VirtioFeature.ACCESS_PLATFORM);
      await connection.setFeatures(features | platform, { ack: true });
      await guest.sendMemory();
    },
    payload: ({ guest }) => ({
      iova: 0n,
      size: BigInt(page),
      uva: guest.ram.regions[0].uva,
      permission: 3,
      type: 2,
    }),
    reply: zero,
  },
  SET_VRING_ENDIAN: { payload: state(0) },
  GET_CONFIG: {
    payload: config,
    reply: (value: unknown) =>
      assert.deepEqual(value, { ...config(), data: new Uint8Array(4).fill(7) }),
  },
  SET_CONFIG: { payload: config },
  CREATE_CRYPTO_SESSION: {
    payload: () => session,
    reply: (value: { sessionId: bigint }) => assert.equal(value.sessionId, 9n),
  },
  CLOSE_CRYPTO_SESSION: { payload: () => 9n },
  POSTCOPY_ADVISE: { serve: postcopy },
  POSTCOPY_LISTEN: {
    serve: postcopy,
    before: (scene) => scene.before(Request.POSTCOPY_ADVISE),
  },
  POSTCOPY_END: {
    serve: postcopy,
    before: async (scene) => {
      await scene.before(Request.POSTCOPY_ADVISE);
      await scene.before(Request.POSTCOPY_LISTEN);
    },
    reply: zero,
  },
  GET_INFLIGHT_FD: {
    serve: recovery,
    payload: () => ({
      mmapSize: 0n,
      mmapOffset: 0n,
      numQueues: 4,
      queueSize: 16,
    }),
    reply: (value: { mmapSize: bigint; numQueues: number }) => {
      assert.ok(value.mmapSize > 0n);
      assert.equal(value.numQueues, 4);
    },
  },
  SET_INFLIGHT_FD: {
    serve: recovery,
    before: askForInflight,
    payload: (scene) => inflight.get(scene)!.payload,
    fds: (scene) => [inflight.get(scene)!.fd],
  },
  GPU_SET_SOCKET: { fds: socket },
  RESET_DEVICE: {},
  VRING_KICK: { serve: inBand, payload: state(0) },
  GET_MAX_MEM_SLOTS: { reply: (value: bigint) => assert.equal(value, 509n) },
  ADD_MEM_REG: { payload: region, fds: regionFile },
  REM_MEM_REG: {
    before: ({ guest }) => guest.sendMemory(),
    payload: region,
  },
  SET_STATUS: { payload: () => 3n },
  GET_STATUS: {
    before: ({ guest }) => guest.connection.setStatus(3),
    reply: (value: bigint) => assert.equal(value, 3n),
  },
  GET_SHARED_OBJECT: { payload: () => uuid },
  SET_DEVICE_STATE_FD: {
    payload: () => ({ direction: 0, phase: 0 }),
    fds: file,
    // Bit 8: no descriptor came with the reply.
    reply: (value: bigint) => assert.equal(value, 0x100n),
  },
  CHECK_DEVICE_STATE: {
    before: (scene) =>
      scene.before(
        Request.SET_DEVICE_STATE_FD,
        new Uint8Array(8),
        file(scene),
      ),
    reply: zero,
  },
  GET_SHMEM_CONFIG: {
    reply: (value: { regionCount: number; sizes: bigint[] }) => {
      assert.equal(value.regionCount, 1);
      assert.equal(value.sizes[0], BigInt(page));
    },
  },
  GET_VRING_BASE_SKIP_DRAIN: {
    serve: recovery,
    before: ({ guest }) => guest.connection.setVringBase(1, 5),
    payload: state(0),
    reply: (value: unknown) => assert.deepEqual(value, { index: 1, num: 5 }),
  },
};

/** Opens a device with everything negotiated that is offered. */
function withScene(
  recipe: Recipe,
  options: { readonly errorsExpected?: boolean },
  body: (scene: Scene) => Promise<void>,
): Promise<void> {
  const serve = { ...usual, ...recipe.serve, ...options };
  const features = supportedFeatures | (serve.features ?? 0n);
  const { protocolFeatures = ~0n } = recipe;
  const guest = { protocolFeatures, features };
  return withGuest({ ...serve, guest }, async (guest) => {
    const scene = new Scene(guest);
    try {
      await guest.connection.setFeatures(guest.features, { ack: true });
      await recipe.before?.(scene);
      await within(body(scene), "the message and what is due for it");
    } finally {
      scene.close();
    }
  });
}

async function exchange(
  row: FrontendRow,
  recipe: Recipe,
  needReply: boolean,
): Promise<void> {
  await withScene(recipe, {}, async (scene) => {
    const { connection, protocolFeatures } = scene.guest;
    const codec: Codec<unknown> = payloadCodecs[row.payload];
    const payload = codec.encode(recipe.payload?.(scene) ?? null, plainWire);
    const fds = recipe.fds?.(scene) ?? [];
    const due = replyDue(row, { needReply, protocolFeatures, postcopy: false });
    if (due.kind === "none") connection.send(row.id, payload, { fds });
    else if (due.kind === "ack") {
      const ack = await connection.acknowledged(row.id, payload, { fds });
      assert.equal(ack, 0n);
    } else {
      const reply = await connection.request(row.id, payload, {
        fds,
        needReply,
      });
      const { count } = reply.descriptors;
      reply.descriptors.close();
      const bounds = row.reply.kind === "reply"
        ? row.reply.descriptors
        : { min: 0, max: 0 };
      assert.ok(count >= bounds.min && count <= bounds.max, `${count} came`);
      const answer: Codec<unknown> = payloadCodecs[due.payload];
      const decoded = answer.decode(reply.payload, plainWire);
      assert.ok(decoded.ok, decoded.ok ? "" : decoded.reason);
      recipe.reply?.(decoded.value as never, scene);
    }
    // Nothing else was answered: the next reply is the next message's.
    await connection.barrier();
  });
}

/** Why a message cannot be tried here; null if it can. */
function refusal(row: FrontendRow): string | null {
  if (handlers[row.id] === undefined && !isClassMessage(row)) {
    return "not in the library";
  }
  if (recipes[row.name].serve !== postcopy) return null;
  try {
    core.descriptorClose(openUserfault());
    return null;
  } catch (error) {
    return (error as Error).message;
  }
}

for (const row of frontendRequests) {
  // Refused on purpose, whatever is negotiated.
  if (row.name === "SET_VRING_ENDIAN") continue;
  const name = `message ${row.id}: ${row.name}`;
  const reason = refusal(row);
  if (reason !== null) {
    test.skip(name, reason);
    continue;
  }
  test(name, async () => {
    const recipe = recipes[row.name];
    await exchange(row, recipe, false);
    await exchange(row, recipe, true);
  });
}

test("message 23: SET_VRING_ENDIAN", async () => {
  const recipe = recipes.SET_VRING_ENDIAN;
  await withScene(recipe, { errorsExpected: true }, async ({ guest }) => {
    const { connection } = guest;
    const big = { index: 1, num: 1 };
    await assert.rejects(
      connection.exchange(Request.SET_VRING_ENDIAN, big, { ack: true }),
      RefusedError,
    );
    await connection.barrier();
  });
});

test("every message: each id of the table has a test here", () => {
  assert.deepEqual(
    Object.keys(recipes),
    frontendRequests.map(({ name }) => name),
  );
  assert.equal(findFrontendRow(frontendRequests.length + 1), undefined);
});
