/**
 * A PCI device that VFIO hands to this process.
 *
 * @module
 */

import { constants, layouts } from "../ffi/abi.gen.ts";
import { core } from "../ffi/core.ts";
import { check, Errno, Vhost2Error } from "../ffi/errors.ts";
import { eventLoop, type Watch } from "../ffi/event_loop.ts";
import { IovaAllocator, type IovaRange } from "./iova_allocator.ts";
import {
  type BarFile,
  Command,
  ConfigRegister,
  type DmaSpace,
  goneValue,
  type MappedBar,
  type PciDevice,
  type RegisterWidth,
} from "./pci_device.ts";
import {
  iommuGroupOf,
  lockedMemoryLimit,
  obstaclesOf,
  pciAddress,
} from "./sysfs.ts";
import { dmaError, type VfioContext, vfioError } from "./vfio_failure.ts";

/** Bytes of each BAR whose registers are mapped; beyond are system calls. */
const registerLimit = 16 << 20;
const barCount = 6;

const failureWords = new Uint32Array(layouts.VfioFailure.byteSize / 4);
const encoder = new TextEncoder();

function opened(result: number, context: VfioContext): number {
  if (result >= 0) return result;
  const field = layouts.VfioFailure;
  const word = (offset: number) => failureWords[offset / 4];
  throw vfioError({
    step: word(field.step),
    errno: word(field.errno),
    value: word(field.value),
  }, context);
}

/** An open IOMMU group: its devices share one space of I/O addresses. */
class VfioGroup {
  readonly handle: number;
  readonly pageSize: number;
  readonly iovas: IovaAllocator;
  #users = 0;

  private constructor(context: VfioContext) {
    this.handle = opened(
      core.vfioGroupOpen(context.group, failureWords),
      context,
    );
    const info = new DataView(new ArrayBuffer(layouts.VfioGroupInfo.byteSize));
    const { byteSize, start, last } = layouts.IovaRange;
    const words = new DataView(
      new ArrayBuffer(byteSize * constants.maxIovaRanges),
    );
    core.vfioGroupInfo(this.handle, info, words, constants.maxIovaRanges);
    this.pageSize = Number(
      info.getBigUint64(layouts.VfioGroupInfo.pageSize, true),
    );
    const count = info.getUint32(layouts.VfioGroupInfo.rangeCount, true);
    const ranges: IovaRange[] = [];
    for (let at = 0; at < count * byteSize; at += byteSize) {
      ranges.push({
        start: words.getBigUint64(at + start, true),
        last: words.getBigUint64(at + last, true),
      });
    }
    this.iovas = new IovaAllocator(ranges, this.pageSize);
  }

  static readonly #open = new Map<number, VfioGroup>();

  /** A group can be open once: its devices in this process share it. */
  static join(context: VfioContext): VfioGroup {
    const group = VfioGroup.#open.get(context.group) ?? new VfioGroup(context);
    VfioGroup.#open.set(context.group, group);
    group.#users++;
    return group;
  }

  leave(number: number): void {
    if (--this.#users > 0) return;
    VfioGroup.#open.delete(number);
    core.vfioGroupClose(this.handle);
  }
}

class VfioDma implements DmaSpace {
  readonly pageSize: number;
  readonly #group: VfioGroup;
  readonly #address: string;
  readonly #mapped = new Map<bigint, number>();

  constructor(group: VfioGroup, address: string) {
    this.#group = group;
    this.#address = address;
    this.pageSize = group.pageSize;
  }

  reserve(size: number, isLast = false): bigint {
    return this.#group.iovas.reserve(size, isLast);
  }

  claim(iova: bigint, size: number): (() => void) | null {
    return this.#group.iovas.claim(iova, size);
  }

  release(iova: bigint, size: number): void {
    this.#group.iovas.release(iova, size);
  }

