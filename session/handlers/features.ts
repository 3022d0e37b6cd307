/** Feature negotiation: messages 1, 2, 15, 16, 17. */

import {
  describeFeatures,
  describeProtocolFeatures,
  featureMask,
  hasFeature,
  VirtioFeature,
} from "../../protocol/features.ts";
import { Refusal } from "../refusal.ts";
import type { Session } from "../session.ts";

const logAllMask = featureMask(VirtioFeature.LOG_ALL);

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
  if ((changed & ~logAllMask) !== 0n) await session.stopQueues(() => true);
  if (changed !== 0n || session.ackedFeatures === null) {
    session.isFeaturesChangeOwed = true;
  }
  session.ackedFeatures = features;
  if (!hasFeature(features, VirtioFeature.PROTOCOL_FEATURES)) {
    // Such a front-end has no SET_VRING_ENABLE.
    for (const vring of session.vrings) vring.isEnabled = true;
  }
}

export function getProtocolFeatures(session: Session): bigint {
  return session.offeredProtocolFeatures;
}

export function setProtocolFeatures(session: Session, features: bigint): void {
  const unknown = features & ~session.offeredProtocolFeatures;
  if (unknown !== 0n) {
    throw new Refusal(`${describeProtocolFeatures(unknown)} was not offered`);
  }
  session.ackedProtocolFeatures = features;
}

export function getQueueNum(session: Session): bigint {
  return BigInt(session.vrings.length);
}
