/**
 * Gives a PCI device to `vfio-pci`, and back to the driver that Linux picks,
 * by /sys. It takes the device away from whatever uses it: never done unasked.
 *
 * @module
 */

import { existsSync, writeFileSync } from "node:fs";
import { Vhost2Error } from "../ffi/errors.ts";
import {
  deviceFolder,
  driverOf,
  pciAddress,
  type SystemFolders,
  systemFolders,
} from "./sysfs.ts";

const vfio = "vfio-pci";

/** Which driver a device had, and has; null for none. */
export interface Rebinding {
  /** Its address in full. */
  readonly address: string;
  readonly before: string | null;
  readonly after: string | null;
}

function write(path: string, text: string, what: string): void {
  try {
    writeFileSync(path, text);
  } catch (cause) {
    const { code, message } = cause as NodeJS.ErrnoException;
    const why = code === "EACCES" || code === "EPERM"
      ? "only root may"
      : code ?? message;
    throw new Vhost2Error("SYSTEM", `Cannot ${what}: ${why}`, { cause });
  }
}

function rebind(
  text: string,
  override: string,
  folders: SystemFolders,
): Rebinding {
  const address = pciAddress(text);
  const folder = deviceFolder(address, folders);
  if (!existsSync(folder)) {
    throw new Vhost2Error(
      "SYSTEM",
      `Cannot bind PCI device ${address}: there is no such device ("lspci -D" lists them)`,
    );
  }
  const what = `bind PCI device ${address}`;
  const before = driverOf(address, folders);
  write(`${folder}/driver_override`, `${override}\n`, what);
  if (before !== null) write(`${folder}/driver/unbind`, address, what);
  write(`${folders.sys}/bus/pci/drivers_probe`, address, what);
  return { address, before, after: driverOf(address, folders) };
}

/**
 * Binds a device to `vfio-pci`, which must be loaded. A device that has it
 * already is left alone. Its driver until now loses it: a disk in use, or the
 * network card of this connection, is gone then.
 *
 * @throws Vhost2Error OPTION for what is no address, SYSTEM with what to do
 */
export function bindToVfio(
  address: string,
  folders: SystemFolders = systemFolders,
): Rebinding {
  const name = pciAddress(address);
  if (driverOf(name, folders) === vfio) {
    return { address: name, before: vfio, after: vfio };
  }
  const done = rebind(address, vfio, folders);
  if (done.after === vfio) return done;
  const isLoaded = existsSync(`${folders.sys}/bus/pci/drivers/${vfio}`);
  throw new Vhost2Error(
    "SYSTEM",
    `Cannot bind PCI device ${done.address} to vfio-pci: ${
      isLoaded
        ? "the kernel does not take it (its log says why)"
        : 'the kernel has no vfio-pci: run "modprobe vfio-pci"'
    }`,
  );
}

/** Gives a device back to the driver that the kernel has for it, if any. */
export function releaseFromVfio(
  address: string,
  folders: SystemFolders = systemFolders,
): Rebinding {
  return rebind(address, "", folders);
}
