/**
 * A PCI device made of nothing but this process's memory: what `pci/` drives
 * in tests. BARs are handlers, or memory that can be mapped; interrupts are
 * the driver's eventfds; DMA reaches what the driver has mapped.
 *
 * @module
 */

import assert from "node:assert/strict";
import { readdirSync, readFileSync, statSync } from "node:fs";
import { core } from "../../ffi/core.ts";
import { GuestMemory, type RegionDescription } from "../../ffi/guest_memory.ts";
import { IovaAllocator } from "../../pci/iova_allocator.ts";
import {
  type BarFile,
  type DmaSpace,
  goneValue,
  type MappedBar,
  type PciDevice,
  type RegisterWidth,
} from "../../pci/pci_device.ts";

/** What a BAR is. */
export interface ModelBar {
  readonly size: number;
  read(offset: number, width: RegisterWidth): number;
  write(offset: number, width: RegisterWidth, value: number): void;
  /** Address of the memory behind it, where it is memory. */
  readonly address?: bigint;
  /** The file behind it, where another process may map it. */
  readonly fd?: number;
}

/** The memory that the driver lets the device reach. */
export class ModelDma implements DmaSpace {
  readonly pageSize = 4096;
  /** As the device sees it: gpa is the I/O address. */
  #memory = new GuestMemory();
  readonly #iovas = new IovaAllocator(
    // The hole is where interrupt messages go.
    [{ start: 0n, last: 0xfedf_ffffn }, {
      start: 0xfef0_0000n,
      last: (1n << 39n) - 1n,
    }],
    this.pageSize,
  );
  /** Sizes by I/O address. */
  readonly #mapped = new Map<bigint, number>();
  /** What the system answers to the next mapping, for tests of failure. */
  failure: Error | undefined;
  /** The same for one mapping each; undefined lets one be made. */
  readonly failures: (Error | undefined)[] = [];

  /** Mappings that the driver has made and not undone. */
  get count(): number {
    return this.#mapped.size;
  }

  reserve(size: number, isLast = false): bigint {
    return this.#iovas.reserve(size, isLast);
  }

  claim(iova: bigint, size: number): (() => void) | null {
    return this.#iovas.claim(iova, size);
  }

  release(iova: bigint, size: number): void {
    this.#iovas.release(iova, size);
  }

  map(iova: bigint, address: bigint, size: number): void {
    const failure = this.failure ?? this.failures.shift();
    if (failure !== undefined) throw failure;
    assert.ok(!this.#mapped.has(iova), "mapped twice");
    // Of a file that became shorter a real device has the pages all the same;
    // here it reaches nothing any more until all of that is gone.
    if (this.#mapped.size === 0 && this.#memory.state !== "ok") {
      this.#memory.close();
      this.#memory = new GuestMemory();
    }
    try {
      this.#add(iova, size, 0n, { address });
    } catch {
      // Guest memory cannot be lent: the model maps its file a second time.
      const { fd, offset } = fileBehind(address);
      this.#add(iova, size, offset, { fd });
    }
    this.#mapped.set(iova, size);
  }

  #add(
    iova: bigint,
    size: number,
    mmapOffset: bigint,
    source: RegionDescription["source"],
  ): void {
    this.#memory.prepare("add", [
      { gpa: iova, uva: iova, size: BigInt(size), mmapOffset, source },
    ]);
    this.#memory.commit();
  }

  /** Where something is mapped, in order. */
  get ranges(): { iova: bigint; size: number }[] {
    return [...this.#mapped].map(([iova, size]) => ({ iova, size }))
      .sort((a, b) => Number(a.iova - b.iova));
  }

  get memory(): GuestMemory {
    return this.#memory;
  }

  unmap(iova: bigint, size: number): void {
    if (this.#mapped.get(iova) !== size) return;
    this.#mapped.delete(iova);
    this.#memory.prepare("remove", [{
      gpa: iova,
      uva: iova,
      size: BigInt(size),
      mmapOffset: 0n,
      source: { fd: -1 },
    }]);
    this.#memory.commit();
  }

  close(): void {
    this.#memory.close();
  }
}

