/**
 * vhost-user as data: the frame, the two tables of messages, the payloads,
 * the feature bits. Pure functions and constants; no runtime, no state.
 */

export * from "./address.ts";
export * from "./backend_request.ts";
export * from "./crypto_payload.ts";
export * from "./describe.ts";
export * from "./features.ts";
export * from "./frontend_request.ts";
export {
  type Codec,
  type Decoded,
  plainWire,
  type StructCodec,
  type WireContext,
} from "./layout.ts";
export * from "./memory_payloads.ts";
export * from "./message.ts";
export * from "./payloads.ts";
export * from "./request_row.ts";
