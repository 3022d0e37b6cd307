/**
 * Features and configuration space of a network device (virtio 1.3, 5.1.3 and
 * 5.1.4), and what its features mean for frames.
 *
 * @module
 */

import { constants } from "../../ffi/abi.gen.ts";
import { Vhost2Error } from "../../ffi/errors.ts";
import {
  featureMask,
  hasFeature,
  VirtioFeature,
} from "../../protocol/features.ts";
import { NetFeature } from "../../protocol/net.ts";
import { virtqueueFeatures } from "../../virtqueue/mod.ts";
import { Offload } from "./ends/end.ts";

export { NetFeature };

/** Byte offsets of struct virtio_net_config, up to the end of MTU. */
export const configField = {
  mac: 0,
  status: 6,
  max_virtqueue_pairs: 8,
  mtu: 10,
  byteSize: 12,
} as const;

/** VIRTIO_NET_S_*. */
export const statusLinkUp = 1;
export const statusAnnounce = 2;

/** What a device says of itself. */
export interface NetProperties {
  /** 6 bytes. */
  readonly mac: Uint8Array<ArrayBuffer>;
  /** Queue pairs at most. */
  readonly pairCount: number;
  /** Bytes that a frame may carry; 0: not told. */
  readonly mtu: number;
  /** `Offload` bits that the device's end takes and gives. */
  readonly offloads: number;
}

/** In each row: the offload, what the driver needs for it both ways. */
const offloadFeatures: readonly (readonly [number, number[], number[]])[] = [
  [Offload.checksum, [NetFeature.CSUM], [NetFeature.GUEST_CSUM]],
  [Offload.tso4, [NetFeature.HOST_TSO4], [NetFeature.GUEST_TSO4]],
  [Offload.tso6, [NetFeature.HOST_TSO6], [NetFeature.GUEST_TSO6]],
  [Offload.ecn, [NetFeature.HOST_ECN], [NetFeature.GUEST_ECN]],
  [Offload.ufo, [NetFeature.HOST_UFO], [NetFeature.GUEST_UFO]],
  [
    Offload.uso,
    [NetFeature.HOST_USO],
    [NetFeature.GUEST_USO4, NetFeature.GUEST_USO6],
  ],
];

/** The features that a device offers, those of the rings included. */
export function netFeatures(properties: NetProperties): bigint {
  const bits: number[] = [
    NetFeature.MAC,
    NetFeature.MRG_RXBUF,
    NetFeature.STATUS,
    NetFeature.CTRL_VQ,
    NetFeature.GUEST_ANNOUNCE,
    VirtioFeature.ANY_LAYOUT,
    // Chains go back in their order anyway.
    VirtioFeature.IN_ORDER,
  ];
  if (properties.pairCount > 1) bits.push(NetFeature.MQ);
  if (properties.mtu > 0) bits.push(NetFeature.MTU);
  for (const [offload, host, guest] of offloadFeatures) {
    if ((properties.offloads & offload) !== 0) bits.push(...host, ...guest);
  }
  return featureMask(...bits) | virtqueueFeatures;
}

/** `Offload` bits that hold for frames from the guest, and to it. */
export function negotiatedOffloads(
  features: bigint,
): { fromGuest: number; toGuest: number } {
  let fromGuest = 0;
  let toGuest = 0;
  for (const [offload, host, guest] of offloadFeatures) {
    if (host.every((bit) => hasFeature(features, bit))) fromGuest |= offload;
    if (guest.every((bit) => hasFeature(features, bit))) toGuest |= offload;
  }
  // Segments without checksums there are not (5.1.3.1).
  const { checksum } = Offload;
  return {
    fromGuest: (fromGuest & checksum) === 0 ? 0 : fromGuest,
    toGuest: (toGuest & checksum) === 0 ? 0 : toGuest,
  };
}

/** How the frames of a driver with these features look to the core. */
export function ringFlags(features: bigint): {
  headerBytes: number;
  receive: number;
  transmit: number;
} {
  const { fromGuest, toGuest } = negotiatedOffloads(features);
  const isMergeable = hasFeature(features, NetFeature.MRG_RXBUF);
  // Only a legacy driver's header may end before num_buffers (5.1.6.1).
  const isShort = !isMergeable &&
    !hasFeature(features, VirtioFeature.VERSION_1);
  return {
    headerBytes: isShort
      ? constants.netHeaderSize - 2
      : constants.netHeaderSize,
    transmit: fromGuest,
    receive: toGuest | (isMergeable ? constants.flagNetMergeable : 0) |
      (isShort ? constants.flagNetShortHeader : 0),
  };
}

/** Configuration space as the driver reads it, a new copy each time. */
export function encodeConfig(
  { mac, pairCount, mtu }: NetProperties,
  status: number,
): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(configField.byteSize);
  const view = new DataView(bytes.buffer);
  bytes.set(mac, configField.mac);
  view.setUint16(configField.status, status, true);
  view.setUint16(configField.max_virtqueue_pairs, pairCount, true);
  view.setUint16(configField.mtu, mtu, true);
  return bytes;
}

/**
 * `52:54:00:12:34:56` as bytes.
 *
 * @throws Vhost2Error OPTION unless it is the address of one station
 */
export function parseMac(text: string): Uint8Array<ArrayBuffer> {
  if (/^[0-9a-f]{2}(:[0-9a-f]{2}){5}$/i.test(text)) {
    const mac = Uint8Array.from(text.split(":"), (part) => parseInt(part, 16));
    if ((mac[0] & 1) === 0 && mac.some((byte) => byte !== 0)) return mac;
  }
  throw new Vhost2Error(
    "OPTION",
    `Cannot use mac: "${text}" (one station's address, such as 52:54:00:12:34:56)`,
  );
}

/** An address that is nobody else's: locally administered, random. */
export function randomMac(): Uint8Array<ArrayBuffer> {
  const mac = crypto.getRandomValues(new Uint8Array(6));
  mac[0] = (mac[0] & 0xfe) | 2;
  return mac;
}
