/**
 * The PCI device behind the data path: started with a guest's features and
 * queues, reset, asked.
 *
 * @module
 */

import { Vhost2Error } from "../../ffi/errors.ts";
import { hasFeature, VirtioFeature } from "../../protocol/features.ts";
import { PciInterrupts } from "../../pci/interrupts.ts";
import {
  type BarFile,
  Command,
  ConfigRegister,
  type PciDevice,
} from "../../pci/pci_device.ts";
import {
  type Condition,
  type QueueAddresses,
  VirtioRegisters,
} from "../../pci/virtio_registers.ts";
import { CardControl } from "./card_control.ts";
import {
  ackedFeatures,
  controlQueue,
  type DeviceOffer,
  networkCard,
  passedFeatures,
  passedQueues,
} from "./features.ts";

/** Of a configuration space, all that vhost-user carries. */
const maxConfigSize = 256;

/** A ring, as the device is given it. */
export interface DeviceRing {
  readonly index: number;
  readonly size: number;
  readonly addresses: QueueAddresses;
}

/** Whose notification register a page of a BAR is. */
export interface NotificationPage extends BarFile {
  /** Bytes. */
  readonly size: number;
}

export class VdpaDevice {
  readonly pci: PciDevice;
  /** The virtio device type: 2 is a disk. */
  readonly type: number;
  /** What of its features a guest can have. */
  readonly features: bigint;
  /** Queues of its that a guest can have. */
  readonly queueCount: number;
  readonly configSize: number;
  readonly interrupts: PciInterrupts;
  /** Configuration has changed, or the device's condition has. */
  onChange: (() => void) | undefined;
  readonly #registers: VirtioRegisters;
  readonly #offer: DeviceOffer;
  /** While it works: of a card whose guest knows of more pairs than one. */
  #control: CardControl | undefined;
  #isUp = false;
  #isStuck = false;
  #isRemoved = false;
  #generation = 0;
  #isOpen = true;

