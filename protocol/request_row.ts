/**
 * What a row of the two message tables says, and the checks that follow from
 * it. The dispatcher goes through them in this order: row, gate, payload size
 * and content, descriptors, handler, reply. Each check answers null or the
 * reason for refusing, never an exception.
 */

import { cryptoSession } from "./crypto_payload.ts";
import {
  hasFeature,
  ProtocolFeature,
  type ProtocolFeatureBit,
  protocolFeatureName,
  VirtioFeature,
  type VirtioFeatureBit,
  virtioFeatureName,
} from "./features.ts";
import type { Codec, Decoded, WireContext } from "./layout.ts";
import { memoryTable, singleMemoryRegion } from "./memory_payloads.ts";
import {
  configPayload,
  deviceStateTransfer,
  inflightDescription,
  iotlbMessage,
  logBase,
  noPayload,
  sharedUuid,
  shmemConfig,
  shmemMapping,
  u64Payload,
  vringAddress,
  vringArea,
  vringDescriptorIndex,
  vringState,
} from "./payloads.ts";

/** The codec of each kind of payload. */
export const payloadCodecs = {
  none: noPayload,
  u64: u64Payload,
  vringState,
  vringAddress,
  vringDescriptorIndex,
  memoryTable,
  singleMemoryRegion,
  logBase,
  iotlb: iotlbMessage,
  config: configPayload,
  cryptoSession,
  vringArea,
  inflight: inflightDescription,
  uuid: sharedUuid,
  deviceStateTransfer,
  shmemMapping,
  shmemConfig,
} as const;

/** Name of a kind of payload, as the tables use it. */
export type PayloadKind = keyof typeof payloadCodecs;

/** The decoded type of a kind of payload. */
export type PayloadValue<Kind extends PayloadKind> =
  (typeof payloadCodecs)[Kind] extends Codec<infer T> ? T : never;

/** What must hold before a message may be used. */
export type Gate =
  | { readonly kind: "always" }
  /** PROTOCOL_FEATURES (bit 30) is offered; acked is not needed. */
  | { readonly kind: "protocolFeaturesOffered" }
  /** The virtio feature bit is negotiated. */
  | { readonly kind: "virtio"; readonly bit: VirtioFeatureBit }
  /** All these protocol feature bits are negotiated. */
  | { readonly kind: "protocol"; readonly bits: readonly ProtocolFeatureBit[] }
  /** The message belongs to one type of device. */
  | { readonly kind: "device"; readonly device: "gpu" };

/** How many descriptors come with a message. */
export type DescriptorRule =
  | { readonly kind: "count"; readonly min: number; readonly max: number }
  /** One per region of the memory table. */
  | { readonly kind: "perRegion" }
  /** None if bit 8 of the payload is set, else one. */
  | { readonly kind: "byNofd" }
  /** One with a log description, none with a bare u64. */
  | { readonly kind: "byLog" };

/** What is sent back. */
export type ReplyRule =
  /** A u64, 0 for success, if NEED_REPLY is set and REPLY_ACK negotiated. */
  | { readonly kind: "ack" }
  /** This payload, always. */
  | {
    readonly kind: "reply";
    readonly payload: PayloadKind;
    readonly descriptors: { readonly min: number; readonly max: number };
  }
  /** This payload while the condition holds, else as "ack". */
  | {
    readonly kind: "replyIf";
    readonly condition: "logShmfd" | "postcopy";
    readonly payload: PayloadKind;
  };

/** One message: everything that is known before its handler runs. */
export interface RequestRow {
  readonly id: number;
  /** The specification's name without VHOST_USER_. */
  readonly name: string;
  readonly payload: PayloadKind;
  readonly descriptors: DescriptorRule;
  readonly gate: Gate;
  readonly reply: ReplyRule;
  /** The payload names a vring: `index` must be checked against the queues. */
  readonly perVring: boolean;
}

/** The constructors that make the tables read like tables. */
export const rule = {
  always: { kind: "always" },
  protocolFeaturesOffered: { kind: "protocolFeaturesOffered" },
  virtio: (bit: VirtioFeatureBit) => ({ kind: "virtio", bit }) as const,
  protocol: (...bits: ProtocolFeatureBit[]) =>
    ({ kind: "protocol", bits }) as const,
  device: (device: "gpu") => ({ kind: "device", device }) as const,
  count: (min: number, max = min) => ({ kind: "count", min, max }) as const,
  perRegion: { kind: "perRegion" },
  byNofd: { kind: "byNofd" },
  byLog: { kind: "byLog" },
  ack: { kind: "ack" },
  reply: <Kind extends PayloadKind>(payload: Kind, min = 0, max = min) =>
    ({ kind: "reply", payload, descriptors: { min, max } }) as const,
  replyIf: <Kind extends PayloadKind>(
    condition: "logShmfd" | "postcopy",
    payload: Kind,
  ) => ({ kind: "replyIf", condition, payload }) as const,
} as const;

