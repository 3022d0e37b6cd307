/**
 * A virtio-vhost-user device as QEMU and crosvm make it: on one side the
 * registers that `transports/pci_vhost_user/` drives, on the other a socket
 * with a front-end. Each message of the front-end becomes a buffer of queue 0,
 * each buffer of queue 1 a message to the front-end; memory appears in the
 * BAR, kicks become vectors, doorbells become calls.
 *
 * @module
 */

import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import { check } from "../../ffi/errors.ts";
import { eventLoop, type Watch } from "../../ffi/event_loop.ts";
import { FrontendRequest as Id } from "../../protocol/frontend_request.ts";
import { plainWire } from "../../protocol/layout.ts";
import { memoryTable } from "../../protocol/memory_payloads.ts";
import { FLAG_REPLY } from "../../protocol/message.ts";
import type { Message } from "../../transports/transport.ts";
import { Channel } from "../../transports/vhost_user/channel.ts";
import type { Request } from "../../virtqueue/mod.ts";
import type { ModelBar, ModelCapability } from "./pci_model.ts";
import { VirtioPciModel } from "./virtio_pci_model.ts";

/** The devices that exist. */
export const devices = {
  "QEMU 2018": { id: 0x1058, kind: "qemu", vhostQueues: 1024 },
  "QEMU 2018, transitional": { id: 0x1017, kind: "qemu", vhostQueues: 1024 },
  "QEMU 2022": { id: 0x106b, kind: "qemu", vhostQueues: 1024 },
  "crosvm": { id: 0x107d, kind: "crosvm", vhostQueues: 16 },
} as const;

export type DeviceName = keyof typeof devices;

/** Bits of the status in configuration space. */
const backendUp = 1;
const frontendUp = 2;
/** Requests that QEMU's device passes on. */
const relayedByQemu = [
  ...[1, 2, 3, 4, 5],
  ...[8, 9, 10, 11, 12, 13],
  ...[15, 16, 17, 18],
];
/** MQ and LOG_SHMFD: the only protocol features that QEMU's lets through. */
const qemuProtocolFeatures = 3n;

const doorbellMultiplier = 4;
const notificationOffset = 0x2000;
const memoryOffset = 0x3000;
const noVector = 0xffff;

export interface VhostUserPciModelOptions {
  readonly device?: DeviceName;
  readonly vectorCount?: number;
  readonly hasPin?: boolean;
  readonly vhostQueues?: number;
  readonly features?: bigint;
  /** No capability for notification vectors. */
  readonly hasNotifications?: boolean;
  /** Bytes of the shared memory; 64 MiB unless given. */
  readonly memorySize?: number;
  /** The shared memory capability is a 64-bit one with this number. */
  readonly memoryId?: number;
  /** Changes the capabilities, to lie. */
  readonly capabilities?: (all: ModelCapability[]) => ModelCapability[];
}

function capabilitiesOf(
  kind: "qemu" | "crosvm",
  memorySize: number,
  options: VhostUserPciModelOptions,
): ModelCapability[] {
  const memory = kind === "qemu"
    ? { bar: 2, offset: memoryOffset, length: 0x1000 }
    : { bar: 4, offset: 0, length: memorySize };
  const all: ModelCapability[] = [
    { type: 6, bar: 2, offset: 0, length: 0x2000, multiplier: 4 },
    { type: 7, bar: 2, offset: notificationOffset, length: 0x1000 },
    options.memoryId === undefined ? { type: 8, ...memory } : {
      type: 8,
      ...memory,
      length: memorySize,
      id: options.memoryId,
      size: 24,
    },
  ].filter(({ type }) => type !== 7 || options.hasNotifications !== false);
  return options.capabilities?.(all) ?? all;
}

