/**
 * What Linux says about a PCI device under /sys.
 *
 * @module
 */

import { existsSync, readdirSync, readFileSync, readlinkSync } from "node:fs";
import { basename } from "node:path";
import { Vhost2Error } from "../ffi/errors.ts";

/** Where /sys and /proc are; somewhere else in tests. */
export interface SystemFolders {
  readonly sys: string;
  readonly proc: string;
}

export const systemFolders: SystemFolders = { sys: "/sys", proc: "/proc" };

const addressPattern =
  /^(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])$/;

/** `0000:00:05.0` for `00:05.0`. Throws OPTION for what is no address. */
export function pciAddress(text: string): string {
  const match = addressPattern.exec(text.toLowerCase());
  if (match !== null) {
    const [, domain = "0000", bus, device, fn] = match;
    return `${domain}:${bus}:${device}.${fn}`;
  }
  throw new Vhost2Error(
    "OPTION",
    `Cannot use PCI address: ${text} (it is like 0000:00:05.0)`,
  );
}

function linkName(path: string): string | null {
  try {
    return basename(readlinkSync(path));
  } catch {
    return null;
  }
}

/** The folder of a device. */
export function deviceFolder(
  address: string,
  { sys }: SystemFolders = systemFolders,
): string {
  return `${sys}/bus/pci/devices/${address}`;
}

/** Which driver a device has; null for none. */
export function driverOf(
  address: string,
  folders: SystemFolders = systemFolders,
): string | null {
  return linkName(`${deviceFolder(address, folders)}/driver`);
}

/** Drivers that do not stand in VFIO's way: its own, and those of bridges. */
const harmless: readonly (string | null)[] = [null, "vfio-pci", "pcieport"];

/** Others of the device's group with a driver in the way. */
export function obstaclesOf(
  address: string,
  folders: SystemFolders = systemFolders,
): string[] {
  const folder = `${deviceFolder(address, folders)}/iommu_group/devices`;
  let names: string[] = [];
  try {
    names = readdirSync(folder);
  } catch {
    // Gone in the meantime.
  }
  return names
    .map((name) => ({ name, driver: driverOf(name, folders) }))
    .filter(({ name, driver }) =>
      name !== address && !harmless.includes(driver)
    )
    .map(({ name, driver }) => `${name} (${driver})`);
}

/**
 * The number of a device's IOMMU group, once it is ready for VFIO. Throws
 * SYSTEM with what is missing.
 */
export function iommuGroupOf(
  address: string,
  folders: SystemFolders = systemFolders,
): number {
  const fail = (why: string) =>
    new Vhost2Error("SYSTEM", `Cannot open PCI device ${address}: ${why}`);
  const folder = deviceFolder(address, folders);
  if (!existsSync(folder)) {
    throw fail('there is no such device ("lspci -D" lists them)');
  }
  const group = linkName(`${folder}/iommu_group`);
  if (group === null) {
    throw fail(
      "it is in no IOMMU group: this machine has no IOMMU, or it is off (intel_iommu=on or amd_iommu=on on the kernel's command line)",
    );
  }
  const driver = driverOf(address, folders);
  if (driver !== "vfio-pci") {
    throw fail(
      `it is bound to ${
        driver ?? "no driver"
      }, not to vfio-pci: bind it ("vhost2 bind ${address}")`,
    );
  }
  return Number(group);
}

/** This process's limit of locked memory, for people. */
export function lockedMemoryLimit(
  { proc }: SystemFolders = systemFolders,
): string {
  try {
    const text = readFileSync(`${proc}/self/limits`, "utf8");
    const soft = /^Max locked memory\s+(\S+)/m.exec(text)?.[1];
    if (soft !== undefined) {
      return soft === "unlimited" ? soft : `${Number(soft) / 1024} KiB`;
    }
  } catch {
    // Not to be known here.
  }
  return "unknown";
}
