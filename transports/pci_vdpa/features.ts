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

const networkCard = 1;
/**
 * A network card's control queue stays between the guest and its monitor:
 * vhost-user knows queues for data only. All that needs the queue goes with
 * it: CTRL_GUEST_OFFLOADS, CTRL_VQ to CTRL_MAC_ADDR, NOTF_COAL, HASH_REPORT,
 * RSS.
 */
const controlMask = featureMask(2, 17, 18, 19, 20, 21, 22, 23, 53, 57, 60);
/** Without MQ. */
const cardQueues = 2;

/** Features of an offered mask that a guest can be offered. */
export function passedFeatures(type: number, offered: bigint): bigint {
  const mask = BigInt.asUintN(64, typeMask) | sharedMask;
  return offered & mask & (type === networkCard ? ~controlMask : mask);
}

/** What is acked to the device when the guest has acked `features`. */
export function ackedFeatures(
  type: number,
  offered: bigint,
  features: bigint,
): bigint {
  return (passedFeatures(type, offered) & features) | (offered & ownMask);
}

/** SET_VRING_KICK has 8 bits for the index. */
const maxQueues = 256;

/** Queues that pass through. */
export function passedQueues(type: number, queueCount: number): number {
  return Math.min(type === networkCard ? cardQueues : maxQueues, queueCount);
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
