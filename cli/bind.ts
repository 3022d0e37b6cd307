/**
 * `vhost2 bind`: a PCI device for vfio-pci, or back.
 *
 * @module
 */

import process from "node:process";
import { bindToVfio, releaseFromVfio } from "../pci/binding_to_vfio.ts";

/** Rebinds the device and says what it had and has. */
export function bind(address: string, isBack: boolean): void {
  const done = isBack ? releaseFromVfio(address) : bindToVfio(address);
  const name = (driver: string | null) => driver ?? "no driver";
  process.stdout.write(
    `${done.address}: ${name(done.before)} -> ${name(done.after)}\n`,
  );
}
