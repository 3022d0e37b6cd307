/**
 * The transport "PCI-vhost-user": a front-end in another virtual machine (or
 * in the virtual machine monitor), reached through a virtio-vhost-user device
 * of this one.
 *
 * @module
 */

import type { PciDevice } from "../../pci/pci_device.ts";
import { pciAddress } from "../../pci/sysfs.ts";
import { openVfioDevice } from "../../pci/vfio_device.ts";
import type { Transport, TransportHost } from "../transport.ts";
import type { ProfileName } from "./profiles.ts";
import { PciVhostUserTransport } from "./transport.ts";

export type { ProfileName } from "./profiles.ts";

/** Options of the transport "PCI-vhost-user". */
export interface PciVhostUserOptions {
  readonly transport: "PCI-vhost-user";
  /** PCI address of the virtio-vhost-user device, such as `0000:00:05.0`. */
  readonly address: string;
  /** What the device is like, where its identity does not say it. */
  readonly profile?: ProfileName;
  /** Opens the PCI device, which is closed in the end; by VFIO unless given. */
  readonly openDevice?: (address: string) => PciDevice | Promise<PciDevice>;
}

/** What names the target, for messages and to find doubles. */
export function addressName(options: PciVhostUserOptions): string {
  return pciAddress(options.address);
}

/**
 * Opens and starts the device; a front-end can come when the promise resolves.
 * Throws when the device cannot be used.
 */
export async function open(
  options: PciVhostUserOptions,
  host: TransportHost,
): Promise<Transport> {
  const openDevice = options.openDevice ?? openVfioDevice;
  const pci = await openDevice(pciAddress(options.address));
  const { queueCount } = host;
  const transport = new PciVhostUserTransport(
    pci,
    { profile: options.profile, queueCount },
    host,
  );
  try {
    await transport.start();
    return transport;
  } catch (error) {
    pci.close();
    throw error;
  }
}
