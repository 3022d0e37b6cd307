/**
 * A PCI device as a driver uses it: configuration space, BARs, interrupts,
 * DMA. VFIO is one (`vfio_device.ts`); tests have a model of one.
 *
 * As on the bus, a device that has gone answers every read with all ones and
 * takes every write without effect; nothing here throws for it.
 *
 * @module
 */

/** Bytes of one register access. */
export type RegisterWidth = 1 | 2 | 4;

/** A part of a BAR that is memory of this process. */
export interface MappedBar {
  /** Its first byte, for the core. */
  readonly address: bigint;
  /** Bytes. */
  readonly size: number;
  /** Ends the mapping; a region of guest memory in it keeps it alive. */
  close(): void;
}

/** The space of addresses (IOVA) in which the device sees memory. */
export interface DmaSpace {
  /** Bytes: what addresses and sizes are multiples of. */
  readonly pageSize: number;
  /**
   * A free range; the last one where it must not be in the way of `claim`.
   * Throws MEMORY when there is none.
   */
  reserve(size: number, isLast?: boolean): bigint;
  /** Gives back what `reserve` answered. */
  release(iova: bigint, size: number): void;
  /**
   * Lets the device reach memory of the core's by `iova`. Throws SYSTEM, with
   * what to do, when the system refuses it.
   */
  map(iova: bigint, address: bigint, size: number): void;
  unmap(iova: bigint, size: number): void;
  /**
   * Keeps a range that a guest has chosen from being reserved. Returns the
   * undo; null when some of it is reserved.
   */
  claim(iova: bigint, size: number): (() => void) | null;
}

/** A part of a BAR as another process can map it. */
export interface BarFile {
  /** The device's file, which stays the device's. */
  readonly fd: number;
  /** Bytes from the start of the file. */
  readonly offset: number;
}

/** One PCI function. */
export interface PciDevice {
  /** For people, such as `0000:00:05.0`. */
  readonly name: string;
  readonly dma: DmaSpace;
  /** MSI-X vectors; 0 where it has none. */
  readonly vectorCount: number;
  /** Whether it has a pin interrupt (INTx). */
  readonly hasPin: boolean;
  /** Called when the device is to be given back, or has gone. */
  onRemoval: (() => void) | undefined;
  /** All ones where there is nothing. */
  readConfig(offset: number, width: RegisterWidth): number;
  writeConfig(offset: number, width: RegisterWidth, value: number): void;
  /** Bytes of BAR 0 to 5; 0 where there is none. */
  barSize(bar: number): number;
  /** A register. Throws OPTION outside the BAR or where it is not aligned. */
  readBar(bar: number, offset: number, width: RegisterWidth): number;
  writeBar(
    bar: number,
    offset: number,
    width: RegisterWidth,
    value: number,
  ): void;
  /** Maps whole pages of a BAR. Throws SYSTEM where that is not allowed. */
  mapBar(bar: number, offset: number, size: number): MappedBar;
  /** Whole pages of a BAR for another process; null where it cannot map them. */
  barFile(bar: number, offset: number, size: number): BarFile | null;
  /**
   * MSI-X: an eventfd for each vector from `first` on, 0 unless given; the
   * others stay as they are. None at all turns it off.
   */
  setVectors(fds: readonly number[], first?: number): void;
  /** The pin's eventfd, or null to turn it off. Masked when signalled. */
  setPin(fd: number | null): void;
  /** The pin may interrupt again. */
  unmaskPin(): void;
  /** Resets and closes it. DMA mappings end. */
  close(): void;
}

/** Registers of the configuration space (PCI 3.0, section 6.1). */
export const ConfigRegister = {
  vendorId: 0x00,
  deviceId: 0x02,
  command: 0x04,
  status: 0x06,
  revision: 0x08,
  subsystemId: 0x2e,
  capabilities: 0x34,
} as const;

/** Bits of the command register. */
export const Command = { memory: 2, busMaster: 4 } as const;
/** Bit of the status register: there is a list of capabilities. */
const statusCapabilities = 0x10;

/** What a read of a device that has gone answers. */
export const goneValue: Readonly<Record<RegisterWidth, number>> = {
  1: 0xff,
  2: 0xffff,
  4: 0xffff_ffff,
};

/** Whether the device does not answer any more. */
export function hasGone(device: PciDevice): boolean {
  return device.readConfig(ConfigRegister.vendorId, 2) === goneValue[2];
}

/** One entry of the list of capabilities. */
export interface PciCapability {
  readonly id: number;
  /** Bytes from the start of the configuration space. */
  readonly offset: number;
}

const firstCapability = 0x40;
const configSize = 0x100;
const maxCapabilities = (configSize - firstCapability) / 4;

/**
 * The device's capabilities, in order; null when the list lies: it leads in a
 * circle, or out of the place for it.
 */
export function listCapabilities(device: PciDevice): PciCapability[] | null {
  const found: PciCapability[] = [];
  const status = device.readConfig(ConfigRegister.status, 2);
  if ((status & statusCapabilities) === 0) return found;
  let offset = device.readConfig(ConfigRegister.capabilities, 1) & 0xfc;
  while (offset !== 0) {
    if (offset < firstCapability || found.length === maxCapabilities) {
      return null;
    }
    found.push({ id: device.readConfig(offset, 1), offset });
    offset = device.readConfig(offset + 1, 1) & 0xfc;
  }
  return found;
}
