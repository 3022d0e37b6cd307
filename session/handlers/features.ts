/** Feature negotiation: messages 1, 2, 15, 16, 17. */

import {
  describeFeatures,
  describeProtocolFeatures,
  featureMask,
  hasFeature,
  ProtocolFeature,
  type ProtocolFeatureBit,
  VirtioFeature,
} from "../../protocol/features.ts";
import { Refusal } from "../refusal.ts";
import type { Session } from "../session.ts";

const logAllMask = featureMask(VirtioFeature.LOG_ALL);
/** What a running queue relies on. */
const queueMask = featureMask(
  ProtocolFeature.GPA_ADDRESSES,
  ProtocolFeature.INBAND_NOTIFICATIONS,
  ProtocolFeature.LOG_SHMFD,
);
const accessMask = featureMask(VirtioFeature.ACCESS_PLATFORM);
const gpaMask = featureMask(ProtocolFeature.GPA_ADDRESSES);
const packedMask = featureMask(VirtioFeature.RING_PACKED);
const inBandNeeds = featureMask(
  ProtocolFeature.BACKEND_REQ,
  ProtocolFeature.REPLY_ACK,
);
/** What a feature is useless without, beside `inBandNeeds`. */
const needs: readonly (readonly [ProtocolFeatureBit, bigint])[] = [
  [
    ProtocolFeature.GET_VRING_BASE_INFLIGHT,
    featureMask(ProtocolFeature.INFLIGHT_SHMFD),
  ],
  [
    ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN,
    featureMask(
      ProtocolFeature.INFLIGHT_SHMFD,
      ProtocolFeature.GET_VRING_BASE_INFLIGHT,
    ),
  ],
];
/** Why some features are never offered. */
const reasons: readonly (readonly [ProtocolFeatureBit, string])[] = [
  [
    ProtocolFeature.XEN_MMAP,
    "guest memory is mapped from files, not from a Xen domain",
  ],
  [
    ProtocolFeature.CROSS_ENDIAN,
    "rings are little-endian, as those of VERSION_1 are",
  ],
];

export function getFeatures(session: Session): bigint {
  return session.options.features;
}

export async function setFeatures(
  session: Session,
  features: bigint,
): Promise<void> {
  const unknown = features & ~session.options.features;
  if (unknown !== 0n) {
    throw new Refusal(`${describeFeatures(unknown)} was not offered`);
  }
  const changed = features ^ session.features;
  // vhost-user-net repeats the message while its queues run, and migration
  // toggles LOG_ALL; anything else changes what a running queue relies on.
  if ((changed & ~logAllMask) !== 0n) await session.queues.stopAll();
  if (changed !== 0n || session.ackedFeatures === null) {
    session.isFeaturesChangeOwed = true;
  }
  if (session.ackedFeatures !== null && (changed & packedMask) !== 0n) {
    // Size and base mean something else in the other format.
    for (const vring of session.vrings) vring.reset();
    session.inflight.forget();
  }
  session.ackedFeatures = features;
  session.memory.log.setLogging(hasFeature(features, VirtioFeature.LOG_ALL));
  if ((changed & accessMask) !== 0n) session.translations.clear();
  else session.forgetTranslations();
  if (!hasFeature(features, VirtioFeature.PROTOCOL_FEATURES)) {
    // Such a front-end has no SET_VRING_ENABLE.
    for (const vring of session.vrings) vring.isEnabled = true;
  }
}

export function getProtocolFeatures(session: Session): bigint {
  return session.offeredProtocolFeatures;
}

export async function setProtocolFeatures(
  session: Session,
  features: bigint,
): Promise<void> {
  const unknown = features & ~session.offeredProtocolFeatures;
  if (unknown !== 0n) {
    const why = reasons.find(([bit]) => hasFeature(unknown, bit));
    throw new Refusal(
      `${describeProtocolFeatures(unknown)} was not offered` +
        (why === undefined ? "" : `: ${why[1]}`),
    );
  }
  const missing = inBandNeeds & ~features;
  if (
    hasFeature(features, ProtocolFeature.INBAND_NOTIFICATIONS) && missing !== 0n
  ) {
    // "Without these the back-end must close the connection", ack or not.
    session.connection.close();
    throw new Refusal(
      `INBAND_NOTIFICATIONS needs ${describeProtocolFeatures(missing)} too`,
    );
  }
  for (const [bit, needed] of needs) {
    if (hasFeature(features, bit) && (needed & ~features) !== 0n) {
      throw new Refusal(
        `${describeProtocolFeatures(featureMask(bit))} needs ${
          describeProtocolFeatures(needed & ~features)
        } too`,
      );
    }
  }
  const changed = features ^ session.ackedProtocolFeatures;
  if ((changed & queueMask) !== 0n) await session.queues.stopAll();
  session.ackedProtocolFeatures = features;
  // What an update translates to has another meaning.
  if ((changed & gpaMask) !== 0n) session.translations.clear();
}

export function getQueueNum(session: Session): bigint {
  return BigInt(session.vrings.length);
}
