import assert from "node:assert/strict";
import { test } from "../harness.ts";
import {
  BackendRequest,
  backendRequests,
  checkBackendGate,
  checkGate,
  decodeBackendRequest,
  decodeFrontendRequest,
  featureMask,
  findBackendRow,
  findFrontendRow,
  FrontendRequest,
  frontendRequests,
  type FrontendRow,
  MAX_DESCRIPTORS,
  MAX_PAYLOAD_SIZE,
  type Negotiation,
  payloadCodecs,
  type PayloadOf,
  plainWire,
  ProtocolFeature,
  protocolFeatureName,
  replyDue,
  type ReplyOf,
  type RequestRow,
  VirtioFeature,
  virtioFeatureName,
} from "../../protocol/mod.ts";
import { hex } from "./hex.ts";

function row(id: number): FrontendRow {
  const found = findFrontendRow(id);
  assert.ok(found, `no row ${id}`);
  return found;
}

/** `gate: fds: reply`, one line per message, to be read against the spec. */
function summarize(row: RequestRow): string {
  const { gate, descriptors, reply } = row;
  const gateText = gate.kind === "virtio"
    ? virtioFeatureName(gate.bit)
    : gate.kind === "protocol"
    ? gate.bits.map(protocolFeatureName).join("+")
    : gate.kind === "device"
    ? gate.device
    : gate.kind;
  const fds = descriptors.kind === "count"
    ? `${descriptors.min}-${descriptors.max}`
    : descriptors.kind;
  const replyText = reply.kind === "reply"
    ? `${reply.payload}+${reply.descriptors.min}-${reply.descriptors.max}`
    : reply.kind === "replyIf"
    ? `${reply.payload} if ${reply.condition}`
    : "ack";
  return `${row.id} ${row.name}: ${row.payload}, ${fds}, ${gateText}, ` +
    replyText;
}

