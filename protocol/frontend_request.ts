/**
 * THE TABLE of requests from the front-end: one row per message, ids 1..45.
 * Everything but the names of the types is derived from it.
 */

import { ProtocolFeature as Protocol, VirtioFeature } from "./features.ts";
import type { Decoded, WireContext } from "./layout.ts";
import {
  decodePayload,
  type PayloadValue,
  type RequestRow,
  rule,
} from "./request_row.ts";

const {
  ack,
  always,
  byLog,
  byNofd,
  count,
  device,
  perRegion,
  protocol,
  protocolFeaturesOffered,
  reply,
  replyIf,
  virtio,
} = rule;
const noFds = count(0);
const oneFd = count(1);

// deno-fmt-ignore: one message per line
export const frontendRequests = [
  // QEMU uses it as a barrier: answerable at any time, in order.
  { id: 1, name: "GET_FEATURES", payload: "none", descriptors: noFds, gate: always, reply: reply("u64"), perVring: false },
  { id: 2, name: "SET_FEATURES", payload: "u64", descriptors: noFds, gate: always, reply: ack, perVring: false },
  { id: 3, name: "SET_OWNER", payload: "none", descriptors: noFds, gate: always, reply: ack, perVring: false },
  // Deprecated: ignored, or disables all rings.
  { id: 4, name: "RESET_OWNER", payload: "none", descriptors: noFds, gate: always, reply: ack, perVring: false },
  // In postcopy the front-end answers the reply by the same id with a u64 of 0:
  // on the wire that is an empty table, and it is not a new table.
  { id: 5, name: "SET_MEM_TABLE", payload: "memoryTable", descriptors: perRegion, gate: always, reply: replyIf("postcopy", "memoryTable"), perVring: false },
  // QEMU waits for a reply and ignores its payload.
  { id: 6, name: "SET_LOG_BASE", payload: "logBase", descriptors: byLog, gate: protocol(Protocol.LOG_SHMFD), reply: replyIf("logShmfd", "u64"), perVring: false },
  { id: 7, name: "SET_LOG_FD", payload: "none", descriptors: oneFd, gate: always, reply: ack, perVring: false },
  { id: 8, name: "SET_VRING_NUM", payload: "vringState", descriptors: noFds, gate: always, reply: ack, perVring: true },
  { id: 9, name: "SET_VRING_ADDR", payload: "vringAddress", descriptors: noFds, gate: always, reply: ack, perVring: true },
  { id: 10, name: "SET_VRING_BASE", payload: "vringState", descriptors: noFds, gate: always, reply: ack, perVring: true },
  { id: 11, name: "GET_VRING_BASE", payload: "vringState", descriptors: noFds, gate: always, reply: reply("vringState"), perVring: true },
  { id: 12, name: "SET_VRING_KICK", payload: "vringDescriptorIndex", descriptors: byNofd, gate: always, reply: ack, perVring: true },
  { id: 13, name: "SET_VRING_CALL", payload: "vringDescriptorIndex", descriptors: byNofd, gate: always, reply: ack, perVring: true },
  { id: 14, name: "SET_VRING_ERR", payload: "vringDescriptorIndex", descriptors: byNofd, gate: always, reply: ack, perVring: true },
  { id: 15, name: "GET_PROTOCOL_FEATURES", payload: "none", descriptors: noFds, gate: protocolFeaturesOffered, reply: reply("u64"), perVring: false },
  { id: 16, name: "SET_PROTOCOL_FEATURES", payload: "u64", descriptors: noFds, gate: protocolFeaturesOffered, reply: ack, perVring: false },
  { id: 17, name: "GET_QUEUE_NUM", payload: "none", descriptors: noFds, gate: protocol(Protocol.MQ), reply: reply("u64"), perVring: false },
  { id: 18, name: "SET_VRING_ENABLE", payload: "vringState", descriptors: noFds, gate: virtio(VirtioFeature.PROTOCOL_FEATURES), reply: ack, perVring: true },
  // The low 6 bytes of the u64 are the MAC address.
  { id: 19, name: "SEND_RARP", payload: "u64", descriptors: noFds, gate: protocol(Protocol.RARP), reply: ack, perVring: false },
  { id: 20, name: "NET_SET_MTU", payload: "u64", descriptors: noFds, gate: protocol(Protocol.NET_MTU), reply: ack, perVring: false },
  { id: 21, name: "SET_BACKEND_REQ_FD", payload: "none", descriptors: oneFd, gate: protocol(Protocol.BACKEND_REQ), reply: ack, perVring: false },
  { id: 22, name: "IOTLB_MSG", payload: "iotlb", descriptors: noFds, gate: virtio(VirtioFeature.ACCESS_PLATFORM), reply: reply("u64"), perVring: false },
  { id: 23, name: "SET_VRING_ENDIAN", payload: "vringState", descriptors: noFds, gate: protocol(Protocol.CROSS_ENDIAN), reply: ack, perVring: true },
  // A failure is a reply with a payload of zero bytes.
  { id: 24, name: "GET_CONFIG", payload: "config", descriptors: noFds, gate: protocol(Protocol.CONFIG), reply: reply("config"), perVring: false },
  { id: 25, name: "SET_CONFIG", payload: "config", descriptors: noFds, gate: protocol(Protocol.CONFIG), reply: ack, perVring: false },
  { id: 26, name: "CREATE_CRYPTO_SESSION", payload: "cryptoSession", descriptors: noFds, gate: protocol(Protocol.CRYPTO_SESSION), reply: reply("cryptoSession"), perVring: false },
  { id: 27, name: "CLOSE_CRYPTO_SESSION", payload: "u64", descriptors: noFds, gate: protocol(Protocol.CRYPTO_SESSION), reply: ack, perVring: false },
  // The reply carries the userfaultfd.
  { id: 28, name: "POSTCOPY_ADVISE", payload: "none", descriptors: noFds, gate: protocol(Protocol.PAGEFAULT), reply: reply("none", 1), perVring: false },
  { id: 29, name: "POSTCOPY_LISTEN", payload: "none", descriptors: noFds, gate: protocol(Protocol.PAGEFAULT), reply: ack, perVring: false },
  { id: 30, name: "POSTCOPY_END", payload: "none", descriptors: noFds, gate: protocol(Protocol.PAGEFAULT), reply: reply("u64"), perVring: false },
  { id: 31, name: "GET_INFLIGHT_FD", payload: "inflight", descriptors: noFds, gate: protocol(Protocol.INFLIGHT_SHMFD), reply: reply("inflight", 1), perVring: false },
  { id: 32, name: "SET_INFLIGHT_FD", payload: "inflight", descriptors: oneFd, gate: protocol(Protocol.INFLIGHT_SHMFD), reply: ack, perVring: false },
  { id: 33, name: "GPU_SET_SOCKET", payload: "none", descriptors: oneFd, gate: device("gpu"), reply: ack, perVring: false },
  { id: 34, name: "RESET_DEVICE", payload: "none", descriptors: noFds, gate: protocol(Protocol.RESET_DEVICE), reply: ack, perVring: false },
  { id: 35, name: "VRING_KICK", payload: "vringState", descriptors: noFds, gate: protocol(Protocol.INBAND_NOTIFICATIONS), reply: ack, perVring: true },
  { id: 36, name: "GET_MAX_MEM_SLOTS", payload: "none", descriptors: noFds, gate: protocol(Protocol.CONFIGURE_MEM_SLOTS), reply: reply("u64"), perVring: false },
  { id: 37, name: "ADD_MEM_REG", payload: "singleMemoryRegion", descriptors: oneFd, gate: protocol(Protocol.CONFIGURE_MEM_SLOTS), reply: replyIf("postcopy", "singleMemoryRegion"), perVring: false },
  // Old front-ends attach a descriptor: it is closed and not used.
  { id: 38, name: "REM_MEM_REG", payload: "singleMemoryRegion", descriptors: count(0, 1), gate: protocol(Protocol.CONFIGURE_MEM_SLOTS), reply: ack, perVring: false },
  { id: 39, name: "SET_STATUS", payload: "u64", descriptors: noFds, gate: protocol(Protocol.STATUS), reply: ack, perVring: false },
  { id: 40, name: "GET_STATUS", payload: "none", descriptors: noFds, gate: protocol(Protocol.STATUS), reply: reply("u64"), perVring: false },
  { id: 41, name: "GET_SHARED_OBJECT", payload: "uuid", descriptors: noFds, gate: protocol(Protocol.SHARED_OBJECT), reply: reply("none", 0, 1), perVring: false },
  // The reply's bits 7:0 are 0 for success, bit 8 says that no descriptor came.
  { id: 42, name: "SET_DEVICE_STATE_FD", payload: "deviceStateTransfer", descriptors: oneFd, gate: protocol(Protocol.DEVICE_STATE), reply: reply("u64", 0, 1), perVring: false },
  { id: 43, name: "CHECK_DEVICE_STATE", payload: "none", descriptors: noFds, gate: protocol(Protocol.DEVICE_STATE), reply: reply("u64"), perVring: false },
  { id: 44, name: "GET_SHMEM_CONFIG", payload: "none", descriptors: noFds, gate: protocol(Protocol.SHMEM), reply: reply("shmemConfig"), perVring: false },
  { id: 45, name: "GET_VRING_BASE_SKIP_DRAIN", payload: "vringState", descriptors: noFds, gate: protocol(Protocol.GET_VRING_BASE_SKIP_DRAIN, Protocol.GET_VRING_BASE_INFLIGHT, Protocol.INFLIGHT_SHMFD), reply: reply("vringState"), perVring: true },
] as const satisfies readonly RequestRow[];

