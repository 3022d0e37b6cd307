/**
 * Which features of a device pass through vhost-user, and which this side
 * takes for itself.
 *
 * @module
 */

import {
  featureMask,
  ProtocolFeature,
  VirtioFeature,
} from "../../protocol/features.ts";
import { NetFeature } from "../../protocol/net.ts";

/** Bits of device types; between them are those of rings and transports. */
const typeMask = (1n << 24n) - 1n | ~((1n << 50n) - 1n);

/** Of rings and transports: what the guest's driver and the device agree on. */
const sharedMask = featureMask(
  VirtioFeature.RING_INDIRECT_DESC,
  VirtioFeature.RING_EVENT_IDX,
  VirtioFeature.VERSION_1,
  VirtioFeature.RING_PACKED,
  VirtioFeature.IN_ORDER,
  VirtioFeature.ORDER_PLATFORM,
);

/**
 * Acked where the device offers them, whatever the guest knows: its DMA goes
 * by the host's IOMMU, and single queues are stopped by RING_RESET.
 */
const ownMask = featureMask(
  VirtioFeature.VERSION_1,
  VirtioFeature.ACCESS_PLATFORM,
  VirtioFeature.ORDER_PLATFORM,
  VirtioFeature.RING_RESET,
);

/** Virtio type. */
export const networkCard = 1;
/**
 * A network card's control queue does not pass: vhost-user knows queues for
 * data only. All that the guest would need the queue for goes with it, but MQ,
 * for which it is ours (`card_control.ts`).
 */
const controlMask = featureMask(
  NetFeature.CTRL_GUEST_OFFLOADS,
  NetFeature.CTRL_VQ,
  NetFeature.CTRL_RX,
  NetFeature.CTRL_VLAN,
  NetFeature.CTRL_RX_EXTRA,
  NetFeature.GUEST_ANNOUNCE,
  NetFeature.CTRL_MAC_ADDR,
  NetFeature.DEVICE_STATS,
  NetFeature.VQ_NOTF_COAL,
  NetFeature.NOTF_COAL,
  NetFeature.HASH_REPORT,
  NetFeature.RSS,
);
const multiqueue = featureMask(NetFeature.MQ);
/** In a card (VIRTIO 1.3 section 5.1.6.5.6.1). */
const mostPairs = 0x8000;

/** What a device says of itself. */
export interface DeviceOffer {
  /** Virtio's. */
  readonly type: number;
  readonly features: bigint;
  /** Before features are agreed on: QEMU's cards have more with MQ. */
  readonly queueCount: number;
  /** Of a network card, as it says; 0 where it does not. */
  readonly maxPairs: number;
}

/**
 * The index of the control queue, behind all pairs, of a card with more of them
 * than one; null: no card, or one whose numbers make no sense.
 */
export function controlQueue(offer: DeviceOffer): number | null {
  const { type, features, maxPairs } = offer;
  const needed = featureMask(NetFeature.MQ, NetFeature.CTRL_VQ);
  if (type !== networkCard || (features & needed) !== needed) return null;
  return maxPairs > 1 && maxPairs <= mostPairs ? 2 * maxPairs : null;
}

/** Features that a guest can be offered. */
export function passedFeatures(offer: DeviceOffer): bigint {
  const passed = offer.features &
    (BigInt.asUintN(64, typeMask) | sharedMask);
  if (offer.type !== networkCard) return passed;
  const isMultiqueue = controlQueue(offer) !== null;
  return passed & ~controlMask & ~(isMultiqueue ? 0n : multiqueue);
}

/** What is acked to the device when the guest has acked `features`. */
export function ackedFeatures(offer: DeviceOffer, features: bigint): bigint {
  const acked = passedFeatures(offer) & features;
  const isMultiqueue = controlQueue(offer) !== null &&
    (acked & multiqueue) !== 0n;
  const control = isMultiqueue ? featureMask(NetFeature.CTRL_VQ) : 0n;
  return acked | control | (offer.features & ownMask);
}

/** SET_VRING_KICK has 8 bits for the index. */
const maxQueues = 256;

/** Queues that pass through. */
export function passedQueues(offer: DeviceOffer): number {
  const { type, queueCount } = offer;
  // Without MQ a card has one pair.
  const found = type === networkCard
    ? controlQueue(offer) ?? Math.min(2, queueCount)
    : queueCount;
  return Math.min(maxQueues, found);
}

/** By virtio type: queues whose buffers wait for something to happen. */
const eventQueues: Readonly<Record<number, (index: number) => boolean>> = {
  // Frames that arrive.
  [networkCard]: (index) => index % 2 === 0,
  // Console: input of each port, and of the control queue.
  3: (index) => index % 2 === 0,
  // Balloon: statistics, asked for by giving a buffer back.
  5: (index) => index === 2,
  // SCSI host: events.
  8: (index) => index === 1,
  // Input: events.
  18: (index) => index === 0,
  // Socket: packets that arrive, and events.
  19: (index) => index !== 1,
  // Sound: events.
  25: (index) => index === 1,
};

/**
 * Whether a queue's buffers wait for something that may never happen, so that
 * no stop can wait for them.
 */
export function waitsForEvents(type: number, queueIndex: number): boolean {
  return eventQueues[type]?.(queueIndex) ?? false;
}

/** Protocol features that have no sense where the device holds the requests. */
export const unusableProtocolFeatures: bigint = featureMask(
  ProtocolFeature.PAGEFAULT,
  ProtocolFeature.INFLIGHT_SHMFD,
  ProtocolFeature.GET_VRING_BASE_INFLIGHT,
  ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN,
  ProtocolFeature.SHMEM,
);