test("protocol: the front-end table says what the specification says", () => {
  assert.deepEqual(
    frontendRequests.map(summarize),
    [
      "1 GET_FEATURES: none, 0-0, always, u64+0-0",
      "2 SET_FEATURES: u64, 0-0, always, ack",
      "3 SET_OWNER: none, 0-0, always, ack",
      "4 RESET_OWNER: none, 0-0, always, ack",
      "5 SET_MEM_TABLE: memoryTable, perRegion, always, memoryTable if postcopy",
      "6 SET_LOG_BASE: logBase, byLog, LOG_SHMFD, u64 if logShmfd",
      "7 SET_LOG_FD: none, 1-1, always, ack",
      "8 SET_VRING_NUM: vringState, 0-0, always, ack",
      "9 SET_VRING_ADDR: vringAddress, 0-0, always, ack",
      "10 SET_VRING_BASE: vringState, 0-0, always, ack",
      "11 GET_VRING_BASE: vringState, 0-0, always, vringState+0-0",
      "12 SET_VRING_KICK: vringDescriptorIndex, byNofd, always, ack",
      "13 SET_VRING_CALL: vringDescriptorIndex, byNofd, always, ack",
      "14 SET_VRING_ERR: vringDescriptorIndex, byNofd, always, ack",
      "15 GET_PROTOCOL_FEATURES: none, 0-0, protocolFeaturesOffered, u64+0-0",
      "16 SET_PROTOCOL_FEATURES: u64, 0-0, protocolFeaturesOffered, ack",
      "17 GET_QUEUE_NUM: none, 0-0, MQ, u64+0-0",
      "18 SET_VRING_ENABLE: vringState, 0-0, PROTOCOL_FEATURES, ack",
      "19 SEND_RARP: u64, 0-0, RARP, ack",
      "20 NET_SET_MTU: u64, 0-0, NET_MTU, ack",
      "21 SET_BACKEND_REQ_FD: none, 1-1, BACKEND_REQ, ack",
      "22 IOTLB_MSG: iotlb, 0-0, ACCESS_PLATFORM, u64+0-0",
      "23 SET_VRING_ENDIAN: vringState, 0-0, CROSS_ENDIAN, ack",
      "24 GET_CONFIG: config, 0-0, CONFIG, config+0-0",
      "25 SET_CONFIG: config, 0-0, CONFIG, ack",
      "26 CREATE_CRYPTO_SESSION: cryptoSession, 0-0, CRYPTO_SESSION, cryptoSession+0-0",
      "27 CLOSE_CRYPTO_SESSION: u64, 0-0, CRYPTO_SESSION, ack",
      "28 POSTCOPY_ADVISE: none, 0-0, PAGEFAULT, none+1-1",
      "29 POSTCOPY_LISTEN: none, 0-0, PAGEFAULT, ack",
      "30 POSTCOPY_END: none, 0-0, PAGEFAULT, u64+0-0",
      "31 GET_INFLIGHT_FD: inflight, 0-0, INFLIGHT_SHMFD, inflight+1-1",
      "32 SET_INFLIGHT_FD: inflight, 1-1, INFLIGHT_SHMFD, ack",
      "33 GPU_SET_SOCKET: none, 1-1, gpu, ack",
      "34 RESET_DEVICE: none, 0-0, RESET_DEVICE, ack",
      "35 VRING_KICK: vringState, 0-0, INBAND_NOTIFICATIONS, ack",
      "36 GET_MAX_MEM_SLOTS: none, 0-0, CONFIGURE_MEM_SLOTS, u64+0-0",
      "37 ADD_MEM_REG: singleMemoryRegion, 1-1, CONFIGURE_MEM_SLOTS, singleMemoryRegion if postcopy",
      "38 REM_MEM_REG: singleMemoryRegion, 0-1, CONFIGURE_MEM_SLOTS, ack",
      "39 SET_STATUS: u64, 0-0, STATUS, ack",
      "40 GET_STATUS: none, 0-0, STATUS, u64+0-0",
      "41 GET_SHARED_OBJECT: uuid, 0-0, SHARED_OBJECT, none+0-1",
      "42 SET_DEVICE_STATE_FD: deviceStateTransfer, 1-1, DEVICE_STATE, u64+0-1",
      "43 CHECK_DEVICE_STATE: none, 0-0, DEVICE_STATE, u64+0-0",
      "44 GET_SHMEM_CONFIG: none, 0-0, SHMEM, shmemConfig+0-0",
      "45 GET_VRING_BASE_SKIP_DRAIN: vringState, 0-0, " +
      "GET_VRING_BASE_SKIP_DRAIN+GET_VRING_BASE_INFLIGHT+INFLIGHT_SHMFD, " +
      "vringState+0-0",
    ],
  );
});

test("protocol: the back-end table says what the specification says", () => {
  assert.deepEqual(
    backendRequests.map(summarize),
    [
      "1 BACKEND_IOTLB_MSG: iotlb, 0-0, ACCESS_PLATFORM, ack",
      "2 BACKEND_CONFIG_CHANGE_MSG: none, 0-0, CONFIG, ack",
      "3 BACKEND_VRING_HOST_NOTIFIER_MSG: vringArea, byNofd, HOST_NOTIFIER, ack",
      "4 BACKEND_VRING_CALL: vringState, 0-0, INBAND_NOTIFICATIONS, ack",
      "5 BACKEND_VRING_ERR: vringState, 0-0, INBAND_NOTIFICATIONS, ack",
      "6 BACKEND_SHARED_OBJECT_ADD: uuid, 0-0, SHARED_OBJECT, ack",
      "7 BACKEND_SHARED_OBJECT_REMOVE: uuid, 0-0, SHARED_OBJECT, ack",
      "8 BACKEND_SHARED_OBJECT_LOOKUP: uuid, 0-0, SHARED_OBJECT, u64+0-1",
      "9 BACKEND_SHMEM_MAP: shmemMapping, 1-1, SHMEM, ack",
      "10 BACKEND_SHMEM_UNMAP: shmemMapping, 0-0, SHMEM, ack",
    ],
  );
});