type Rows = (typeof frontendRequests)[number];

/** 1..45. */
export type FrontendRequestId = Rows["id"];
/** The specification's name without VHOST_USER_. */
export type FrontendRequestName = Rows["name"];
/** The row of a message. */
export type FrontendRow<Id extends FrontendRequestId = FrontendRequestId> =
  Extract<Rows, { readonly id: Id }>;

/** Ids by the specification's name: `FrontendRequest.SET_VRING_NUM` is 8. */
export const FrontendRequest = Object.fromEntries(
  frontendRequests.map(({ name, id }) => [name, id]),
) as { readonly [Row in Rows as Row["name"]]: Row["id"] };

/** The decoded payload of a request. */
export type PayloadOf<Id extends FrontendRequestId> = PayloadValue<
  FrontendRow<Id>["payload"]
>;

/** The value that answers a request; null where an ack is all. */
export type ReplyOf<Id extends FrontendRequestId> =
  FrontendRow<Id>["reply"] extends { readonly payload: infer Kind }
    ? Kind extends Parameters<typeof reply>[0] ? PayloadValue<Kind> : never
    : null;

/** A request with its payload decoded; `id` tells the payload's type. */
export type FrontendMessage = {
  [Id in FrontendRequestId]: {
    readonly id: Id;
    readonly row: FrontendRow<Id>;
    readonly payload: PayloadOf<Id>;
  };
}[FrontendRequestId];

/** One function per message, each with its own payload type. */
export type FrontendHandlers<Context, Result> = {
  readonly [Id in FrontendRequestId]?: (
    context: Context,
    payload: PayloadOf<Id>,
  ) => Result;
};

const byId = new Map<number, FrontendRow>(
  frontendRequests.map((row) => [row.id, row]),
);

/** The row of an id from the wire; undefined for ids that do not exist. */
export function findFrontendRow(id: number): FrontendRow | undefined {
  return byId.get(id);
}

/**
 * Decodes the payload of a request whose gate is open, and checks how many
 * descriptors came with it; null where the transport carries none at all.
 * Never throws.
 */
export function decodeFrontendRequest(
  row: FrontendRow,
  bytes: Uint8Array,
  descriptorCount: number | null,
  context: WireContext,
): Decoded<FrontendMessage> {
  const decoded = decodePayload(row, bytes, descriptorCount, context);
  if (!decoded.ok) return decoded;
  // The row's codec made the payload: id, row and payload belong together.
  const message = { id: row.id, row, payload: decoded.value };
  return { ok: true, value: message as FrontendMessage };
}
