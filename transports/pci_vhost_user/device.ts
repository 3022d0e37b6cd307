/**
 * The virtio-vhost-user device: who is there (its configuration space),
 * doorbells, notification vectors, shared memory, and messages.
 *
 * @module
 */

import { Vhost2Error } from "../../ffi/errors.ts";
import type { MappedBar, PciDevice } from "../../pci/pci_device.ts";
import { NO_VECTOR } from "../../pci/interrupts.ts";
import {
  CapabilityType,
  requireCapability,
  type VirtioCapability,
} from "../../pci/virtio_capabilities.ts";
import { VirtioPciDevice } from "../../pci/virtio_pci_device.ts";
import type { Condition } from "../../pci/virtio_registers.ts";
import {
  type MessageQueues,
  MessageQueues as Queues,
  type MessageReceiver,
  queueMemorySize,
} from "./message_queues.ts";
import { type Profile, type ProfileName, profileOf } from "./profiles.ts";

/** Fields of the configuration space. */
const Config = { status: 0, maxVhostQueues: 4 } as const;
const configSize = 24;

/** Bits of the status. */
export const VhostUserStatus = { backendUp: 1, frontendUp: 2 } as const;

/** Of a region of shared memory, where they have numbers: guest memory. */
const guestMemoryId = 1;

/** A queue's kick, as its vector is shared out. */
export interface KickVector {
  /** Calls `handler` at each kick; returns the undo. */
  handle(handler: () => void): () => void;
  /** The eventfd, where no other queue has it too. */
  readonly fd: number | null;
}

export class VhostUserPciDevice {
  readonly pci: PciDevice;
  readonly profile: Profile;
  readonly queues: MessageQueues;
  readonly #virtio: VirtioPciDevice;
  readonly #doorbells: VirtioCapability;
  readonly #memory: VirtioCapability;
  readonly #maxQueues: number;
  readonly #kicks: (KickVector | null)[] = [];

  private constructor(
    virtio: VirtioPciDevice,
    profile: Profile,
    queueCount: number,
    receiver: MessageReceiver,
  ) {
    this.pci = virtio.pci;
    this.profile = profile;
    this.#virtio = virtio;
    const { pci, capabilities } = virtio;
    const { doorbell, sharedMemory } = CapabilityType;
    this.#doorbells = requireCapability(pci, capabilities, doorbell);
    const first = requireCapability(pci, capabilities, sharedMemory);
    this.#memory =
      capabilities.usable.find(({ type, id }) =>
        type === sharedMemory && id === guestMemoryId
      ) ?? first;
    if (virtio.configSize < configSize) {
      throw new Vhost2Error(
        "PROTOCOL",
        `Cannot use PCI device ${pci.name}: its configuration has ${virtio.configSize} bytes, needs ${configSize}`,
      );
    }
    this.#maxQueues = virtio.readConfig(Config.maxVhostQueues, 4);
    if (queueCount > this.#maxQueues) {
      throw new Vhost2Error(
        "OPTION",
        `Cannot serve ${queueCount} queues through PCI device ${pci.name}: it has ${this.#maxQueues}`,
      );
    }
    for (const index of [queueCount - 1, this.#maxQueues + queueCount - 1]) {
      this.#doorbellOffset(index);
    }
    this.queues = new Queues(virtio, receiver);
    // Before the front-end may come: crosvm wants them then.
    for (let index = 0; index < queueCount; index++) {
      this.#kicks.push(this.#setKickVector(index, queueCount));
    }
  }

  /**
   * Resets and starts the device; the front-end cannot come yet. Throws as
   * `VirtioPciDevice.open`, and OPTION when the device has fewer queues.
   */
  static async open(
    pci: PciDevice,
    options: {
      readonly profile: ProfileName | undefined;
      readonly queueCount: number;
      readonly receiver: MessageReceiver;
      onChange(): void;
    },
  ): Promise<VhostUserPciDevice> {
    const profile = profileOf(pci, options.profile);
    const virtio = await VirtioPciDevice.open(pci, {
      queueCount: 2,
      extraVectors: options.queueCount,
      memorySize: queueMemorySize,
      // QEMU says 0x1000, whatever there is.
      isOpenEnded: (type) => type === CapabilityType.sharedMemory,
    });
    try {
      const { queueCount, receiver } = options;
      const device = new VhostUserPciDevice(
        virtio,
        profile,
        queueCount,
        receiver,
      );
      virtio.onConfigChange = options.onChange;
      virtio.start();
      device.queues.start();
      return device;
    } catch (error) {
      await virtio.close();
      throw error;
    }
  }

  /** Whether the device itself works. */
  get condition(): Condition {
    return this.#virtio.condition;
  }

  /** Bits of {@linkcode VhostUserStatus}. */
  get status(): number {
    return this.#virtio.readConfig(Config.status, 4);
  }

  /** Lets a front-end come, or sends it away. */
  setBackendUp(isUp: boolean): void {
    const status = isUp ? VhostUserStatus.backendUp : 0;
    this.#virtio.writeConfig(Config.status, 4, status);
  }

  #doorbellOffset(index: number): number {
    const { offset, length, multiplier } = this.#doorbells;
    const at = index * multiplier;
    if (at + 2 <= length) return offset + at;
    throw new Vhost2Error(
      "PROTOCOL",
      `Cannot use PCI device ${this.pci.name}: doorbell ${index} is at ${at} of ${length} bytes`,
    );
  }