test("protocol: ids run without hole, names and lookups agree", () => {
  assert.deepEqual(
    frontendRequests.map(({ id }) => id),
    Array.from({ length: 45 }, (_, i) => i + 1),
  );
  assert.deepEqual(
    backendRequests.map(({ id }) => id),
    Array.from({ length: 10 }, (_, i) => i + 1),
  );
  for (const expected of frontendRequests) {
    assert.equal(findFrontendRow(expected.id), expected);
    assert.equal(FrontendRequest[expected.name], expected.id);
  }
  for (const expected of backendRequests) {
    assert.equal(findBackendRow(expected.id), expected);
    assert.equal(BackendRequest[expected.name], expected.id);
  }
  assert.equal(Object.keys(FrontendRequest).length, 45);
  assert.equal(Object.keys(BackendRequest).length, 10);
});

test("protocol: ids that do not exist have no row", () => {
  for (const id of [0, 46, 0x1_0001, 0xffff_ffff, -1, NaN]) {
    assert.equal(findFrontendRow(id), undefined);
  }
  for (const id of [0, 11, 0xffff_ffff]) {
    assert.equal(findBackendRow(id), undefined);
  }
});

test("protocol: every payload of the tables fits the limits", () => {
  for (const { payload, descriptors } of frontendRequests) {
    assert.ok(payloadCodecs[payload].maxSize <= MAX_PAYLOAD_SIZE);
    if (descriptors.kind === "count") {
      assert.ok(descriptors.max <= MAX_DESCRIPTORS);
    }
  }
});

test("protocol: messages that name a vring are marked", () => {
  assert.deepEqual(
    frontendRequests.filter(({ perVring }) => perVring).map(({ id }) => id),
    [8, 9, 10, 11, 12, 13, 14, 18, 23, 35, 45],
  );
  assert.deepEqual(
    backendRequests.filter(({ perVring }) => perVring).map(({ id }) => id),
    [3, 4, 5],
  );
});

const nothing: Negotiation = {
  offeredFeatures: 0n,
  features: 0n,
  protocolFeatures: 0n,
};

test("protocol: with nothing negotiated only the ungated messages pass", () => {
  const open = frontendRequests.filter((row) =>
    checkGate(row, nothing) === null
  );
  assert.deepEqual(open.map(({ id }) => id), [
    ...[1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14],
  ]);
});

test("protocol: GET_PROTOCOL_FEATURES needs bit 30 offered, not acked", () => {
  const offered = {
    ...nothing,
    offeredFeatures: featureMask(VirtioFeature.PROTOCOL_FEATURES),
  };
  for (const id of [15, 16]) {
    assert.match(
      checkGate(row(id), nothing) ?? "",
      /needs PROTOCOL_FEATURES, which is not offered/,
    );
    assert.equal(checkGate(row(id), offered), null);
  }
  assert.match(
    checkGate(row(18), offered) ?? "",
    /SET_VRING_ENABLE needs PROTOCOL_FEATURES, which is not negotiated/,
  );
});

test("protocol: each protocol feature opens its messages and no others", () => {
  for (const gated of frontendRequests) {
    if (gated.gate.kind !== "protocol") continue;
    const bits = gated.gate.bits;
    const with_ = { ...nothing, protocolFeatures: featureMask(...bits) };
    assert.equal(checkGate(gated, with_), null);
    for (const missing of bits) {
      const all = (1n << 64n) - 1n;
      const without = {
        offeredFeatures: all,
        features: all,
        protocolFeatures: all & ~featureMask(missing),
      };
      assert.equal(
        checkGate(gated, without),
        `${gated.name} needs ${
          protocolFeatureName(missing)
        }, which is not negotiated`,
      );
    }
  }
});

test("protocol: GPU_SET_SOCKET is for gpu devices", () => {
  assert.equal(
    checkGate(row(33), nothing),
    "GPU_SET_SOCKET is for gpu devices",
  );
  assert.equal(checkGate(row(33), { ...nothing, device: "gpu" }), null);
});

