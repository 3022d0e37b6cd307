/**
 * A modern virtio PCI device of any type: its registers, and its queues, which
 * are processed by our own `virtqueue/` over the memory that the driver has
 * mapped for DMA.
 *
 * @module
 */

import assert from "node:assert/strict";
import { binding, core } from "../../ffi/core.ts";
import type { RegisterWidth } from "../../pci/pci_device.ts";
import { type Request, Virtqueue } from "../../virtqueue/mod.ts";
import {
  bytesBar,
  type ModelBar,
  type ModelCapability,
  ModelPciDevice,
  writeCapabilities,
} from "./pci_model.ts";

/** Where the structures are in BAR 0. */
const place = { common: 0, isr: 0x100, device: 0x200, notify: 0x1000 };
const bar0Size = 0x4000;
const notifyMultiplier = 4;
const pageSize = 4096;

/** Offsets in the common configuration. */
const Common = {
  deviceFeatureSelect: 0,
  deviceFeature: 4,
  driverFeatureSelect: 8,
  driverFeature: 12,
  msixConfig: 16,
  queueCount: 18,
  deviceStatus: 20,
  configGeneration: 21,
  queueSelect: 22,
} as const;

interface ModelQueue {
  size: number;
  vector: number;
  isEnabled: boolean;
  readonly addresses: [bigint, bigint, bigint];
  virtqueue: Virtqueue | undefined;
}

export interface VirtioModelOptions {
  /** PCI device id. */
  readonly deviceId: number;
  readonly subsystemId?: number;
  /** VERSION_1 unless given. */
  readonly features?: bigint;
  /** 1 unless given. */
  readonly queueCount?: number;
  readonly queueSize?: number;
  /** The device's own configuration space. */
  readonly deviceConfig?: Uint8Array;
  /** 16 unless given. */
  readonly vectorCount?: number;
  readonly hasPin?: boolean;
  /** Beside those of BAR 0. */
  readonly capabilities?: readonly ModelCapability[];
  /** Bytes of the common configuration; 64 unless given. */
  readonly commonLength?: number;
  /** As QEMU's cards: the queues behind the first 3 are there with MQ only. */
  readonly hidesPairs?: boolean;
  /** A page of its own for each queue's notification, in a file (BAR 2). */
  readonly hasNotifyPages?: boolean;
}

const maxVector = 0xffff;

export class VirtioPciModel extends ModelPciDevice {
  readonly deviceConfig: Uint8Array;
  readonly options: VirtioModelOptions;
  /** Where each capability is in the configuration space, by its type. */
  readonly capabilityOffsets = new Map<number, number>();
  readonly queues: ModelQueue[] = [];
  /** Which features the driver has acked. */
  acked = 0n;
  status = 0;
  generation = 0;
  configVector = maxVector;
  /** Bits of features that FEATURES_OK is refused for. */
  refusedFeatures = 0n;
  /** Vectors that the device refuses. */
  refusesVectors = false;
  /** A reset takes so many reads of the status. */
  resetReads = 0;
  /** The same for the reset of a queue. */
  queueResetReads = 0;
  #resetReadsLeft = 0;
  isr = 0;
  /** Every status that the driver wrote. */
  readonly statuses: number[] = [];
  /** The driver's requests on a queue. */
  onRequest: ((queue: number, request: Request) => void) | undefined;
  /** The driver wrote its own configuration space. */
  onConfigWrite: ((offset: number) => void) | undefined;
  onReset: (() => void) | undefined;
  #deviceFeatureSelect = 0;
  #driverFeatureSelect = 0;
  #queueSelect = 0;
  readonly #stopping = new Set<Promise<void>>();

  constructor(options: VirtioModelOptions) {
    super();
    this.options = options;
    this.vectorCount = options.vectorCount ?? 16;
    this.hasPin = options.hasPin ?? false;
    this.deviceConfig = options.deviceConfig ?? new Uint8Array(8);
    const view = new DataView(this.config.buffer);
    view.setUint16(0, 0x1af4, true);
    view.setUint16(2, options.deviceId, true);
    view.setUint16(0x2e, options.subsystemId ?? 0x1100, true);
    const capabilities: ModelCapability[] = [
      {
        type: 1,
        bar: 0,
        offset: place.common,
        length: options.commonLength ?? 64,
      },
      { type: 3, bar: 0, offset: place.isr, length: 1 },
      {
        type: 4,
        bar: 0,
        offset: place.device,
        length: this.deviceConfig.length,
      },
      options.hasNotifyPages
        ? {
          type: 2,
          bar: 2,
          offset: 0,
          length: pageSize * (options.queueCount ?? 1),
          multiplier: pageSize,
        }
        : {
          type: 2,
          bar: 0,
          offset: place.notify,
          length: 0x1000,
          multiplier: notifyMultiplier,
        },
      ...options.capabilities ?? [],
    ];
    writeCapabilities(this.config, capabilities).forEach((at, i) =>
      this.capabilityOffsets.set(capabilities[i].type, at)
    );
    this.bars[0] = this.#registers();
    if (options.hasNotifyPages) this.#openNotifyPages();
    this.#forget();
    this.onClose = () => {
      this.#stopQueues();
      this.#closeNotifyPages();
    };
  }

