/**
 * Which protocol features a device is offered with: what the library does by
 * itself, and what it does where the device's ops answer.
 *
 * @module
 */

import { featureMask, ProtocolFeature } from "../protocol/features.ts";
import type { TargetOps } from "./target_ops.ts";

const always = featureMask(
  ProtocolFeature.MQ,
  ProtocolFeature.REPLY_ACK,
  ProtocolFeature.BACKEND_REQ,
  ProtocolFeature.BACKEND_SEND_FD,
  ProtocolFeature.HOST_NOTIFIER,
  ProtocolFeature.RESET_DEVICE,
  ProtocolFeature.STATUS,
  ProtocolFeature.GPA_ADDRESSES,
);

/** Declared, they need no `customMessage`: the library has the messages. */
const libraryMessages = featureMask(
  // QEMU acks INBAND_NOTIFICATIONS without knowing its messages: only a user
  // who knows his front-end can offer it.
  ProtocolFeature.INBAND_NOTIFICATIONS,
  // Only who processes the rings knows whether all writes are logged.
  ProtocolFeature.LOG_SHMFD,
  // And only he can track requests in the inflight region.
  ProtocolFeature.INFLIGHT_SHMFD,
  ProtocolFeature.GET_VRING_BASE_INFLIGHT,
  ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN,
);

/** What decides which features a device is offered with. */
export interface OfferedOf {
  readonly ops: TargetOps;
  /** `DeviceOptions.protocolFeatures`. */
  readonly declared: bigint;
  readonly hasSharedMemory: boolean;
  readonly hasPostcopy: boolean;
}

/** The mask for a device, whatever its transport can carry. */
export function offeredProtocolFeatures(
  { ops, declared, hasSharedMemory, hasPostcopy }: OfferedOf,
): bigint {
  // The specification forbids the two together.
  let offered = always | featureMask(
    hasPostcopy
      ? ProtocolFeature.PAGEFAULT
      : ProtocolFeature.CONFIGURE_MEM_SLOTS,
  );
  offered |= declared & libraryMessages;
  if (ops.customMessage !== undefined) offered |= declared;
  if (ops.getConfig !== undefined) {
    offered |= featureMask(ProtocolFeature.CONFIG);
  }
  if (ops.getSharedObject !== undefined) {
    offered |= featureMask(ProtocolFeature.SHARED_OBJECT);
  }
  if (ops.transferState !== undefined) {
    offered |= featureMask(ProtocolFeature.DEVICE_STATE);
  }
  if (hasSharedMemory) offered |= featureMask(ProtocolFeature.SHMEM);
  return offered;
}