test("protocol: a decoded request tells its payload by its id", () => {
  const decoded = decodeFrontendRequest(
    row(FrontendRequest.SET_VRING_NUM),
    hex("00000100 80000000"),
    0,
    plainWire,
  );
  assert.ok(decoded.ok);
  const message = decoded.value;
  assert.equal(message.id, FrontendRequest.SET_VRING_NUM);
  // The narrowing is what is tested: this line compiles only with it.
  if (message.id === FrontendRequest.SET_VRING_NUM) {
    assert.equal(message.payload.index, 0x10000);
    assert.equal(message.payload.num, 128);
  }
  const payload: PayloadOf<2> = 5n;
  const reply: ReplyOf<11> = { index: 0, num: 7 };
  const none: ReplyOf<3> = null;
  assert.deepEqual([payload, reply.num, none], [5n, 7, null]);
});

test("protocol: payloads of the wrong size are refused by name", () => {
  const refusal = (id: number, size: number) => {
    const decoded = decodeFrontendRequest(
      row(id),
      new Uint8Array(size),
      0,
      plainWire,
    );
    return decoded.ok ? null : decoded.reason;
  };
  assert.equal(
    refusal(8, 7),
    "SET_VRING_NUM: vring state payload has 7 bytes, needs 8",
  );
  assert.equal(
    refusal(1, 1),
    "GET_FEATURES: empty payload has 1 bytes, needs 0",
  );
  for (const { id, payload } of frontendRequests) {
    const { minSize, maxSize } = payloadCodecs[payload];
    if (minSize > 0) assert.notEqual(refusal(id, minSize - 1), null);
    assert.notEqual(refusal(id, maxSize + 1), null);
  }
});

function descriptorReason(
  id: number,
  payload: Uint8Array,
  count: number,
): string | null {
  const decoded = decodeFrontendRequest(row(id), payload, count, plainWire);
  return decoded.ok ? null : decoded.reason;
}

test("protocol: descriptors on messages that take none are refused", () => {
  for (const { id, descriptors, payload } of frontendRequests) {
    if (descriptors.kind !== "count" || descriptors.max > 0) continue;
    const bytes = new Uint8Array(payloadCodecs[payload].minSize);
    assert.equal(descriptorReason(id, bytes, 0), null);
    assert.match(descriptorReason(id, bytes, 1) ?? "", /carries 1 descr/);
    assert.match(descriptorReason(id, bytes, 8) ?? "", /needs 0$/);
  }
});

test("protocol: SET_MEM_TABLE takes one descriptor per region", () => {
  const table = new Uint8Array(8 + 2 * 32);
  table[0] = 2;
  assert.equal(descriptorReason(5, table, 2), null);
  for (const count of [0, 1, 3, 8]) {
    assert.equal(
      descriptorReason(5, table, count),
      `SET_MEM_TABLE carries ${count} descriptors, needs 2`,
    );
  }
});

test("protocol: SET_VRING_KICK takes no descriptor with bit 8, else one", () => {
  for (const id of [12, 13, 14]) {
    const withFd = hex("0100000000000000");
    const noFd = hex("0101000000000000");
    assert.equal(descriptorReason(id, withFd, 1), null);
    assert.equal(descriptorReason(id, noFd, 0), null);
    assert.match(descriptorReason(id, withFd, 0) ?? "", /needs 1$/);
    assert.match(descriptorReason(id, withFd, 2) ?? "", /needs 1$/);
    assert.match(descriptorReason(id, noFd, 1) ?? "", /needs 0$/);
  }
});

test("protocol: SET_LOG_BASE takes a descriptor with a log description", () => {
  assert.equal(descriptorReason(6, new Uint8Array(16), 1), null);
  assert.match(descriptorReason(6, new Uint8Array(16), 0) ?? "", /needs 1$/);
  assert.equal(descriptorReason(6, new Uint8Array(8), 0), null);
  assert.match(descriptorReason(6, new Uint8Array(8), 1) ?? "", /needs 0$/);
});

