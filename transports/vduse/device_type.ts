/**
 * The kinds of device that the kernel takes by VDUSE, and what it does not
 * take of them.
 *
 * @module
 */

import { Vhost2Error } from "../../ffi/errors.ts";
import { featureMask, VirtioFeature } from "../../protocol/features.ts";

/** A kind of device. */
export interface DeviceType {
  /** virtio's number. */
  readonly id: number;
  /** Bytes of its configuration space that drivers know of. */
  readonly configSize: number;
  /** What may not be offered. */
  readonly refused: bigint;
  /** Queues at most. */
  readonly maxQueues: number;
}

/** A driver's writes to configuration space do not reach the device. */
const block: DeviceType = {
  id: 2,
  configSize: 96,
  // CONFIG_WCE
  refused: featureMask(11),
  maxQueues: 256,
};

/**
 * Without a control queue, all that needs one: CTRL_GUEST_OFFLOADS, CTRL_VQ,
 * CTRL_RX, CTRL_VLAN, GUEST_ANNOUNCE, MQ, CTRL_MAC_ADDR, RSC_EXT, RSS and
 * HASH_REPORT.
 */
const net: DeviceType = {
  id: 1,
  configSize: 24,
  refused: featureMask(2, 17, 18, 19, 21, 22, 23, 57, 60, 61),
  maxQueues: 2,
};

const types: Readonly<Record<string, DeviceType>> = { block, net };

/** What needs messages that the kernel has not, for any kind of device. */
const refusedOfAll = featureMask(
  VirtioFeature.LOG_ALL,
  VirtioFeature.PROTOCOL_FEATURES,
  VirtioFeature.NOTIFICATION_DATA,
  VirtioFeature.RING_RESET,
);

/** Throws OPTION for a kind that the kernel does not take. */
export function deviceTypeOf(name: string | undefined): DeviceType {
  if (name !== undefined && Object.hasOwn(types, name)) return types[name];
  throw new Vhost2Error(
    "OPTION",
    `Cannot serve by VDUSE a device of deviceType: ${name} (the kernel takes: ${
      Object.keys(types).join(", ")
    })`,
  );
}

/**
 * What the kernel's driver is offered of a device's features. Its addresses
 * are IOVAs for the kernel (ACCESS_PLATFORM), which has translated them for us:
 * the device need not know.
 *
 * @param hasPacked packed rings may be offered
 */
export function offeredToDriver(
  type: DeviceType,
  features: bigint,
  hasPacked: boolean,
): bigint {
  const refused = type.refused | refusedOfAll |
    (hasPacked ? 0n : featureMask(VirtioFeature.RING_PACKED));
  return (features & ~refused) | featureMask(VirtioFeature.ACCESS_PLATFORM);
}
