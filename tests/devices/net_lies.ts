/** What a driver may leave to a card, and how it can lie about that. */

import { featureMask, NetFeature, Offload } from "../../mod.ts";
import {
  type encodeNetHeader,
  NetGso,
  supportedFeatures,
} from "../../frontend/mod.ts";

export const allOffloads: number = Object.values(Offload).reduce(
  (mask, bit) => mask | bit,
  0,
);

/** Features of a driver that leaves everything to the device. */
export const offloading: bigint = supportedFeatures |
  featureMask(
    ...[NetFeature.MAC, NetFeature.MRG_RXBUF, NetFeature.CSUM],
    ...[NetFeature.HOST_TSO4, NetFeature.HOST_TSO6, NetFeature.HOST_ECN],
    ...[NetFeature.HOST_UFO, NetFeature.HOST_USO, NetFeature.CTRL_VQ],
  );

/** Headers that ask for what cannot be done, by what is wrong. */
export const lies: [string, Parameters<typeof encodeNetHeader>[0]][] = [
  ["row 27: csum_start behind the frame", { csumStart: 61, csumOffset: 0 }],
  ["row 27: csum_start at its end", { csumStart: 60, csumOffset: 0 }],
  ["row 27: the field half in it", { csumStart: 34, csumOffset: 25 }],
  ["row 27: sums that wrap", { csumStart: 65535, csumOffset: 65535 }],
  ["row 27: an offset that wraps", { csumStart: 34, csumOffset: 65534 }],
  ["row 27: inside the Ethernet header", { csumStart: 0, csumOffset: 16 }],
  ["row 35: segments of no size", {
    csumStart: 34,
    csumOffset: 16,
    gsoType: NetGso.TCPV4,
    gsoSize: 0,
  }],
  ["row 35: datagrams of no size", {
    csumStart: 34,
    csumOffset: 6,
    gsoType: NetGso.UDP_L4,
    gsoSize: 0,
  }],
  ["segments that do not exist", {
    csumStart: 34,
    csumOffset: 16,
    gsoType: 2,
    gsoSize: 500,
  }],
  ["segments without a checksum", {
    flags: 0,
    gsoType: NetGso.TCPV6,
    gsoSize: 500,
  }],
];