test("protocol: REM_MEM_REG may carry one descriptor", () => {
  const region = new Uint8Array(40);
  assert.equal(descriptorReason(38, region, 0), null);
  assert.equal(descriptorReason(38, region, 1), null);
  assert.match(descriptorReason(38, region, 2) ?? "", /needs 0 to 1$/);
});

test("protocol: an ack is owed only with NEED_REPLY and REPLY_ACK", () => {
  const due = (id: number, needReply: boolean, ...bits: number[]) =>
    replyDue(row(id), {
      needReply,
      protocolFeatures: featureMask(...bits),
      postcopy: false,
    }).kind;
  const { REPLY_ACK, LOG_SHMFD } = ProtocolFeature;
  assert.equal(due(2, false), "none");
  assert.equal(due(2, true), "none");
  assert.equal(due(2, false, REPLY_ACK), "none");
  assert.equal(due(2, true, REPLY_ACK), "ack");
  // A reply takes the place of the ack.
  assert.equal(due(1, true, REPLY_ACK), "reply");
  assert.equal(due(1, false), "reply");
  assert.equal(due(22, false), "reply");
  // SET_LOG_BASE replies without NEED_REPLY.
  assert.equal(due(6, false, LOG_SHMFD), "reply");
  assert.equal(due(6, true, REPLY_ACK), "ack");
});

test("protocol: SET_MEM_TABLE and ADD_MEM_REG reply with bases in postcopy", () => {
  for (
    const [id, payload] of [[5, "memoryTable"], [37, "singleMemoryRegion"]]
  ) {
    const state = { needReply: false, protocolFeatures: 0n };
    assert.deepEqual(replyDue(row(Number(id)), { ...state, postcopy: false }), {
      kind: "none",
    });
    assert.deepEqual(replyDue(row(Number(id)), { ...state, postcopy: true }), {
      kind: "reply",
      payload,
    });
  }
});

test("protocol: back-end messages need BACKEND_REQ, descriptors SEND_FD", () => {
  const { BACKEND_REQ, BACKEND_SEND_FD, CONFIG, SHMEM } = ProtocolFeature;
  const with_ = (...bits: number[]): Negotiation => ({
    ...nothing,
    protocolFeatures: featureMask(...bits),
  });
  const change = findBackendRow(BackendRequest.BACKEND_CONFIG_CHANGE_MSG);
  const map = findBackendRow(BackendRequest.BACKEND_SHMEM_MAP);
  assert.ok(change && map);
  assert.match(
    checkBackendGate(change, 0, with_(CONFIG)) ?? "",
    /needs BACKEND_REQ/,
  );
  assert.match(
    checkBackendGate(change, 0, with_(BACKEND_REQ)) ?? "",
    /needs CONFIG/,
  );
  assert.equal(checkBackendGate(change, 0, with_(BACKEND_REQ, CONFIG)), null);
  assert.match(
    checkBackendGate(map, 1, with_(BACKEND_REQ, SHMEM)) ?? "",
    /needs BACKEND_SEND_FD/,
  );
  assert.equal(
    checkBackendGate(map, 1, with_(BACKEND_REQ, SHMEM, BACKEND_SEND_FD)),
    null,
  );
});

test("protocol: VRING_HOST_NOTIFIER_MSG takes a descriptor unless bit 8", () => {
  const notifier = findBackendRow(3);
  assert.ok(notifier);
  const noFd = new Uint8Array(24);
  noFd[1] = 1;
  assert.ok(decodeBackendRequest(notifier, noFd, 0, plainWire).ok);
  assert.ok(!decodeBackendRequest(notifier, noFd, 1, plainWire).ok);
  const withFd = new Uint8Array(24);
  assert.ok(decodeBackendRequest(notifier, withFd, 1, plainWire).ok);
  assert.ok(!decodeBackendRequest(notifier, withFd, 0, plainWire).ok);
});
