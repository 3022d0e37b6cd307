/**
 * The virtio-vhost-user devices that exist, told apart by their PCI device
 * ids. They agree on registers and queues; they differ in where guest memory
 * is, in which messages they pass on, and in how they say that the front-end
 * has gone.
 *
 * @module
 */

import { Vhost2Error } from "../../ffi/errors.ts";
import { ConfigRegister, type PciDevice } from "../../pci/pci_device.ts";
import { VIRTIO_VENDOR } from "../../pci/virtio_registers.ts";
import { featureMask, ProtocolFeature } from "../../protocol/features.ts";
import type { MemoryRegionDescription } from "../../protocol/memory_payloads.ts";

/** Which implementation a device is. */
export type ProfileName = "qemu" | "crosvm";

/** What is particular to it. */
export interface Profile {
  readonly name: ProfileName;
  /** Protocol features whose messages it passes on. */
  readonly protocolFeatures: bigint;
  /** Bytes that a region takes in the shared memory. */
  spanOf(region: MemoryRegionDescription): bigint;
  /** Bytes from there to the region's first byte. */
  startOf(region: MemoryRegionDescription): bigint;
}

const qemu: Profile = {
  name: "qemu",
  // It passes on messages 1 to 5, 8 to 13 and 15 to 18, and ends the
  // connection at any other. Of the protocol features that it lets through,
  // MQ and LOG_SHMFD, the latter needs one of those.
  protocolFeatures: featureMask(ProtocolFeature.MQ),
  // The whole file is there, from its start on.
  spanOf: ({ mmapOffset, size }) => mmapOffset + size,
  startOf: ({ mmapOffset }) => mmapOffset,
};

const crosvm: Profile = {
  name: "crosvm",
  protocolFeatures: featureMask(
    ProtocolFeature.MQ,
    ProtocolFeature.REPLY_ACK,
    ProtocolFeature.BACKEND_REQ,
    ProtocolFeature.CONFIG,
  ),
  // The offset in the file has been applied.
  spanOf: ({ size }) => size,
  startOf: () => 0n,
};

const profiles: Readonly<Record<ProfileName, Profile>> = { qemu, crosvm };

/** PCI device ids: 0x1040 and the virtio type, or a transitional one. */
const identities: Readonly<Record<number, Profile>> = {
  // QEMU, 2018 and 2019: type 24.
  0x1017: qemu,
  0x1058: qemu,
  // The specification's third and fourth version: type 28.
  0x105c: qemu,
  // QEMU, 2022: type 43.
  0x1016: qemu,
  0x106b: qemu,
  // crosvm: type 61.
  0x107d: crosvm,
};

const hex = (value: number) => value.toString(16).padStart(4, "0");

/**
 * The profile of a device, or the one that the user names. Throws PROTOCOL
 * for a device that is none of those known.
 */
export function profileOf(pci: PciDevice, wanted?: ProfileName): Profile {
  if (wanted !== undefined) {
    if (Object.hasOwn(profiles, wanted)) return profiles[wanted];
    throw new Vhost2Error(
      "OPTION",
      `Cannot use profile: ${wanted} (known: ${
        Object.keys(profiles).join(", ")
      })`,
    );
  }
  const vendor = pci.readConfig(ConfigRegister.vendorId, 2);
  const device = pci.readConfig(ConfigRegister.deviceId, 2);
  const found = vendor === VIRTIO_VENDOR ? identities[device] : undefined;
  if (found !== undefined) return found;
  throw new Vhost2Error(
    "PROTOCOL",
    `Cannot use PCI device ${pci.name}: ${hex(vendor)}:${
      hex(device)
    } is no virtio-vhost-user device that is known (option profile says which one it is like)`,
  );
}