/** The file that is mapped at an address, as a descriptor of this process. */
function fileBehind(address: bigint): { fd: number; offset: bigint } {
  for (const line of readFileSync("/proc/self/maps", "utf8").split("\n")) {
    const match = /^(\w+)-(\w+) \S+ (\w+) \S+ (\d+)/.exec(line);
    if (match === null) continue;
    const [start, end, offset] = match.slice(1, 4).map((x) => BigInt(`0x${x}`));
    if (address < start || address >= end) continue;
    for (const name of readdirSync("/proc/self/fd")) {
      try {
        if (statSync(`/proc/self/fd/${name}`).ino !== Number(match[4])) {
          continue;
        }
      } catch {
        continue;
      }
      return { fd: Number(name), offset: offset + address - start };
    }
  }
  throw new Error(`No file is behind 0x${address.toString(16)}`);
}

function readBytes(bytes: Uint8Array, offset: number, width: RegisterWidth) {
  let value = 0;
  for (let i = width - 1; i >= 0; i--) value = value * 256 + bytes[offset + i];
  return value;
}

/** Memory as a BAR: registers without a life of their own. */
export function bytesBar(bytes: Uint8Array): ModelBar {
  return {
    size: bytes.length,
    read: (offset, width) => readBytes(bytes, offset, width),
    write(offset, width, value) {
      for (let i = 0; i < width; i++) {
        bytes[offset + i] = (value >>> (8 * i)) & 0xff;
      }
    },
  };
}

export class ModelPciDevice implements PciDevice {
  readonly name: string;
  readonly dma = new ModelDma();
  readonly config = new Uint8Array(256);
  readonly bars: (ModelBar | undefined)[] = [];
  vectorCount = 0;
  hasPin = false;
  onRemoval: (() => void) | undefined;
  /** Set: it answers all ones and takes nothing. */
  isGone = false;
  /** Eventfds by vector, as the driver has set them. */
  readonly vectors: number[] = [];
  /** Which were given an eventfd, one after the other. */
  readonly vectorsSet: number[] = [];
  pin: number | null = null;
  isPinMasked = false;
  /** How often the pin has interrupted. */
  pinInterrupts = 0;
  isClosed = false;
  /** Parts of BARs that are mapped now. */
  mappedBars = 0;
  /** How often `close` was called. */
  onClose: (() => void) | undefined;

  constructor(name = "0000:00:05.0") {
    this.name = name;
  }

  readConfig(offset: number, width: RegisterWidth): number {
    if (this.isGone) return goneValue[width];
    assert.ok(offset >= 0 && offset + width <= this.config.length);
    return readBytes(this.config, offset, width);
  }

  writeConfig(offset: number, width: RegisterWidth, value: number): void {
    if (!this.isGone) bytesBar(this.config).write(offset, width, value);
  }

  barSize(bar: number): number {
    return this.bars[bar]?.size ?? 0;
  }