  /**
   * As hardware sees a write of another process to a page of BAR 2: by looking
   * at it all the time.
   */
  #openNotifyPages(): void {
    const size = pageSize * (this.options.queueCount ?? 1);
    const fd = core.memfdCreate(size);
    assert.ok(fd >= 0);
    const address = new BigUint64Array(1);
    assert.equal(core.mapShared(fd, size, address), 0);
    const words = new Uint16Array(binding.view(address[0], size));
    words.fill(maxVector);
    const timer = setInterval(() => {
      for (let at = 0; at < size / 2; at += pageSize / 2) {
        const index = Atomics.exchange(words, at, maxVector);
        if (index === maxVector) continue;
        this.directKicks++;
        this.queues[index]?.virtqueue?.kick();
      }
    }, 1);
    this.bars[2] = {
      size,
      fd,
      read: () => 0,
      write: (_offset, _width, value) => this.#notified(value),
    };
    this.#closeNotifyPages = () => {
      clearInterval(timer);
      core.descriptorClose(fd);
      if (typeof words.buffer.transfer !== "function") return;
      words.buffer.transfer();
      assert.equal(core.unmap(address[0], size), 0);
    };
  }

  #closeNotifyPages: () => void = () => {};

  /** Writes to a notification register by the driver of the PCI device. */
  kicks = 0;
  /** The same by another process. */
  directKicks = 0;
  /** Queues that the driver has reset (RING_RESET). */
  readonly queueResets: number[] = [];

  #notified(index: number): void {
    this.kicks++;
    this.queues[index]?.virtqueue?.kick();
  }

  /** Interrupts that there was a reason for. */
  signals = 0;

  /** The pin is level-triggered: until its status is read it goes on. */
  override unmaskPin(): void {
    super.unmaskPin();
    if (this.isr !== 0) this.raisePin();
  }

  get features(): bigint {
    return this.options.features ?? 1n << 32n;
  }

  /** Resolves when what was processed has been let go of. */
  async settled(): Promise<void> {
    await Promise.all(this.#stopping);
  }

  #forget(): void {
    const { queueCount = 1 } = this.options;
    this.queues.splice(0);
    for (let i = 0; i < queueCount; i++) this.queues.push(this.#freshQueue());
    this.acked = 0n;
    this.configVector = maxVector;
  }

  #stopQueues(): void {
    for (const queue of this.queues) this.#stopQueue(queue);
  }

  #stopQueue(queue: ModelQueue): void {
    const stopped = queue.virtqueue?.stop();
    queue.virtqueue = undefined;
    if (stopped === undefined) return;
    this.#stopping.add(stopped);
    stopped.finally(() => this.#stopping.delete(stopped));
  }

  /** A queue is as after a reset of the device. */
  #resetQueue(index: number): void {
    this.queueResets.push(index);
    this.#stopQueue(this.queues[index]);
    this.queues[index] = this.#freshQueue();
  }

  #freshQueue(): ModelQueue {
    return {
      size: this.options.queueSize ?? 128,
      vector: maxVector,
      isEnabled: false,
      addresses: [0n, 0n, 0n],
      virtqueue: undefined,
    };
  }

  /** The device's configuration has changed, or the device is broken. */
  notifyConfig(): void {
    this.generation = (this.generation + 1) & 0xff;
    this.#signal(this.configVector, 2);
  }

  /** It works no more until it is reset. */
  fail(): void {
    this.status |= 0x40;
    this.notifyConfig();
  }

  #signal(vector: number, isrBit: number): void {
    this.isr |= isrBit;
    this.signals++;
    if (this.vectors.length > 0) {
      if (vector !== maxVector) this.interrupt(vector);
    } else this.raisePin();
  }

  #registers(): ModelBar {
    const config = bytesBar(this.deviceConfig);
    const inDevice = (offset: number) =>
      offset >= place.device && offset < place.device + config.size;
    return {
      size: bar0Size,
      read: (offset, width) => {
        if (inDevice(offset)) return config.read(offset - place.device, width);
        if (offset === place.isr) {
          const { isr } = this;
          this.isr = 0;
          return isr;
        }
        return this.#readCommon(offset);
      },
      write: (offset, width, value) => {
        if (inDevice(offset)) {
          config.write(offset - place.device, width, value);
          this.onConfigWrite?.(offset - place.device);
        } else if (offset >= place.notify) {
          this.#notified(value);
        } else this.#writeCommon(offset, width, value);
      },
    };
  }

  #readCommon(offset: number): number {
    const queue = this.queues[this.#queueSelect];
    switch (offset) {
      case Common.deviceFeature:
        return Number(
          this.features >> BigInt(32 * this.#deviceFeatureSelect) &
            0xffff_ffffn,
        );
      case Common.msixConfig:
        return this.configVector;
      case Common.queueCount: {
        const hasAll = (this.acked >> 22n & 1n) === 1n;
        return this.options.hidesPairs && !hasAll ? 3 : this.queues.length;
      }
      case Common.deviceStatus:
        if (this.resetReads > 0) return this.resetReads--, 1;
        return this.status;
      case Common.configGeneration:
        return this.generation;
      case 24:
        return queue?.size ?? 0;
      case 26:
        return queue?.vector ?? maxVector;
      case 28:
        return queue?.isEnabled ? 1 : 0;
      case 30:
        return this.#queueSelect;
      case 58:
        return this.#resetReadsLeft > 0 ? (this.#resetReadsLeft--, 1) : 0;
      default:
        return 0;
    }
  }

  #writeCommon(offset: number, _width: RegisterWidth, value: number): void {
    const queue = this.queues[this.#queueSelect];
    const vector = this.refusesVectors ? maxVector : value;
    switch (offset) {
      case Common.deviceFeatureSelect:
        this.#deviceFeatureSelect = value;
        break;
      case Common.driverFeatureSelect:
        this.#driverFeatureSelect = value;
        break;
      case Common.driverFeature:
        this.acked |= BigInt(value) << BigInt(32 * this.#driverFeatureSelect);
        break;
      case Common.msixConfig:
        this.configVector = vector;
        break;
      case Common.deviceStatus:
        this.#setStatus(value);
        break;
      case Common.queueSelect:
        this.#queueSelect = value;
        break;
      case 24:
        queue.size = value;
        break;
      case 26:
        queue.vector = vector;
        break;
      case 28:
        queue.isEnabled = value === 1;
        // With RING_RESET queues come back while the others work.
        if ((this.status & 4) !== 0) this.#start();
        break;
      case 58:
        if (value === 1) this.#resetQueue(this.#queueSelect);
        this.#resetReadsLeft = this.queueResetReads;
        break;
      default:
        this.#writeAddress(queue, offset - 32, value);
    }
  }

  #writeAddress(queue: ModelQueue, offset: number, value: number): void {
    const index = Math.floor(offset / 8);
    if (index < 0 || index > 2) return;
    const isHigh = offset % 8 === 4;
    const old = queue.addresses[index];
    queue.addresses[index] = isHigh
      ? (old & 0xffff_ffffn) | BigInt(value) << 32n
      : (old & ~0xffff_ffffn) | BigInt(value);
  }

  #setStatus(status: number): void {
    this.statuses.push(status);
    if (status === 0) {
      this.#stopQueues();
      this.#forget();
      this.status = 0;
      this.onReset?.();
      return;
    }
    const isRefused = (this.acked & ~this.features) !== 0n ||
      (this.acked & this.refusedFeatures) !== 0n;
    this.status = status & (isRefused ? ~8 : ~0);
    if ((this.status & 4) !== 0) this.#start();
  }

  #start(): void {
    this.queues.forEach((queue, index) => {
      if (!queue.isEnabled || queue.virtqueue !== undefined) return;
      const [descriptor, available, used] = queue.addresses;
      const isPacked = (this.acked >> 34n & 1n) === 1n;
      const virtqueue: Virtqueue = new Virtqueue({
        index,
        size: queue.size,
        features: this.acked,
        addresses: { space: "gpa", descriptor, available, used },
        memory: this.dma.memory,
        isPolled: false,
        isLogged: false,
        inflight: null,
        leavesInFlight: false,
        leftInFlight: 0,
        availableIndex: isPacked ? 0x8000_8000 : 0,
        call: () => this.#signal(queue.vector, 1),
        missed() {},
        fail: () => this.fail(),
      }, {
        stopTimeoutMs: 0,
        pollMicroseconds: 0,
        process: (count) => {
          for (const request of virtqueue.requests(count)) {
            this.onRequest?.(index, request);
          }
        },
      });
      queue.virtqueue = virtqueue;
      virtqueue.kick();
    });
  }
}