/** What the two sides have agreed on so far. */
export interface Negotiation {
  /** Virtio features that the back-end offers (GET_FEATURES). */
  readonly offeredFeatures: bigint;
  /** Virtio features negotiated: offered and acked. */
  readonly features: bigint;
  /** Protocol features negotiated: offered and acked. */
  readonly protocolFeatures: bigint;
  /** The type of device, where it has messages of its own. */
  readonly device?: string;
}

/** Why the message may not be used now; null if it may. */
export function checkGate(
  row: RequestRow,
  negotiation: Negotiation,
): string | null {
  const { gate } = row;
  switch (gate.kind) {
    case "always":
      return null;
    case "protocolFeaturesOffered":
      return hasFeature(
          negotiation.offeredFeatures,
          VirtioFeature.PROTOCOL_FEATURES,
        )
        ? null
        : `${row.name} needs PROTOCOL_FEATURES, which is not offered`;
    case "virtio":
      return hasFeature(negotiation.features, gate.bit)
        ? null
        : `${row.name} needs ${
          virtioFeatureName(gate.bit)
        }, which is not negotiated`;
    case "protocol": {
      const missing = gate.bits.find((bit) =>
        !hasFeature(negotiation.protocolFeatures, bit)
      );
      return missing === undefined
        ? null
        : `${row.name} needs ${
          protocolFeatureName(missing)
        }, which is not negotiated`;
    }
    case "device":
      return negotiation.device === gate.device
        ? null
        : `${row.name} is for ${gate.device} devices`;
  }
}

/** The descriptors that this very message must carry. */
export function descriptorBounds(
  row: RequestRow,
  payload: unknown,
): { min: number; max: number } {
  const exactly = (count: number) => ({ min: count, max: count });
  switch (row.descriptors.kind) {
    case "count":
      return row.descriptors;
    case "perRegion":
      return exactly((payload as PayloadValue<"memoryTable">).length);
    case "byNofd": {
      const value = payload as
        | PayloadValue<"vringDescriptorIndex">
        | PayloadValue<"vringArea">;
      const vring = "vring" in value ? value.vring : value;
      return exactly(vring.hasDescriptor ? 1 : 0);
    }
    case "byLog":
      return exactly(
        (payload as PayloadValue<"logBase">).kind === "log" ? 1 : 0,
      );
  }
}

/** Why the number of descriptors is wrong; null if it is right. */
export function checkDescriptors(
  row: RequestRow,
  payload: unknown,
  count: number,
): string | null {
  const { min, max } = descriptorBounds(row, payload);
  if (count >= min && count <= max) return null;
  const needed = min === max ? `${min}` : `${min} to ${max}`;
  return `${row.name} carries ${count} descriptors, needs ${needed}`;
}

/**
 * Decodes a request's payload and checks its descriptors' number, unless it is
 * null: on a transport that carries none.
 */
export function decodePayload(
  row: RequestRow,
  bytes: Uint8Array,
  descriptorCount: number | null,
  context: WireContext,
): Decoded<unknown> {
  const codec: Codec<unknown> = payloadCodecs[row.payload];
  const decoded = codec.decode(bytes, context);
  if (!decoded.ok) {
    return { ok: false, reason: `${row.name}: ${decoded.reason}` };
  }
  if (descriptorCount === null) return decoded;
  const reason = checkDescriptors(row, decoded.value, descriptorCount);
  return reason === null ? decoded : { ok: false, reason };
}

/** What the sender of a request is owed. */
export type ReplyDue =
  | { readonly kind: "none" }
  /** u64: 0 for success, else failure. */
  | { readonly kind: "ack" }
  | { readonly kind: "reply"; readonly payload: PayloadKind };

/** What must be sent back; a reply takes the place of an ack, never both. */
export function replyDue(
  row: RequestRow,
  state: {
    /** NEED_REPLY of the request's header. */
    readonly needReply: boolean;
    readonly protocolFeatures: bigint;
    /** POSTCOPY_LISTEN was received and POSTCOPY_END not yet. */
    readonly postcopy: boolean;
  },
): ReplyDue {
  const { reply } = row;
  if (reply.kind === "reply") return reply;
  if (reply.kind === "replyIf") {
    const holds = reply.condition === "postcopy"
      ? state.postcopy
      : hasFeature(state.protocolFeatures, ProtocolFeature.LOG_SHMFD);
    if (holds) return { kind: "reply", payload: reply.payload };
  }
  return state.needReply &&
      hasFeature(state.protocolFeatures, ProtocolFeature.REPLY_ACK)
    ? { kind: "ack" }
    : { kind: "none" };
}