  #bar(bar: number, offset: number, width: RegisterWidth): ModelBar {
    assert.ok(!this.isClosed, "a register is used after close");
    const found = this.bars[bar];
    assert.ok(found !== undefined, `BAR ${bar} does not exist`);
    assert.ok(
      offset >= 0 && offset % width === 0 && offset + width <= found.size,
      `an access of ${width} bytes at ${offset} of BAR ${bar}`,
    );
    return found;
  }

  readBar(bar: number, offset: number, width: RegisterWidth): number {
    const found = this.#bar(bar, offset, width);
    return this.isGone ? goneValue[width] : found.read(offset, width);
  }

  writeBar(
    bar: number,
    offset: number,
    width: RegisterWidth,
    value: number,
  ): void {
    const found = this.#bar(bar, offset, width);
    if (!this.isGone) found.write(offset, width, value);
  }

  mapBar(bar: number, offset: number, size: number): MappedBar {
    const found = this.bars[bar];
    assert.ok(found?.address !== undefined, `BAR ${bar} is no memory`);
    assert.ok(offset % 4096 === 0 && size % 4096 === 0);
    assert.ok(offset >= 0 && size > 0 && offset + size <= found.size);
    this.mappedBars++;
    let isOpen = true;
    return {
      address: found.address + BigInt(offset),
      size,
      close: () => {
        if (isOpen) this.mappedBars--;
        isOpen = false;
      },
    };
  }

  barFile(bar: number, offset: number, size: number): BarFile | null {
    const fd = this.bars[bar]?.fd;
    if (fd === undefined || offset % 4096 !== 0 || size % 4096 !== 0) {
      return null;
    }
    return offset + size <= this.barSize(bar) ? { fd, offset } : null;
  }

  setVectors(fds: readonly number[], first = 0): void {
    assert.ok(first + fds.length <= this.vectorCount);
    if (fds.length === 0) this.vectors.length = 0;
    for (const [i, fd] of fds.entries()) {
      this.vectors[first + i] = fd;
      this.vectorsSet.push(first + i);
    }
  }

  setPin(fd: number | null): void {
    this.pin = fd;
    this.isPinMasked = false;
  }

  unmaskPin(): void {
    this.isPinMasked = false;
  }

  /** MSI-X: signals a vector's eventfd, if the driver gave one. */
  interrupt(vector: number): void {
    const fd = this.vectors[vector];
    if (!this.isGone && fd !== undefined) core.eventfdSignal(fd);
  }

  /** INTx. */
  raisePin(): void {
    if (this.isGone || this.pin === null || this.isPinMasked) return;
    this.isPinMasked = true;
    this.pinInterrupts++;
    core.eventfdSignal(this.pin);
  }

  close(): void {
    assert.ok(!this.isClosed, "closed twice");
    this.isClosed = true;
    this.vectors.length = 0;
    this.pin = null;
    this.onClose?.();
    this.dma.close();
  }
}

/** A capability as the tests describe it. */
export interface ModelCapability {
  readonly type: number;
  readonly bar: number;
  readonly offset: number;
  readonly length: number;
  readonly multiplier?: number;
  readonly id?: number;
  /** Bytes that the capability says it has. */
  readonly size?: number;
}

/** Writes a list of vendor capabilities; answers where each one is. */
export function writeCapabilities(
  config: Uint8Array,
  capabilities: readonly ModelCapability[],
): number[] {
  const view = new DataView(config.buffer);
  config[6] |= 0x10;
  // Another vendor's capability comes first, as on a real device (MSI-X).
  config[0x34] = 0x40;
  config[0x40] = 0x11;
  let last = 0x40;
  let next = 0x50;
  return capabilities.map((capability) => {
    const at = next;
    const size = capability.size ??
      (capability.multiplier === undefined ? 16 : 20);
    config[last + 1] = at;
    last = at;
    next = Math.ceil((at + Math.max(size, 16)) / 4) * 4;
    view.setUint8(at, 0x09);
    view.setUint8(at + 2, size);
    view.setUint8(at + 3, capability.type);
    view.setUint8(at + 4, capability.bar);
    view.setUint8(at + 5, capability.id ?? 0);
    view.setUint32(at + 8, capability.offset % 2 ** 32, true);
    view.setUint32(at + 12, capability.length % 2 ** 32, true);
    if (size >= 24) {
      view.setUint32(at + 16, Math.floor(capability.offset / 2 ** 32), true);
      view.setUint32(at + 20, Math.floor(capability.length / 2 ** 32), true);
    } else if (capability.multiplier !== undefined) {
      view.setUint32(at + 16, capability.multiplier, true);
    }
    return at;
  });
}
