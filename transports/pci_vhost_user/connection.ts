/**
 * One front-end behind a virtio-vhost-user device. Where a socket carries a
 * descriptor the device has something in its place: a part of its shared
 * memory, a vector, a doorbell.
 *
 * @module
 */

import { Vhost2Error } from "../../ffi/errors.ts";
import type { MappedBar } from "../../pci/pci_device.ts";
import { featureMask, VirtioFeature } from "../../protocol/features.ts";
import { plainWire } from "../../protocol/layout.ts";
import {
  type MemoryRegionDescription,
  memoryTable,
} from "../../protocol/memory_payloads.ts";
import { FLAG_REPLY } from "../../protocol/message.ts";
import {
  type BackendChannel,
  type Connection,
  Descriptors,
  type KickSource,
  type Message,
  type NotificationSink,
  type OutgoingMessage,
} from "../transport.ts";
import { PciBackendChannel } from "./backend_channel.ts";
import type { VhostUserPciDevice } from "./device.ts";
import type { RawMessage } from "./message_queues.ts";

/** Messages of the front-end that wait before it may send no more. */
const maxInbox = 64;
/** Answers that the device has not taken, before no more is handled. */
const maxOutstanding = 16;

/** Both need messages that no device passes on. */
const unusableFeatures = featureMask(
  VirtioFeature.LOG_ALL,
  VirtioFeature.ACCESS_PLATFORM,
);

/** The descriptors of a message, which has none: tells when it was handled. */
class NoDescriptors extends Descriptors {
  readonly #handled: () => void;

  constructor(handled: () => void) {
    super();
    this.#handled = handled;
  }

  override close(): void {
    this.#handled();
  }
}

interface Waiter {
  resolve(message: Message | null): void;
  reject(error: Vhost2Error): void;
}

interface MappedRegion {
  readonly bar: MappedBar;
  readonly address: bigint;
}

export class PciVhostUserConnection implements Connection {
  readonly name: string;
  readonly protocolFeatures: bigint;
  readonly features: bigint = ((1n << 64n) - 1n) & ~unusableFeatures;
  readonly carriesDescriptors = false;
  readonly hangupFd = null;
  onHangup: (() => void) | undefined;
  readonly #device: VhostUserPciDevice;
  readonly #inbox: RawMessage[] = [];
  #waiter: Waiter | undefined;
  /** No more messages come: `null`, or why. */
  #end: Vhost2Error | null | undefined;
  #isOpen = true;
  #backendChannel: PciBackendChannel | undefined;
  readonly #kicks = new Set<() => void>();
  /** Mapped parts of the shared memory, by offset and size. */
  #mapped = new Map<string, MappedRegion>();
  /** Those that the message being handled asks for. */
  #asked: Map<string, MappedRegion> | undefined;

  constructor(device: VhostUserPciDevice, name: string) {
    this.name = name;
    this.#device = device;
    this.protocolFeatures = device.profile.protocolFeatures;
  }

