/**
 * The guest's memory as the device reaches it: each region at the guest's own
 * addresses (IOVA = GPA), from when it comes to when it goes.
 *
 * @module
 */

import { Vhost2Error } from "../../ffi/errors.ts";
import type { MappedRegion, RegionWatcher } from "../../ffi/guest_memory.ts";
import type { PciDevice } from "../../pci/pci_device.ts";

export class GuestDma implements RegionWatcher {
  readonly #pci: PciDevice;
  readonly #undos = new Map<MappedRegion, () => void>();

  constructor(pci: PciDevice) {
    this.#pci = pci;
  }

  /**
   * Throws MEMORY where the region cannot be at these addresses, SYSTEM, with
   * what to do, where the system refuses.
   */
  added(region: MappedRegion): void {
    const { gpa, size, address } = region;
    const { dma, name } = this.#pci;
    const refusal = (why: string) =>
      new Vhost2Error(
        "MEMORY",
        `Cannot let PCI device ${name} reach ${size} bytes at guest address 0x${
          gpa.toString(16)
        }: ${why}`,
      );
    const pages = BigInt(dma.pageSize);
    if ((gpa | address | BigInt(size)) % pages !== 0n) {
      throw refusal(`they are not whole pages of ${pages}`);
    }
    const unclaim = dma.claim(gpa, size);
    if (unclaim === null) {
      throw refusal("the addresses are in use by this library");
    }
    try {
      dma.map(gpa, address, size);
    } catch (error) {
      unclaim();
      throw error;
    }
    this.#undos.set(region, () => {
      dma.unmap(gpa, size);
      unclaim();
    });
  }

  removing(region: MappedRegion): void {
    this.#undos.get(region)?.();
    this.#undos.delete(region);
  }

  /** The device reaches nothing of the guest's any more. */
  close(): void {
    for (const region of [...this.#undos.keys()]) this.removing(region);
  }
}
