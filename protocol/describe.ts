/** Messages as single lines for people: `--verbose`. */

import { findBackendRow } from "./backend_request.ts";
import { describeFeatures, describeProtocolFeatures } from "./features.ts";
import { findFrontendRow } from "./frontend_request.ts";
import { type Codec, plainWire, type WireContext } from "./layout.ts";
import {
  type Channel,
  FLAG_NEED_REPLY,
  FLAG_REPLY,
  type MessageHeader,
  VERSION_MASK,
} from "./message.ts";
import { u64Payload } from "./payloads.ts";
import { payloadCodecs, type RequestRow } from "./request_row.ts";

/** A message as it was received or sent. */
export interface ObservedMessage {
  /** "received" shows as `<-`, "sent" as `->`. */
  readonly direction: "received" | "sent";
  /** The main socket ("frontend", default) or that of BACKEND_REQ. */
  readonly channel?: Channel;
  readonly header: MessageHeader;
  readonly payload: Uint8Array;
  readonly descriptorCount?: number;
  readonly context?: WireContext;
}

/** u64 payloads that are masks. */
const maskDescribers = new Map<string, (mask: bigint) => string>([
  ["GET_FEATURES", describeFeatures],
  ["SET_FEATURES", describeFeatures],
  ["GET_PROTOCOL_FEATURES", describeProtocolFeatures],
  ["SET_PROTOCOL_FEATURES", describeProtocolFeatures],
]);

function describePayload(
  row: RequestRow,
  isReply: boolean,
  payload: Uint8Array,
  context: WireContext,
): string {
  let codec: Codec<unknown> = payloadCodecs[row.payload];
  if (isReply) {
    if (row.reply.kind === "ack") {
      const ack = u64Payload.decode(payload, context);
      return ack.ok ? `ack=${ack.value}` : ack.reason;
    }
    codec = payloadCodecs[row.reply.payload];
    if (payload.byteLength === 0) return codec.maxSize === 0 ? "" : "empty";
    // A conditional reply whose condition does not hold is an ack.
    const isAck = row.reply.kind === "replyIf" && payload.byteLength === 8;
    if (isAck) codec = u64Payload as Codec<unknown>;
  }
  const decoded = codec.decode(payload, context);
  if (!decoded.ok) return decoded.reason;
  const mask = maskDescribers.get(row.name);
  return mask !== undefined && typeof decoded.value === "bigint"
    ? mask(decoded.value)
    : codec.describe(decoded.value);
}

/**
 * One line without its end, whatever the bytes:
 * `<- 8 SET_VRING_NUM index=0 num=128 [need_reply]`.
 */
export function describeMessage(message: ObservedMessage): string {
  const { header, payload, context = plainWire } = message;
  const isReply = (header.flags & FLAG_REPLY) !== 0;
  const row: RequestRow | undefined = message.channel === "backend"
    ? findBackendRow(header.request)
    : findFrontendRow(header.request);
  const parts = [
    message.direction === "received" ? "<-" : "->",
    `${header.request}`,
    row?.name ?? "unknown",
  ];
  if (payload.byteLength !== header.size) {
    parts.push(`size=${header.size}`);
  } else if (row === undefined) {
    if (header.size > 0) parts.push(`${header.size} bytes`);
  } else {
    const text = describePayload(row, isReply, payload, context);
    if (text !== "") parts.push(text);
  }
  const descriptorCount = message.descriptorCount ?? 0;
  if (descriptorCount > 0) parts.push(`fds=${descriptorCount}`);
  if ((header.flags & FLAG_NEED_REPLY) !== 0) parts.push("[need_reply]");
  const version = header.flags & VERSION_MASK;
  if (version !== 1) parts.push(`[version ${version}]`);
  const known = VERSION_MASK | FLAG_REPLY | FLAG_NEED_REPLY;
  const unknownFlags = (header.flags & ~known) >>> 0;
  if (unknownFlags !== 0) parts.push(`[flags 0x${unknownFlags.toString(16)}]`);
  return parts.join(" ");
}
