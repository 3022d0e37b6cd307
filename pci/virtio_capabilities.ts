/**
 * Where a virtio device has its registers: the vendor's capabilities in its
 * configuration space (VIRTIO 1.3 section 4.1.4). The device is not trusted:
 * whatever leads out of a BAR is left out, with the reason.
 *
 * @module
 */

import { Vhost2Error } from "../ffi/errors.ts";
import { listCapabilities, type PciDevice } from "./pci_device.ts";

const vendorCapability = 0x09;

/** `cfg_type`; 6 and 7 are virtio-vhost-user's. */
export const CapabilityType = {
  common: 1,
  notify: 2,
  isr: 3,
  device: 4,
  pciAccess: 5,
  doorbell: 6,
  notification: 7,
  sharedMemory: 8,
} as const;

/** One place in a BAR. */
export interface VirtioCapability {
  readonly type: number;
  readonly bar: number;
  /** Of a shared memory region. */
  readonly id: number;
  /** Bytes from the start of the BAR. */
  readonly offset: number;
  /** Bytes. */
  readonly length: number;
  /** Bytes from one register to the next (notify, doorbell). */
  readonly multiplier: number;
}

/** What the device shows. */
export interface VirtioCapabilities {
  /** In the device's order of preference. */
  readonly usable: readonly VirtioCapability[];
  /** Why others are not, one clause each. */
  readonly refused: readonly string[];
}

/** Bytes of `virtio_pci_cap`, with a multiplier, and with 64-bit numbers. */
const plainSize = 16;
const multiplierSize = 20;
const wideSize = 24;
const barCount = 6;

const names: Readonly<Record<number, string>> = {
  1: "common configuration",
  2: "notification",
  3: "ISR status",
  4: "device configuration",
  6: "doorbell",
  7: "notification vector",
  8: "shared memory",
};

const nameOf = (type: number) => names[type] ?? `type ${type}`;

/** Bytes that a structure must have at least. */
const minimumLengths: Readonly<Record<number, number>> = {
  [CapabilityType.common]: 56,
  [CapabilityType.notify]: 2,
  [CapabilityType.isr]: 1,
  [CapabilityType.device]: 1,
  [CapabilityType.doorbell]: 2,
  [CapabilityType.notification]: 4,
};

/**
 * Reads all of the virtio capabilities. Throws PROTOCOL when the list itself
 * lies.
 *
 * @param isOpenEnded types whose length is meaningless: the structure goes on
 * to the end of its BAR
 */
export function virtioCapabilities(
  device: PciDevice,
  isOpenEnded: (type: number) => boolean = () => false,
): VirtioCapabilities {
  const list = listCapabilities(device);
  if (list === null) {
    throw new Vhost2Error(
      "PROTOCOL",
      `Cannot use PCI device ${device.name}: its list of capabilities leads in a circle or nowhere`,
    );
  }
  const usable: VirtioCapability[] = [];
  const refused: string[] = [];
  for (const { id, offset } of list) {
    if (id !== vendorCapability) continue;
    const type = device.readConfig(offset + 3, 1);
    if (type === CapabilityType.pciAccess || names[type] === undefined) {
      continue;
    }
    const found = read(device, offset, type, isOpenEnded(type));
    if (typeof found !== "string") usable.push(found);
    else refused.push(`${nameOf(type)} capability: ${found}`);
  }
  return { usable, refused };
}

function read(
  device: PciDevice,
  at: number,
  type: number,
  isOpenEnded: boolean,
): VirtioCapability | string {
  const size = device.readConfig(at + 2, 1);
  const hasMultiplier = type === CapabilityType.notify ||
    type === CapabilityType.doorbell;
  const isWide = type === CapabilityType.sharedMemory && size >= wideSize;
  const needed = hasMultiplier ? multiplierSize : plainSize;
  if (size < needed || at + size > 0x100) {
    return `it has ${size} bytes, needs ${needed}`;
  }
  const bar = device.readConfig(at + 4, 1);
  if (bar >= barCount) return `BAR ${bar} does not exist`;
  const word = (offset: number) => device.readConfig(at + offset, 4);
  const offset = word(8) + (isWide ? word(16) * 2 ** 32 : 0);
  const barSize = device.barSize(bar);
  const length = isOpenEnded
    ? Math.max(0, barSize - offset)
    : word(12) + (isWide ? word(20) * 2 ** 32 : 0);
  const end = offset + length;
  if (!Number.isSafeInteger(end) || end > barSize) {
    return `bytes ${offset} to ${end} are outside BAR ${bar} of ${barSize}`;
  }
  const minimum = minimumLengths[type] ?? 1;
  if (length < minimum) return `its ${length} bytes are less than ${minimum}`;
  if (type === CapabilityType.common && offset % 4 !== 0) {
    return `offset ${offset} is no multiple of 4`;
  }
  const multiplier = hasMultiplier ? word(16) : 0;
  if (multiplier % 2 !== 0) return `multiplier ${multiplier} is odd`;
  return {
    type,
    bar,
    id: device.readConfig(at + 5, 1),
    offset,
    length,
    multiplier,
  };
}

/** The capability to use. Throws PROTOCOL when there is none. */
export function requireCapability(
  device: PciDevice,
  { usable, refused }: VirtioCapabilities,
  type: number,
): VirtioCapability {
  const found = usable.find((capability) => capability.type === type);
  if (found !== undefined) return found;
  const reasons = refused.filter((reason) => reason.startsWith(nameOf(type)));
  const reason = reasons.length > 0
    ? reasons.join("; ")
    : `no ${nameOf(type)} capability: it is no modern virtio device`;
  throw new Vhost2Error(
    "PROTOCOL",
    `Cannot use PCI device ${device.name}: ${reason}`,
  );
}
