/**
 * The frame of every vhost-user message: a 12-byte header
 * `u32 request, u32 flags, u32 size`, then `size` bytes of payload, then
 * nothing; descriptors ride on the sendmsg that carries the first byte.
 *
 * "All numbers are in the machine native byte order": both architectures that
 * we build for are little-endian, so the codecs say little-endian.
 */

/** Bytes. */
export const HEADER_SIZE = 12;
/** flags bits 1:0. */
export const VERSION = 1;
export const VERSION_MASK = 0x3;
/** flags bit 2: set on each reply, by whoever replies. */
export const FLAG_REPLY = 0x4;
/** flags bit 3: the sender wants a u64 ack (REPLY_ACK negotiated). */
export const FLAG_NEED_REPLY = 0x8;
/** Bytes; the largest payload of the specification is 2056. */
export const MAX_PAYLOAD_SIZE = 4096;
/** SCM_RIGHTS descriptors in one message. */
export const MAX_DESCRIPTORS = 8;
/** Regions in one SET_MEM_TABLE (VHOST_MEMORY_BASELINE_NREGIONS). */
export const MAX_TABLE_REGIONS = 8;
/** Slots of ADD_MEM_REG that back-ends offer at most. */
export const MAX_MEM_SLOTS = 509;
/** Bytes of configuration space in one message. */
export const MAX_CONFIG_SIZE = 256;

/** A decoded header; unknown flag bits stay in `flags`. */
export interface MessageHeader {
  readonly request: number;
  readonly flags: number;
  /** Bytes of payload. */
  readonly size: number;
}

/** Which socket a message travels on: decides who asks and who replies. */
export type Channel = "frontend" | "backend";

/** Why a header ends the connection. */
export interface HeaderError {
  readonly code: "version" | "reply" | "size" | "request";
  readonly reason: string;
}

/** Encodes a header. */
export function encodeHeader(header: MessageHeader): Uint8Array {
  const bytes = new Uint8Array(HEADER_SIZE);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, header.request, true);
  view.setUint32(4, header.flags, true);
  view.setUint32(8, header.size, true);
  return bytes;
}

/**
 * Decodes the first 12 bytes; null when there are fewer. What they say is
 * judged by {@linkcode classifyRequestHeader} or
 * {@linkcode classifyReplyHeader}.
 */
export function decodeHeader(bytes: Uint8Array): MessageHeader | null {
  if (bytes.byteLength < HEADER_SIZE) return null;
  const view = new DataView(bytes.buffer, bytes.byteOffset, HEADER_SIZE);
  return {
    request: view.getUint32(0, true),
    flags: view.getUint32(4, true),
    size: view.getUint32(8, true),
  };
}

function classifyFrame(header: MessageHeader): HeaderError | null {
  const version = header.flags & VERSION_MASK;
  if (version !== VERSION) {
    return {
      code: "version",
      reason: `message version is ${version}, not ${VERSION}`,
    };
  }
  if (header.size > MAX_PAYLOAD_SIZE) {
    return {
      code: "size",
      reason:
        `payload of ${header.size} bytes is above the limit of ${MAX_PAYLOAD_SIZE}`,
    };
  }
  return null;
}

/**
 * Judges the header of a request; null is good. Flag bits above 3 are
 * ignored: the specification leaves them undefined.
 */
export function classifyRequestHeader(
  header: MessageHeader,
): HeaderError | null {
  const error = classifyFrame(header);
  if (error !== null) return error;
  if ((header.flags & FLAG_REPLY) !== 0) {
    return {
      code: "reply",
      reason: `request ${header.request} has the REPLY bit set`,
    };
  }
  return null;
}

/** Judges the header of a reply to `request`; null is good. */
export function classifyReplyHeader(
  header: MessageHeader,
  request: number,
): HeaderError | null {
  const error = classifyFrame(header);
  if (error !== null) return error;
  if ((header.flags & FLAG_REPLY) === 0) {
    return {
      code: "reply",
      reason: `reply to ${request} lacks the REPLY bit`,
    };
  }
  if (header.request !== request) {
    return {
      code: "request",
      reason: `reply is to ${header.request}, not to ${request}`,
    };
  }
  return null;
}

/** Whether the sender asks for an ack; it counts only with REPLY_ACK. */
export function needsReply(header: MessageHeader): boolean {
  return (header.flags & FLAG_NEED_REPLY) !== 0;
}

function encodeMessage(
  request: number,
  flags: number,
  payload: Uint8Array | null,
): Uint8Array {
  const size = payload?.byteLength ?? 0;
  if (size > MAX_PAYLOAD_SIZE) {
    throw new RangeError(
      `Cannot encode message ${request}: payload of ${size} bytes, ` +
        `limit is ${MAX_PAYLOAD_SIZE}`,
    );
  }
  const bytes = new Uint8Array(HEADER_SIZE + size);
  bytes.set(encodeHeader({ request, flags, size }));
  if (payload !== null) bytes.set(payload, HEADER_SIZE);
  return bytes;
}

/** Header and payload of a request, in one buffer. */
export function encodeRequest(
  request: number,
  payload: Uint8Array | null,
  needReply = false,
): Uint8Array {
  const flags = needReply ? VERSION | FLAG_NEED_REPLY : VERSION;
  return encodeMessage(request, flags, payload);
}

/**
 * Header and payload of a reply, in one buffer. The flags are exactly
 * VERSION | REPLY: QEMU refuses a reply with any other bit, NEED_REPLY
 * echoed from the request included.
 */
export function encodeReply(
  request: number,
  payload: Uint8Array | null,
): Uint8Array {
  return encodeMessage(request, VERSION | FLAG_REPLY, payload);
}