  /** What tells the guest's driver of used buffers. */
  callDoorbell(queueIndex: number): () => void {
    return this.#doorbell(queueIndex, queueIndex);
  }

  /** What tells the front-end of a broken ring. */
  errorDoorbell(queueIndex: number): () => void {
    return this.#doorbell(this.#maxQueues + queueIndex, queueIndex);
  }

  /** 16 bits: any other width takes QEMU a slower way. */
  #doorbell(index: number, value: number): () => void {
    const at = this.#doorbellOffset(index);
    const { bar } = this.#doorbells;
    return () => this.pci.writeBar(bar, at, 2, value);
  }

  /** The kicks of a queue; null where the device gives none. */
  kick(queueIndex: number): KickVector | null {
    return this.#kicks[queueIndex] ?? null;
  }

  #setKickVector(index: number, queueCount: number): KickVector | null {
    const { interrupts, firstExtraVector: first } = this.#virtio;
    const place = this.#virtio.capabilities.usable.find(({ type }) =>
      type === CapabilityType.notification
    );
    const count = interrupts.vectorCount - first;
    if (place === undefined || count < 1) return null;
    const vector = first + index % count;
    this.pci.writeBar(place.bar, place.offset, 2, index);
    this.pci.writeBar(place.bar, place.offset + 2, 2, vector);
    const taken = this.pci.readBar(place.bar, place.offset + 2, 2);
    if (taken === NO_VECTOR) return null;
    const isOwn = count >= queueCount && first > 0;
    return {
      handle: (handler) => interrupts.handle(vector, handler),
      fd: isOwn ? interrupts.descriptor(vector) : null,
    };
  }

  /** Bytes that the shared memory may have. */
  get memorySize(): bigint {
    return BigInt(this.#memory.length);
  }

  /** Maps whole pages of the shared memory's BAR around a part of it. */
  mapMemory(offset: number, size: number): { bar: MappedBar; address: bigint } {
    const { pageSize } = this.pci.dma;
    const start = this.#memory.offset + offset;
    const first = Math.floor(start / pageSize) * pageSize;
    const end = Math.ceil((start + size) / pageSize) * pageSize;
    const bar = this.pci.mapBar(this.#memory.bar, first, end - first);
    return { bar, address: bar.address + BigInt(start - first) };
  }

  /** Resets the device; the PCI device stays open. */
  async close(): Promise<void> {
    this.queues.close();
    await this.#virtio.close();
  }
}