  /** For the transport: a message came. */
  deliver(message: RawMessage): void {
    if (!this.#isOpen || this.#end !== undefined) return;
    const isReply = (message.flags & FLAG_REPLY) !== 0;
    if (isReply && this.#backendChannel !== undefined) {
      if (!this.#backendChannel.reply(message)) this.#backendChannel.close();
      return;
    }
    this.#inbox.push(message);
    if (this.#inbox.length >= maxInbox) this.#device.queues.setPaused(true);
    this.#ready();
  }

  /**
   * For the transport: the front-end has gone, or an error ends the
   * connection; messages that came before are still received.
   */
  hangUp(error: Vhost2Error | null): void {
    if (this.#end !== undefined) return;
    this.#end = error;
    this.onHangup?.();
    this.#ready();
  }

  /** For the transport: the device has taken an answer. */
  sent(): void {
    this.#ready();
  }

  receive(): Promise<Message | null> {
    return new Promise((resolve, reject) => {
      if (this.#waiter !== undefined) {
        throw new Vhost2Error(
          "CLOSED",
          `Cannot read ${this.name} twice at once`,
        );
      }
      this.#waiter = { resolve, reject };
      this.#ready();
    });
  }

  #ready(): void {
    const waiter = this.#waiter;
    if (waiter === undefined) return;
    if (!this.#isOpen) {
      this.#waiter = undefined;
      return waiter.resolve(null);
    }
    const { queues } = this.#device;
    const isAlive = this.#end === undefined;
    if (isAlive && queues.outstanding >= maxOutstanding) return;
    const message = this.#inbox.shift();
    if (message !== undefined) {
      this.#waiter = undefined;
      if (isAlive && this.#inbox.length === 0) queues.setPaused(false);
      const descriptors = new NoDescriptors(() => this.#handled());
      return waiter.resolve({ ...message, descriptors });
    }
    if (isAlive) return;
    this.#waiter = undefined;
    if (this.#end) waiter.reject(this.#end);
    else waiter.resolve(null);
  }

  send(message: OutgoingMessage): void {
    // Who has gone must not leave answers for who comes next.
    if (this.#isOpen && this.#end === undefined) {
      this.#device.queues.send(message);
    }
  }

  regionSource(message: Message, index: number): { address: bigint } {
    const { offset, size } = this.#placeOf(message, index);
    const key = `${offset} ${size}`;
    this.#asked ??= new Map();
    // The same mapping for the same place: such a region is kept.
    const found = this.#asked.get(key) ?? this.#mapped.get(key) ??
      this.#map(Number(offset), Number(size), index);
    this.#asked.set(key, found);
    this.#mapped.set(key, found);
    return { address: found.address };
  }

  #placeOf(message: Message, index: number) {
    const decoded = memoryTable.decode(message.payload, plainWire);
    const regions: readonly MemoryRegionDescription[] = decoded.ok
      ? decoded.value
      : [];
    const region = regions[index];
    if (region === undefined) {
      throw this.#refusal(`region ${index}: the device has no place for it`);
    }
    const { profile, memorySize } = this.#device;
    const offset = regions.slice(0, index).reduce(
      (sum, before) => sum + profile.spanOf(before),
      profile.startOf(region),
    );
    const end = offset + region.size;
    if (region.size === 0n || end > memorySize) {
      throw this.#refusal(
        `region ${index}: bytes ${offset} to ${end} are not in the ${memorySize} of the shared memory`,
      );
    }
    return { offset, size: region.size };
  }

  #map(offset: number, size: number, index: number): MappedRegion {
    try {
      return this.#device.mapMemory(offset, size);
    } catch (error) {
      throw this.#refusal(`region ${index}: ${(error as Error).message}`);
    }
  }

  #refusal(reason: string): Vhost2Error {
    return new Vhost2Error("PROTOCOL", `Cannot map memory ${reason}`);
  }

  /** What a new table does not need any more is the memory's alone now. */
  #handled(): void {
    if (this.#asked === undefined) return;
    const asked = this.#asked;
    this.#asked = undefined;
    for (const [key, region] of this.#mapped) {
      if (!asked.has(key)) region.bar.close();
    }
    this.#mapped = asked;
  }

  openKick(
    queueIndex: number,
    _descriptors: Descriptors,
    onKick: (() => void) | null,
  ): KickSource | null {
    const kick = this.#device.kick(queueIndex);
    // A vector that queues share tells nobody but us whose kick it is.
    if (kick === null || (onKick === null && kick.fd === null)) return null;
    const undo = onKick === null ? () => {} : kick.handle(onKick);
    this.#kicks.add(undo);
    return {
      fd: kick.fd,
      close: () => {
        undo();
        this.#kicks.delete(undo);
      },
    };
  }

  openCall(queueIndex: number): NotificationSink {
    return this.#sink(this.#device.callDoorbell(queueIndex));
  }

  openError(queueIndex: number): NotificationSink {
    return this.#sink(this.#device.errorDoorbell(queueIndex));
  }

  #sink(ring: () => void): NotificationSink {
    let isOpen = true;
    return {
      fd: null,
      signal: () => {
        if (isOpen && this.#isOpen && this.#end === undefined) ring();
      },
      close() {
        isOpen = false;
      },
    };
  }

  openBackendChannel(): BackendChannel {
    this.#backendChannel?.close();
    this.#backendChannel = new PciBackendChannel(
      `${this.name} (back-end channel)`,
      (message) => this.send(message),
    );
    return this.#backendChannel;
  }

  close(): void {
    if (!this.#isOpen) return;
    this.#isOpen = false;
    this.#inbox.length = 0;
    for (const undo of this.#kicks) undo();
    this.#kicks.clear();
    this.#backendChannel?.close();
    for (const { bar } of this.#mapped.values()) bar.close();
    this.#mapped.clear();
    this.#asked = undefined;
    this.#ready();
  }
}
