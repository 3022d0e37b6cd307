/**
 * The transport "PCI-vDPA": a front-end on a Unix socket gets a virtio PCI
 * device of this machine. The control path is vhost-user; the data path is the
 * device's, which reaches the guest's memory by the IOMMU.
 *
 * @module
 */

import type { PciDevice } from "../../pci/pci_device.ts";
import { pciAddress } from "../../pci/sysfs.ts";
import { openVfioDevice } from "../../pci/vfio_device.ts";
import type { Transport, TransportHost } from "../transport.ts";
import { open as openSocket, type ReconnectDelays } from "../vhost_user/mod.ts";
import { VdpaDevice } from "./device.ts";
import { PciVdpaTransport } from "./transport.ts";

/** Options of the transport "PCI-vDPA". */
export interface PciVdpaOptions {
  readonly transport: "PCI-vDPA";
  /** PCI address of the virtio device, such as `0000:00:06.0`. */
  readonly address: string;
  /**
   * Path of the socket, or an inherited descriptor, as `address` of
   * "vhost-user".
   */
  readonly socketPath: string | { readonly fd: number };
  /** Connects to a front-end that listens, instead of listening. */
  readonly connect?: boolean;
  /** With `connect`, as for "vhost-user". */
  readonly reconnect?: boolean | ReconnectDelays;
  /** Permission bits of the socket file; the umask decides when absent. */
  readonly socketMode?: number;
  /** Opens the PCI device, which is closed in the end; by VFIO unless given. */
  readonly openDevice?: (address: string) => PciDevice | Promise<PciDevice>;
}

/** What names the target, for messages and to find doubles. */
export function addressName(options: PciVdpaOptions): string {
  return pciAddress(options.address);
}

/**
 * Opens the device and the socket; a front-end can come when the promise
 * resolves. Throws when one of them cannot be used.
 */
export async function open(
  options: PciVdpaOptions,
  host: TransportHost,
): Promise<Transport> {
  const address = pciAddress(options.address);
  const { openDevice = openVfioDevice, socketPath, ...socket } = options;
  const transport = new PciVdpaTransport({
    name: `PCI-vDPA:${address}`,
    openDevice: async () => await VdpaDevice.open(await openDevice(address)),
    openSocket: (inner) =>
      openSocket(
        { ...socket, transport: "vhost-user", address: socketPath },
        inner,
      ),
  }, host);
  await transport.start();
  return transport;
}
