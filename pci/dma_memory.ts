/**
 * Memory that a PCI device reaches by DMA, for rings and buffers. Its guest
 * addresses are the device's I/O addresses.
 *
 * @module
 */

import { GuestRam } from "../driver/guest_ram.ts";
import type { DmaSpace } from "./pci_device.ts";

export class DmaMemory {
  /** The memory; addresses in it are what the device is given. */
  readonly ram: GuestRam;
  readonly #dma: DmaSpace;
  readonly #iova: bigint;
  readonly #size: number;
  #isOpen = true;

  /**
   * @param size bytes, rounded up to whole pages
   * @param isLast at the end of the device's addresses, out of a guest's way
   */
  constructor(dma: DmaSpace, size: number, isLast = false) {
    this.#dma = dma;
    this.#size = Math.ceil(size / dma.pageSize) * dma.pageSize;
    this.#iova = dma.reserve(this.#size, isLast);
    try {
      this.ram = new GuestRam([{ size: this.#size, gpa: this.#iova }]);
    } catch (error) {
      dma.release(this.#iova, this.#size);
      throw error;
    }
    try {
      dma.map(this.#iova, this.ram.regions[0].address, this.#size);
    } catch (error) {
      this.ram.close();
      dma.release(this.#iova, this.#size);
      throw error;
    }
  }

  /** The device cannot reach it any more; views are empty. */
  close(): void {
    if (!this.#isOpen) return;
    this.#isOpen = false;
    this.#dma.unmap(this.#iova, this.#size);
    this.#dma.release(this.#iova, this.#size);
    this.ram.close();
  }
}
