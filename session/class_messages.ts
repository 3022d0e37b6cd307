/**
 * Messages that belong to one class of devices (net, crypto, gpu): the table
 * knows their payloads, and the user's `customMessage` what they mean.
 *
 * @module
 */

import { featureMask, ProtocolFeature } from "../protocol/features.ts";
import {
  FrontendRequest as Id,
  type FrontendRow,
  type PayloadOf,
} from "../protocol/frontend_request.ts";
import type { CryptoSession } from "../protocol/crypto_payload.ts";
import { plainWire } from "../protocol/layout.ts";
import { u64Payload } from "../protocol/payloads.ts";
import { payloadCodecs } from "../protocol/request_row.ts";
import { Refusal } from "./refusal.ts";

/** Protocol features that a device may declare, as it implements them. */
export const declarableProtocolFeatures: bigint = featureMask(
  ProtocolFeature.INBAND_NOTIFICATIONS,
  ProtocolFeature.LOG_SHMFD,
  ProtocolFeature.INFLIGHT_SHMFD,
  ProtocolFeature.GET_VRING_BASE_INFLIGHT,
  ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN,
  ProtocolFeature.RARP,
  ProtocolFeature.NET_MTU,
  ProtocolFeature.CRYPTO_SESSION,
);

const ids = [
  Id.SEND_RARP,
  Id.NET_SET_MTU,
  Id.CREATE_CRYPTO_SESSION,
  Id.CLOSE_CRYPTO_SESSION,
  Id.GPU_SET_SOCKET,
] as const;

type ClassId = (typeof ids)[number];

/** The specification's name of such a message, and its decoded payload. */
export type ClassMessage = {
  [I in ClassId]: {
    readonly name: FrontendRow<I>["name"];
    readonly value: PayloadOf<I>;
  };
}[ClassId];

/** What `customMessage` may answer. */
export type CustomReply = void | Uint8Array | bigint;

/** Whether a message without a handler is the user's device's. */
export function isClassMessage(row: FrontendRow): row is FrontendRow<ClassId> {
  return (ids as readonly number[]).includes(row.id);
}

/** A message outside the table: a u64, or the bytes as they are. */
export function encodeCustomReply(reply: CustomReply): Uint8Array | null {
  if (typeof reply === "bigint") return u64Payload.encode(reply, plainWire);
  return reply ?? null;
}

/** The id that says that no session was made. */
export const failedSession = -1n;

/**
 * The bytes that answer a message of the table; null for what an ack says.
 *
 * @param value its decoded payload
 */
export function encodeClassReply(
  { name, value }: ClassMessage,
  reply: CustomReply,
): Uint8Array | null {
  if (name !== "CREATE_CRYPTO_SESSION") {
    const isRefused = reply instanceof Uint8Array
      ? reply.some((byte) => byte !== 0)
      : (reply ?? 0n) !== 0n;
    if (isRefused) throw new Refusal(`the device answers ${reply}`);
    return null;
  }
  const codec = payloadCodecs.cryptoSession;
  if (typeof reply === "bigint") {
    return codec.encode(withSession(value, reply), plainWire);
  }
  if (!(reply instanceof Uint8Array)) {
    throw new Refusal("the device gives no session");
  }
  const decoded = codec.decode(reply, plainWire);
  if (!decoded.ok) throw new Refusal(`the device's reply: ${decoded.reason}`);
  return reply;
}

function withSession(session: CryptoSession, sessionId: bigint): CryptoSession {
  return { ...session, sessionId: BigInt.asIntN(64, sessionId) };
}
