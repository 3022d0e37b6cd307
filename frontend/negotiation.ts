/**
 * What a device is opened with, and what is agreed on with the back-end.
 *
 * @module
 */

import { Vhost2Error } from "../ffi/errors.ts";
import {
  featureMask,
  hasFeature,
  ProtocolFeature as Protocol,
  VirtioFeature,
} from "../protocol/features.ts";
import type { GuestRam, RamRegionOptions } from "../driver/guest_ram.ts";
import type { FrontendConnection } from "./connection.ts";
import type { IommuOptions } from "./iommu.ts";

/** Protocol features that this front-end knows how to use. */
export const supportedProtocolFeatures: bigint = featureMask(
  Protocol.MQ,
  Protocol.LOG_SHMFD,
  Protocol.REPLY_ACK,
  Protocol.BACKEND_REQ,
  Protocol.CONFIG,
  Protocol.RESET_DEVICE,
  Protocol.CONFIGURE_MEM_SLOTS,
  Protocol.STATUS,
);

/** What `recovers` adds to them. */
const inflightFeatures = featureMask(
  Protocol.INFLIGHT_SHMFD,
  Protocol.GET_VRING_BASE_INFLIGHT,
  Protocol.GET_VRING_BASE_SKIP_DRAIN,
);

/** What `takesHostNotifiers` adds to them. */
const notifierFeatures = featureMask(
  Protocol.BACKEND_REQ,
  Protocol.BACKEND_SEND_FD,
  Protocol.HOST_NOTIFIER,
);

/** Virtio features of the transport and the ring that it knows. */
export const supportedFeatures: bigint = featureMask(
  VirtioFeature.RING_INDIRECT_DESC,
  VirtioFeature.RING_EVENT_IDX,
  VirtioFeature.IN_ORDER,
  VirtioFeature.PROTOCOL_FEATURES,
  VirtioFeature.VERSION_1,
);

/** How a device is opened. */
export interface VhostUserDeviceOptions {
  /** Path of the back-end's socket. */
  readonly path?: string;
  /** A connected socket, instead of a path; the device owns it then. */
  readonly fd?: number;
  /**
   * Features wanted, those of the device type included; of them, those that
   * are offered are acked. {@linkcode supportedFeatures} unless given.
   * RING_PACKED is a matter of `packed`, ACCESS_PLATFORM of `iommu`, whatever is
   * said here.
   */
  readonly features?: bigint;
  /** The same for {@linkcode supportedProtocolFeatures}. */
  readonly protocolFeatures?: bigint;
  /** 1 unless given. */
  readonly queueCount?: number;
  /** Descriptors per queue; 128 unless given. */
  readonly queueSize?: number;
  /** Bytes of guest memory, in one region; 64 MiB unless given. */
  readonly ramSize?: number;
  /** The regions of guest memory, instead of its size. */
  readonly regions?: readonly RamRegionOptions[];
  /** Guest memory that exists and stays the caller's. */
  readonly ram?: GuestRam;
  /** Asks for acks wherever it can, not only where QEMU does. */
  readonly acksAll?: boolean;
  /**
   * An IOMMU between the device and the memory: ACCESS_PLATFORM, which the
   * device must offer. `true` makes one.
   */
  readonly iommu?: boolean | IommuOptions;
  /** Starts and enables all queues; true unless given. */
  readonly start?: boolean;
  /** Whether the drivers watch their calls; true unless given. */
  readonly usesCalls?: boolean;
  /**
   * Has the back-end track requests in an inflight region, so that `reconnect`
   * loses none of them; the device must offer INFLIGHT_SHMFD.
   */
  readonly recovers?: boolean;
  /**
   * Takes host notifiers: where the back-end gives one, the queue is kicked by
   * a register of its device.
   */
  readonly takesHostNotifiers?: boolean;
}

/** Which format the rings have. */
export interface RingFormatOptions {
  /** Packed rings, which the device must offer; split ones unless given. */
  readonly packed: boolean;
}

/** What both sides agreed on. */
export interface Negotiated {
  readonly features: bigint;
  readonly protocolFeatures: bigint;
  /** What GET_QUEUE_NUM said; as many as are wanted without MQ. */
  readonly maxQueueCount: number;
}

/**
 * The first messages: features, protocol features, and how much there is of
 * queues and memory slots. Throws OPTION where the device lacks what the
 * options insist on.
 */
export async function negotiate(
  connection: FrontendConnection,
  options: VhostUserDeviceOptions & Partial<RingFormatOptions>,
): Promise<Negotiated> {
  const offered = await connection.getFeatures();
  const packed = featureMask(VirtioFeature.RING_PACKED);
  if (options.packed && (offered & packed) === 0n) {
    throw new Vhost2Error(
      "OPTION",
      "Cannot use packed rings: the device does not offer RING_PACKED",
    );
  }
  const platform = featureMask(VirtioFeature.ACCESS_PLATFORM);
  if (options.iommu && (offered & platform) === 0n) {
    throw new Vhost2Error(
      "OPTION",
      "Cannot use an IOMMU: the device does not offer ACCESS_PLATFORM",
    );
  }
  // The log toggles LOG_ALL.
  const never = packed | platform | featureMask(VirtioFeature.LOG_ALL);
  const features = offered &
    ((options.features ?? supportedFeatures) & ~never |
      (options.packed ? packed : 0n) | (options.iommu ? platform : 0n));
  let protocolFeatures = 0n;
  if (hasFeature(features, VirtioFeature.PROTOCOL_FEATURES)) {
    const added = (options.recovers ? inflightFeatures : 0n) |
      (options.takesHostNotifiers ? notifierFeatures : 0n);
    const offered = await connection.getProtocolFeatures();
    if (options.recovers && !hasFeature(offered, Protocol.INFLIGHT_SHMFD)) {
      throw new Vhost2Error(
        "OPTION",
        "Cannot recover requests: the device does not offer INFLIGHT_SHMFD",
      );
    }
    protocolFeatures = offered &
      ((options.protocolFeatures ?? supportedProtocolFeatures) | added);
    const ack = options.acksAll === true &&
      hasFeature(protocolFeatures, Protocol.REPLY_ACK);
    await connection.setProtocolFeatures(protocolFeatures, { ack });
  }
  if (options.iommu && !hasFeature(protocolFeatures, Protocol.BACKEND_REQ)) {
    throw new Vhost2Error(
      "OPTION",
      "Cannot use an IOMMU: without BACKEND_REQ the device cannot ask for translations",
    );
  }
  const maxQueueCount = hasFeature(protocolFeatures, Protocol.MQ)
    ? await connection.getQueueNum()
    : options.queueCount ?? 1;
  if (hasFeature(protocolFeatures, Protocol.CONFIGURE_MEM_SLOTS)) {
    await connection.getMaxMemSlots();
  }
  return { features, protocolFeatures, maxQueueCount };
}