  private constructor(registers: VirtioRegisters, offer: DeviceOffer) {
    const { pci } = registers;
    this.#registers = registers;
    this.#offer = offer;
    this.pci = pci;
    this.type = offer.type;
    this.features = passedFeatures(offer);
    this.queueCount = passedQueues(offer);
    this.configSize = Math.min(maxConfigSize, registers.configSize);
    this.interrupts = new PciInterrupts(pci, 1 + this.queueCount);
    this.interrupts.handle(0, () => this.#interrupted());
    pci.onRemoval = () => {
      this.#isRemoved = true;
      this.onChange?.();
    };
  }

  /**
   * Resets a device and looks at it. Throws PROTOCOL for what is no modern
   * virtio device, TIMEOUT when it does not come out of its reset, CLOSED when
   * it has gone. The PCI device becomes this one's.
   */
  static async open(pci: PciDevice): Promise<VdpaDevice> {
    try {
      const registers = new VirtioRegisters(pci);
      await registers.reset();
      registers.acknowledge();
      return new VdpaDevice(registers, {
        type: registers.type,
        features: registers.offeredFeatures,
        queueCount: registers.queueCount,
        maxPairs: maxPairs(registers),
      });
    } catch (error) {
      pci.close();
      throw error;
    }
  }

  /** Whether it has been given queues (DRIVER_OK). */
  get isUp(): boolean {
    return this.#isUp;
  }

  get condition(): Condition {
    return this.#isRemoved ? "gone" : this.#registers.condition;
  }

  /** It is of no more use in this process until it is opened anew. */
  get isLost(): boolean {
    return this.#isStuck || this.condition === "gone";
  }

  /** Single queues can be stopped and started. */
  get canResetQueues(): boolean {
    return hasFeature(this.#offer.features, VirtioFeature.RING_RESET) &&
      this.#registers.canResetQueues;
  }

  /** Each queue has a vector of its own, and so have changes. */
  get hasOwnVectors(): boolean {
    return this.interrupts.vectorCount > this.queueCount;
  }

  vectorOf(index: number): number {
    return this.hasOwnVectors ? 1 + index : 0;
  }

  /**
   * Resets it, agrees on features, gives it queues, and lets it work. Answers
   * which queues it has refused a vector for. Rejects where it refuses the
   * features or has gone.
   */
  async start(
    features: bigint,
    rings: readonly DeviceRing[],
  ): Promise<Set<number>> {
    const registers = this.#registers;
    if (this.#isStuck) throw this.#stuck();
    await registers.reset();
    registers.acknowledge();
    const acked = ackedFeatures(this.#offer, features);
    registers.agree(acked);
    const isTold = registers.setConfigVector(this.#vector(0));
    if (!isTold) this.#pollChanges();
    const refused = new Set<number>();
    for (const ring of rings) {
      if (!this.#enable(ring)) refused.add(ring.index);
    }
    const control = controlQueue({ ...this.#offer, features: acked });
    if (control !== null) this.#openControl(control, acked);
    registers.start();
    this.#isUp = true;
    this.#generation = registers.configGeneration;
    return refused;
  }

  /** One more queue while it works; false: it has refused its vector. */
  add(ring: DeviceRing): boolean {
    return this.#enable(ring);
  }

  /** Its answers are looked for: it has no vector. */
  #openControl(index: number, features: bigint): void {
    this.#control = new CardControl(this.pci, {
      index,
      largestSize: this.largestQueue(index),
      features,
      notify: this.notifier(index),
    });
    const { size, addresses } = this.#control.ring;
    this.#registers.enableQueue(index, size, addresses, null);
  }

  #closeControl(): void {
    this.#control?.close();
    this.#control = undefined;
  }

  /**
   * These are its queues now, or will be in a moment: a card uses the pairs
   * that are whole, from the first one on. The answer is its failure to.
   */
  async useQueues(indices: readonly number[]): Promise<Vhost2Error | null> {
    if (this.#control === undefined || this.condition !== "ok") return null;
    let pairs = 0;
    while (
      indices.includes(2 * pairs) && indices.includes(2 * pairs + 1)
    ) pairs++;
    return await this.#control.usePairs(Math.max(1, pairs));
  }

  #enable({ index, size, addresses }: DeviceRing): boolean {
    const vector = this.#vector(this.vectorOf(index));
    return this.#registers.enableQueue(index, size, addresses, vector);
  }

  #vector(vector: number): number | null {
    return this.interrupts.vectorCount === 0 ? null : vector;
  }

  #isPolled = false;

  #pollChanges(): void {
    if (this.#isPolled) return;
    this.#isPolled = true;
    this.interrupts.poll(() => this.#interrupted());
  }

  /**
   * When the promise resolves the device does nothing any more: it is reset,
   * has gone, or, where it does not come out of its reset, is off the bus. The
   * answer is that failure.
   */
  async reset(): Promise<Vhost2Error | null> {
    this.#isUp = false;
    const failure = this.#isStuck
      ? null
      : await this.#ended(this.#registers.reset());
    this.#closeControl();
    return failure;
  }

  /** The same for one queue, which RING_RESET is needed for. */
  async resetQueue(index: number): Promise<Vhost2Error | null> {
    if (!this.#isUp) return null;
    return await this.#ended(this.#registers.resetQueue(index));
  }

  async #ended(reset: Promise<void>): Promise<Vhost2Error | null> {
    try {
      await reset;
      return null;
    } catch (error) {
      if (this.condition !== "gone") this.cutOff();
      return error as Vhost2Error;
    }
  }

  /** It can neither read nor write memory any more, whatever it does. */
  cutOff(): void {
    this.#isUp = false;
    this.#isStuck = true;
    const command = this.pci.readConfig(ConfigRegister.command, 2);
    const off = command & ~Command.busMaster;
    this.pci.writeConfig(ConfigRegister.command, 2, off);
  }

  #stuck(): Vhost2Error {
    return new Vhost2Error(
      "CLOSED",
      `Cannot use PCI device ${this.pci.name}: it did not come out of its reset`,
    );
  }

  #interrupted(): void {
    const isShared = !this.hasOwnVectors;
    // A pin goes on until its status is read.
    if (this.interrupts.vectorCount === 0) this.#registers.readIsr();
    // Then it is mostly a queue's.
    if (isShared && this.condition === "ok") {
      const { configGeneration } = this.#registers;
      if (configGeneration === this.#generation) return;
      this.#generation = configGeneration;
    }
    this.onChange?.();
  }

  /** Descriptors at most. Throws PROTOCOL for a queue that is not there. */
  largestQueue(index: number): number {
    return this.#registers.largestQueue(index);
  }

  /** Tells the device of a queue's buffers, each time that it is called. */
  notifier(index: number): () => void {
    const { bar, offset } = this.#registers.notification(index);
    return () => this.pci.writeBar(bar, offset, 2, index);
  }

  /** The page with a queue's notification alone; null where there is none. */
  notificationPage(index: number): NotificationPage | null {
    const size = this.pci.dma.pageSize;
    const { bar, offset } = this.#registers.notification(index);
    if (offset % size !== 0) return null;
    if (this.#registers.notificationDistance % size !== 0) return null;
    const file = this.pci.barFile(bar, offset, size);
    return file === null ? null : { ...file, size };
  }

  /** All of its configuration space. Throws CLOSED when it has gone. */
  readConfig(): Uint8Array<ArrayBuffer> {
    const bytes = this.#registers.readConfigBytes(0, this.configSize);
    if (this.condition !== "gone") return bytes;
    throw new Vhost2Error(
      "CLOSED",
      `Cannot read the configuration of PCI device ${this.pci.name}: it has gone`,
    );
  }

  writeConfig(offset: number, data: Uint8Array): void {
    for (let done = 0; done < data.length;) {
      // A field of the standard's is naturally aligned, and written at once.
      const at = offset + done;
      const left = data.length - done;
      const width = at % 4 === 0 && left >= 4
        ? 4
        : at % 2 === 0 && left >= 2
        ? 2
        : 1;
      let value = 0;
      for (let i = width - 1; i >= 0; i--) value = value * 256 + data[done + i];
      this.#registers.writeConfig(at, width, value);
      done += width;
    }
  }

  /** Lets go of the PCI device, which is reset and closed. */
  close(): void {
    if (!this.#isOpen) return;
    this.#isOpen = false;
    this.onChange = undefined;
    this.pci.onRemoval = undefined;
    this.interrupts.close();
    this.#closeControl();
    this.pci.close();
  }
}

/** As its configuration space says (VIRTIO 1.3 section 5.1.4). */
function maxPairs(registers: VirtioRegisters): number {
  const at = 8;
  if (registers.type !== networkCard || registers.configSize < at + 2) return 0;
  return registers.readConfig(at, 2);
}