export class VhostUserPciModel extends VirtioPciModel {
  readonly kind: "qemu" | "crosvm";
  readonly vhostQueues: number;
  /** Doorbells that were rung without a call to ring for. */
  lateCalls = 0;
  /** Requests passed on to the driver. */
  readonly relayed: number[] = [];
  /** Values written to doorbells, by doorbell. */
  readonly rung = new Map<number, number>();
  readonly #memory: { address: bigint; size: number };
  readonly #barOffset: number;
  readonly #buffers: Request[] = [];
  #channel: Channel | undefined;
  /** The front-end waits for BACKEND_UP. */
  #waiting: Channel | undefined;
  #requests: Channel | undefined;
  #wake: (() => void) | undefined;
  #mappedSpan = 0;
  readonly #vectors = new Map<number, number>();
  #selected = 0;
  readonly #kicks = new Map<number, { fd: number; watch: Watch }>();
  readonly #calls = new Map<number, number>();

  constructor(options: VhostUserPciModelOptions = {}) {
    const device = devices[options.device ?? "QEMU 2022"];
    const memorySize = options.memorySize ?? 64 << 20;
    const vhostQueues = options.vhostQueues ?? device.vhostQueues;
    const config = new Uint8Array(24);
    const view = new DataView(config.buffer);
    view.setUint32(4, vhostQueues, true);
    config.fill(0x5a, 8);
    super({
      deviceId: device.id,
      features: options.features ?? (1n << 32n) |
          (device.kind === "crosvm" ? 1n << 33n : 0n),
      queueCount: 2,
      queueSize: device.kind === "crosvm" ? 256 : 128,
      deviceConfig: config,
      vectorCount: options.vectorCount ?? vhostQueues + 3,
      hasPin: options.hasPin,
      capabilities: capabilitiesOf(device.kind, memorySize, options),
    });
    this.kind = device.kind;
    this.vhostQueues = vhostQueues;
    this.#barOffset = this.kind === "qemu" ? memoryOffset : 0;
    const size = this.#barOffset + memorySize;
    const out = new BigUint64Array(1);
    check(core.mapAnonymous(size, out), "Cannot make the shared memory");
    this.#memory = { address: out[0], size };
    const registers = this.#vhostRegisters();
    if (this.kind === "qemu") {
      this.bars[2] = { ...registers, size, address: out[0] };
    } else {
      this.bars[2] = registers;
      this.bars[4] = {
        size,
        address: out[0],
        read: () => assert.fail("memory is no register"),
        write: () => assert.fail("memory is no register"),
      };
    }
    this.onRequest = (queue, request) => {
      if (queue === 1) return this.#fromDriver(request);
      this.#buffers.push(request);
      this.#wake?.();
    };
    this.onConfigWrite = () => this.#statusWritten();
    this.onReset = () => {
      this.#buffers.length = 0;
      this.#vectors.clear();
      this.#dropFrontend();
      this.vhostStatus = 0;
    };
    const { onClose } = this;
    this.onClose = () => {
      onClose?.();
      this.#dropFrontend();
      check(
        core.unmap(this.#memory.address, this.#memory.size),
        "Cannot unmap the shared memory",
      );
    };
  }

  /** The status in configuration space. */
  get vhostStatus(): number {
    return this.deviceConfig[0];
  }

  set vhostStatus(status: number) {
    this.deviceConfig.fill(0, 0, 4);
    this.deviceConfig[0] = status;
  }

  /** Buffers that the driver has posted. */
  get bufferCount(): number {
    return this.#buffers.length;
  }

  /** Whether a front-end is connected to the driver. */
  get isConnected(): boolean {
    return this.#channel !== undefined;
  }

  /** Takes the other end of a front-end's socket, now or when it may come. */
  attach(fd: number): void {
    const channel = new Channel(fd, "front-end of the model");
    if ((this.vhostStatus & backendUp) === 0 || this.#channel !== undefined) {
      assert.equal(this.#waiting, undefined, "two front-ends wait");
      this.#waiting = channel;
    } else this.#frontendUp(channel);
  }

  #frontendUp(channel: Channel): void {
    this.#channel = channel;
    this.vhostStatus |= frontendUp;
    this.notifyConfig();
    void this.#relay(channel);
  }

  #statusWritten(): void {
    const status = this.vhostStatus;
    if ((status & ~3) !== 0) return this.fail();
    if ((status & backendUp) === 0) {
      this.#dropFrontend();
      this.vhostStatus = 0;
      return;
    }
    // FRONTEND_UP is not the driver's to write.
    this.vhostStatus = backendUp |
      (this.#channel === undefined ? 0 : frontendUp);
    const waiting = this.#waiting;
    if (this.#channel !== undefined || waiting === undefined) return;
    this.#waiting = undefined;
    this.#frontendUp(waiting);
  }

  /** Ends the front-end's socket; nobody is told. */
  #dropFrontend(): void {
    const channel = this.#channel;
    this.#channel = undefined;
    channel?.close();
    this.#requests?.close();
    this.#requests = undefined;
    for (const queue of [...this.#kicks.keys()]) this.#closeKick(queue);
    for (const queue of [...this.#calls.keys()]) this.#closeCall(queue);
    this.#wake?.();
  }

  /** The front-end has gone: as QEMU's, or crosvm's, device says it. */
  async #frontendDown(channel: Channel): Promise<void> {
    if (this.#channel !== channel) return;
    this.#dropFrontend();
    this.vhostStatus = 0;
    if (this.kind === "qemu") return this.notifyConfig();
    (await this.#buffer())?.complete(0);
  }

  /** A buffer of the driver's; null when the device was reset. */
  async #buffer(): Promise<Request | null> {
    while (this.#buffers.length === 0) {
      if (this.isClosed || this.status === 0) return null;
      await new Promise<void>((resolve) => this.#wake = resolve);
      this.#wake = undefined;
    }
    return this.#buffers.shift()!;
  }

  async #relay(channel: Channel): Promise<void> {
    for (;;) {
      let message: Message | null = null;
      try {
        message = await channel.receive();
      } catch {
        // Broken framing: the device ends the connection.
      }
      if (message === null || !this.#isRelayed(message)) {
        message?.descriptors.close();
        return await this.#frontendDown(channel);
      }
      this.#take(message);
      message.descriptors.close();
      const bytes = this.#bytesOf(message);
      while (this.#buffers.length === 0 && this.#channel === channel) {
        await new Promise<void>((resolve) => this.#wake = resolve);
        this.#wake = undefined;
      }
      if (this.#channel !== channel) return;
      this.relayed.push(message.request);
      this.deliver(bytes);
    }
  }

  /** Puts bytes into the driver's next buffer, whatever they are. */
  deliver(bytes: Uint8Array, written = bytes.length): void {
    const buffer = this.#buffers.shift();
    assert.ok(buffer !== undefined, "the driver has posted no buffer");
    if (bytes.length > buffer.writableBytes) return this.fail();
    buffer.write(bytes);
    buffer.complete(written);
  }

  #isRelayed({ request, flags }: Message): boolean {
    if (this.kind === "crosvm") return true;
    return relayedByQemu.includes(request) && (flags & FLAG_REPLY) === 0;
  }

  #bytesOf({ request, flags, payload }: Message): Uint8Array {
    const bytes = new Uint8Array(12 + payload.length);
    const view = new DataView(bytes.buffer);
    view.setUint32(0, request, true);
    view.setUint32(4, flags, true);
    view.setUint32(8, payload.length, true);
    bytes.set(payload, 12);
    if (this.kind === "qemu" && request === Id.SET_PROTOCOL_FEATURES) {
      const acked = view.getBigUint64(12, true);
      view.setBigUint64(12, acked & qemuProtocolFeatures, true);
    }
    return bytes;
  }

  /** What the device does with a message before the driver sees it. */
  #take(message: Message): void {
    const { request, payload, descriptors } = message;
    const index = payload.length > 0 ? payload[0] : 0;
    switch (request) {
      case Id.SET_MEM_TABLE:
        return this.#mapTable(message);
      case Id.SET_VRING_KICK: {
        this.#closeKick(index);
        const fd = descriptors.take();
        if (fd === undefined) return;
        const watch = eventLoop.watch(fd, () => this.#kicked(index));
        this.#kicks.set(index, { fd, watch });
        return;
      }
      case Id.SET_VRING_CALL: {
        this.#closeCall(index);
        const fd = descriptors.take();
        if (fd !== undefined) this.#calls.set(index, fd);
        return;
      }
      case Id.GET_VRING_BASE:
        // Before the driver has stopped: late calls are lost.
        this.#closeKick(index);
        this.#closeCall(index);
        return;
      case Id.SET_BACKEND_REQ_FD: {
        const fd = descriptors.take();
        if (fd === undefined) return;
        this.#requests?.close();
        this.#requests = new Channel(fd, "back-end channel of the model");
        void this.#relayReplies(this.#requests);
      }
    }
  }

  /** The front-end's replies to the driver's own requests. */
  async #relayReplies(channel: Channel): Promise<void> {
    for (;;) {
      const message = await channel.receive();
      if (message === null) return;
      message.descriptors.close();
      const bytes = this.#bytesOf(message);
      await this.#buffer().then((buffer) => {
        if (buffer === null) return;
        buffer.write(bytes);
        buffer.complete(bytes.length);
      });
    }
  }

  #mapTable({ payload, descriptors }: Message): void {
    const table = memoryTable.decode(payload, plainWire);
    const { address, size } = this.#memory;
    if (this.#mappedSpan > 0) {
      const start = address + BigInt(this.#barOffset);
      check(core.mapOver(start, this.#mappedSpan, -1, 0), "Cannot unmap");
    }
    let at = this.#barOffset;
    for (const region of table.ok ? table.value : []) {
      const fd = descriptors.take();
      if (fd === undefined) return;
      // QEMU shows the file from its start; crosvm only the region.
      const from = this.kind === "qemu" ? 0 : Number(region.mmapOffset);
      const span = this.kind === "qemu"
        ? Number(region.mmapOffset + region.size)
        : Number(region.size);
      if (span % 4096 === 0 && at + span <= size) {
        core.mapOver(address + BigInt(at), span, fd, from);
        at += span;
      }
      core.descriptorClose(fd);
    }
    this.#mappedSpan = at - this.#barOffset;
  }

  #kicked(queue: number): void {
    const vector = this.#vectors.get(queue);
    if (vector !== undefined) this.interrupt(vector);
  }

  #closeKick(queue: number): void {
    const kick = this.#kicks.get(queue);
    if (kick === undefined) return;
    this.#kicks.delete(queue);
    kick.watch.close();
    core.descriptorClose(kick.fd);
  }

  #closeCall(queue: number): void {
    const fd = this.#calls.get(queue);
    if (fd === undefined) return;
    this.#calls.delete(queue);
    core.descriptorClose(fd);
  }

  #fromDriver(request: Request): void {
    const bytes = request.read();
    request.complete(0);
    const view = new DataView(bytes.buffer);
    const header = {
      request: view.getUint32(0, true),
      flags: view.getUint32(4, true),
    };
    assert.equal(view.getUint32(8, true), bytes.length - 12);
    const payload = bytes.subarray(12);
    if ((header.flags & FLAG_REPLY) !== 0) {
      if (
        this.kind === "qemu" && header.request === Id.GET_PROTOCOL_FEATURES
      ) {
        const offered = view.getBigUint64(12, true);
        view.setBigUint64(12, offered & qemuProtocolFeatures, true);
      }
      this.#channel?.send({ ...header, payload });
      return;
    }
    // QEMU takes nothing but replies there.
    if (this.kind === "qemu") return this.fail();
    this.#requests?.send({ ...header, payload });
  }

  /** Doorbells, and the vectors of notifications. */
  #vhostRegisters(): ModelBar {
    return {
      size: memoryOffset,
      read: (offset, width) => {
        assert.equal(width, 2);
        if (offset === notificationOffset) return this.#selected;
        return offset === notificationOffset + 2
          ? this.#vectors.get(this.#selected) ?? noVector
          : 0;
      },
      write: (offset, width, value) => {
        assert.equal(width, 2);
        if (offset === notificationOffset) {
          if (value < this.vhostQueues) this.#selected = value;
        } else if (offset === notificationOffset + 2) {
          if (!this.refusesVectors) this.#vectors.set(this.#selected, value);
        } else this.#doorbell(offset / doorbellMultiplier, value);
      },
    };
  }

  #doorbell(index: number, value: number): void {
    assert.ok(index < 2 * this.vhostQueues + 1, `doorbell ${index}`);
    this.rung.set(index, value);
    const fd = this.#calls.get(index);
    if (fd === undefined) this.lateCalls++;
    else core.eventfdSignal(fd);
  }
}