  map(iova: bigint, address: bigint, size: number): void {
    const result = core.vfioDmaMap(this.#group.handle, address, size, iova);
    if (result < 0) {
      throw dmaError(this.#address, size, iova, -result, lockedMemoryLimit());
    }
    this.#mapped.set(iova, size);
  }

  unmap(iova: bigint, size: number): void {
    if (!this.#mapped.delete(iova)) return;
    core.vfioDmaUnmap(this.#group.handle, size, iova);
  }

  /** Ends all that is mapped: another device of the group may go on. */
  close(): void {
    for (const [iova, size] of [...this.#mapped]) this.unmap(iova, size);
  }
}

/** Addresses of devices that this process has open. VFIO itself would not mind. */
const open = new Set<string>();

/** As `PciDevice` says. Made by {@linkcode openVfioDevice}. */
export class VfioDevice implements PciDevice {
  readonly name: string;
  readonly dma: VfioDma;
  readonly vectorCount: number;
  readonly hasPin: boolean;
  onRemoval: (() => void) | undefined;
  readonly #handle: number;
  readonly #group: VfioGroup;
  readonly #groupNumber: number;
  readonly #barSizes: readonly number[];
  readonly #canBeAskedBack: boolean;
  #removal: { fd: number; watch: Watch } | undefined;
  #isOpen = true;

  /** Use `openVfioDevice`. */
  constructor(context: VfioContext) {
    this.name = context.address;
    this.#groupNumber = context.group;
    this.#group = VfioGroup.join(context);
    try {
      const name = encoder.encode(context.address);
      this.#handle = opened(
        core.vfioDeviceOpen(
          this.#group.handle,
          name,
          name.length,
          failureWords,
        ),
        context,
      );
    } catch (error) {
      this.#group.leave(context.group);
      throw error;
    }
    open.add(context.address);
    this.dma = new VfioDma(this.#group, context.address);
    const field = layouts.VfioDeviceInfo;
    const info = new DataView(new ArrayBuffer(field.byteSize));
    core.vfioDeviceInfo(this.#handle, info);
    this.vectorCount = info.getUint32(field.msixCount, true);
    this.hasPin = info.getUint32(field.intxCount, true) > 0;
    this.#canBeAskedBack = info.getUint32(field.requestCount, true) > 0;
    const first = field.barSize0;
    this.#barSizes = Array.from(
      { length: barCount },
      (_, bar) => Number(info.getBigUint64(first + 8 * bar, true)),
    );
    try {
      this.#prepare();
    } catch (error) {
      this.close();
      throw error;
    }
  }

  #prepare(): void {
    const command = this.readConfig(ConfigRegister.command, 2);
    this.writeConfig(
      ConfigRegister.command,
      2,
      command | Command.memory | Command.busMaster,
    );
    for (let bar = 0; bar < barCount; bar++) {
      const size = Math.min(this.barSize(bar), registerLimit);
      // Where it may not be mapped each access is a system call.
      if (size > 0) core.vfioMapRegisters(this.#handle, bar, size);
    }
    if (!this.#canBeAskedBack) return;
    const fd = check(core.eventfdCreate(), "Cannot make a removal eventfd");
    try {
      const watch = eventLoop.watch(fd, () => this.onRemoval?.());
      this.#removal = { fd, watch };
    } catch (error) {
      core.descriptorClose(fd);
      throw error;
    }
    this.#route(constants.interruptRequest, [fd]);
  }

  readConfig(offset: number, width: RegisterWidth): number {
    return this.#read(constants.vfioConfigRegion, offset, width);
  }

  writeConfig(offset: number, width: RegisterWidth, value: number): void {
    this.#write(constants.vfioConfigRegion, offset, width, value);
  }

  barSize(bar: number): number {
    return this.#barSizes[bar] ?? 0;
  }

  readBar(bar: number, offset: number, width: RegisterWidth): number {
    return this.#read(bar, offset, width);
  }

  writeBar(
    bar: number,
    offset: number,
    width: RegisterWidth,
    value: number,
  ): void {
    this.#write(bar, offset, width, value);
  }

  #read(region: number, offset: number, width: RegisterWidth): number {
    const result = core.vfioRead(this.#handle, region, offset, width);
    if (result >= 0) return result;
    if (result === -Errno.EINVAL) throw this.#outside(region, offset);
    return goneValue[width];
  }

  #write(
    region: number,
    offset: number,
    width: RegisterWidth,
    value: number,
  ): void {
    const result = core.vfioWrite(this.#handle, region, offset, width, value);
    if (result === -Errno.EINVAL) throw this.#outside(region, offset);
  }

  #outside(region: number, offset: number): Vhost2Error {
    const where = region === constants.vfioConfigRegion
      ? "the configuration space"
      : `BAR ${region}`;
    return new Vhost2Error(
      "OPTION",
      `Cannot reach offset ${offset} of ${where} of PCI device ${this.name}: it is outside, or not aligned`,
    );
  }

  mapBar(bar: number, offset: number, size: number): MappedBar {
    const out = new BigUint64Array(1);
    check(
      core.vfioMapMemory(this.#handle, bar, offset, size, out),
      `Cannot map ${size} bytes at ${offset} of BAR ${bar} of PCI device ${this.name}`,
    );
    const address = out[0];
    let isOpen = true;
    return {
      address,
      size,
      close() {
        if (isOpen) core.unmap(address, size);
        isOpen = false;
      },
    };
  }

  barFile(bar: number, offset: number, size: number): BarFile | null {
    const out = new BigUint64Array(1);
    const fd = core.vfioBarFile(this.#handle, bar, offset, size, out);
    return fd < 0 ? null : { fd, offset: Number(out[0]) };
  }

  setVectors(fds: readonly number[], first?: number): void {
    this.#route(constants.interruptMsix, fds, first);
  }

  setPin(fd: number | null): void {
    this.#route(constants.interruptIntx, fd === null ? [] : [fd]);
  }

  unmaskPin(): void {
    core.vfioUnmask(this.#handle);
  }

  #route(kind: number, fds: readonly number[], first = 0): void {
    const result = core.vfioInterrupts(
      this.#handle,
      kind,
      first,
      Int32Array.from(fds),
      fds.length,
    );
    // Turning off what has gone, or is off, is no failure.
    if (fds.length === 0) return;
    check(result, `Cannot set up interrupts of PCI device ${this.name}`);
  }

  close(): void {
    if (!this.#isOpen) return;
    this.#isOpen = false;
    const command = this.readConfig(ConfigRegister.command, 2);
    this.writeConfig(ConfigRegister.command, 2, command & ~Command.busMaster);
    core.vfioDeviceClose(this.#handle);
    open.delete(this.name);
    this.dma.close();
    this.#group.leave(this.#groupNumber);
    this.#removal?.watch.close();
    if (this.#removal !== undefined) core.descriptorClose(this.#removal.fd);
    this.#removal = undefined;
  }

  [Symbol.dispose](): void {
    this.close();
  }
}

/**
 * Opens a PCI device that is bound to `vfio-pci`. Its registers are mapped,
 * it may answer on the bus and use DMA; nothing else of it is changed.
 *
 * @param address such as `0000:00:05.0`
 * @throws Vhost2Error OPTION for what is no address; IN_USE for what is open
 * already; SYSTEM, with what to do, when the device or its IOMMU group cannot
 * be used
 *
 * @example
 * ```ts
 * import { openVfioDevice } from "vhost2/pci";
 * try {
 *   using device = openVfioDevice("0000:ff:1f.7");
 *   console.log(device.readConfig(0, 2).toString(16));
 * } catch (error) {
 *   console.log((error as Error).message); // what is missing, and what to do
 * }
 * ```
 */
export function openVfioDevice(address: string): VfioDevice {
  const name = pciAddress(address);
  if (open.has(name)) {
    throw new Vhost2Error(
      "IN_USE",
      `Cannot open PCI device ${name}: this process has it open already`,
    );
  }
  const group = iommuGroupOf(name);
  return new VfioDevice({
    address: name,
    group,
    obstacles: obstaclesOf(name),
  });
}
