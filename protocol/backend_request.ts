/**
 * The table of requests from the back-end, over the socket of
 * SET_BACKEND_REQ_FD: one row per message, ids 1..10. Every one takes
 * NEED_REPLY once REPLY_ACK is negotiated.
 */

import {
  hasFeature,
  ProtocolFeature as Protocol,
  VirtioFeature,
} from "./features.ts";
import type { Decoded, WireContext } from "./layout.ts";
import {
  checkGate,
  decodePayload,
  type Negotiation,
  type PayloadValue,
  type RequestRow,
  rule,
} from "./request_row.ts";

const { ack, byNofd, count, protocol, reply, virtio } = rule;
const noFds = count(0);

// deno-fmt-ignore: one message per line
export const backendRequests = [
  { id: 1, name: "BACKEND_IOTLB_MSG", payload: "iotlb", descriptors: noFds, gate: virtio(VirtioFeature.ACCESS_PLATFORM), reply: ack, perVring: false },
  { id: 2, name: "BACKEND_CONFIG_CHANGE_MSG", payload: "none", descriptors: noFds, gate: protocol(Protocol.CONFIG), reply: ack, perVring: false },
  // Without a descriptor: the notifier of the queue is taken away.
  { id: 3, name: "BACKEND_VRING_HOST_NOTIFIER_MSG", payload: "vringArea", descriptors: byNofd, gate: protocol(Protocol.HOST_NOTIFIER), reply: ack, perVring: true },
  { id: 4, name: "BACKEND_VRING_CALL", payload: "vringState", descriptors: noFds, gate: protocol(Protocol.INBAND_NOTIFICATIONS), reply: ack, perVring: true },
  { id: 5, name: "BACKEND_VRING_ERR", payload: "vringState", descriptors: noFds, gate: protocol(Protocol.INBAND_NOTIFICATIONS), reply: ack, perVring: true },
  { id: 6, name: "BACKEND_SHARED_OBJECT_ADD", payload: "uuid", descriptors: noFds, gate: protocol(Protocol.SHARED_OBJECT), reply: ack, perVring: false },
  { id: 7, name: "BACKEND_SHARED_OBJECT_REMOVE", payload: "uuid", descriptors: noFds, gate: protocol(Protocol.SHARED_OBJECT), reply: ack, perVring: false },
  { id: 8, name: "BACKEND_SHARED_OBJECT_LOOKUP", payload: "uuid", descriptors: noFds, gate: protocol(Protocol.SHARED_OBJECT), reply: reply("u64", 0, 1), perVring: false },
  { id: 9, name: "BACKEND_SHMEM_MAP", payload: "shmemMapping", descriptors: count(1), gate: protocol(Protocol.SHMEM), reply: ack, perVring: false },
  { id: 10, name: "BACKEND_SHMEM_UNMAP", payload: "shmemMapping", descriptors: noFds, gate: protocol(Protocol.SHMEM), reply: ack, perVring: false },
] as const satisfies readonly RequestRow[];

type Rows = (typeof backendRequests)[number];

/** 1..10. */
export type BackendRequestId = Rows["id"];
/** The specification's name without VHOST_USER_. */
export type BackendRequestName = Rows["name"];
/** The row of a message. */
export type BackendRow<Id extends BackendRequestId = BackendRequestId> =
  Extract<Rows, { readonly id: Id }>;

/** Ids by name: `BackendRequest.BACKEND_CONFIG_CHANGE_MSG` is 2. */
export const BackendRequest = Object.fromEntries(
  backendRequests.map(({ name, id }) => [name, id]),
) as { readonly [Row in Rows as Row["name"]]: Row["id"] };

/** The decoded payload of a request. */
export type BackendPayloadOf<Id extends BackendRequestId> = PayloadValue<
  BackendRow<Id>["payload"]
>;

/** A request with its payload decoded; `id` tells the payload's type. */
export type BackendMessage = {
  [Id in BackendRequestId]: {
    readonly id: Id;
    readonly row: BackendRow<Id>;
    readonly payload: BackendPayloadOf<Id>;
  };
}[BackendRequestId];

const byId = new Map<number, BackendRow>(
  backendRequests.map((row) => [row.id, row]),
);

/** The row of an id from the wire; undefined for ids that do not exist. */
export function findBackendRow(id: number): BackendRow | undefined {
  return byId.get(id);
}

/** Why the back-end may not send the message now; null if it may. */
export function checkBackendGate(
  row: BackendRow,
  descriptorCount: number,
  negotiation: Negotiation,
): string | null {
  const { protocolFeatures } = negotiation;
  if (!hasFeature(protocolFeatures, Protocol.BACKEND_REQ)) {
    return `${row.name} needs BACKEND_REQ, which is not negotiated`;
  }
  if (
    descriptorCount > 0 &&
    !hasFeature(protocolFeatures, Protocol.BACKEND_SEND_FD)
  ) {
    return `${row.name} with descriptors needs BACKEND_SEND_FD, ` +
      `which is not negotiated`;
  }
  return checkGate(row, negotiation);
}

/** The front-end's side: decodes a payload and checks the descriptors. */
export function decodeBackendRequest(
  row: BackendRow,
  bytes: Uint8Array,
  descriptorCount: number,
  context: WireContext,
): Decoded<BackendMessage> {
  const decoded = decodePayload(row, bytes, descriptorCount, context);
  if (!decoded.ok) return decoded;
  // The row's codec made the payload: id, row and payload belong together.
  const message = { id: row.id, row, payload: decoded.value };
  return { ok: true, value: message as BackendMessage };
}
