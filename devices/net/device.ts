/**
 * One front-end's network device: the ops that the session calls, and the link
 * that its end uses.
 *
 * @module
 */

import { core } from "../../ffi/core.ts";
import { Vhost2Error } from "../../ffi/errors.ts";
import { hasFeature } from "../../protocol/features.ts";
import type { Device } from "../../session/device.ts";
import type { Queue } from "../../session/queue.ts";
import type { CustomMessage, TargetOps } from "../../session/target_ops.ts";
import {
  encodeConfig,
  negotiatedOffloads,
  NetFeature,
  type NetProperties,
  ringFlags,
  statusAnnounce,
  statusLinkUp,
} from "./config.ts";
import { ControlQueue } from "./control.ts";
import type { EndPort, NetEnd, NetLink } from "./ends/end.ts";
import { Frames } from "./frames.ts";
import { ReceiveQueue } from "./queues/receive.ts";
import { TransmitQueue } from "./queues/transmit.ts";
import { rarpFrame } from "./rarp.ts";
import { droppedCounter, type NetStatistics } from "./statistics.ts";

/** What all front-ends of a device share, in one isolate. */
export interface Nic {
  readonly properties: NetProperties;
  /** Null where Workers make it, and only they. */
  readonly end: NetEnd | null;
  readonly statistics: NetStatistics;
  readonly pollMicroseconds: number | undefined;
  report(error: Vhost2Error, device: Device): void;
}

/** The least that IPv4 asks of a link (RFC 791). */
const leastMtu = 68;

/** Words (i32) of `Device.shared`. */
const Shared = {
  isLinkDown: 0,
  isAnnounceWanted: 1,
  /** Queue pairs that the driver has said it uses; 0: nothing. */
  pairsInUse: 2,
  /** Whether a Worker is to announce the address that follows. */
  isRarpWanted: 3,
  rarpAddress: 4,
  byteSize: 24,
} as const;
/** Bytes of `Device.shared`. */
export const sharedBytes: number = Shared.byteSize;

/** A network device as one front-end sees it. */
export class NetDevice implements TargetOps, NetLink {
  readonly name: string;
  readonly pairCount: number;
  readonly #nic: Nic;
  readonly #device: Device;
  readonly #ended: () => void;
  readonly #port: EndPort | null;
  readonly #receive: (ReceiveQueue | undefined)[] = [];
  readonly #transmit: (TransmitQueue | undefined)[] = [];
  #control: ControlQueue | undefined;
  #features = 0n;
  #guestOffloads = 0;
  #controlIndex = -1;
  /** In the memory of all instances. */
  readonly #shared: Int32Array;
  #mtu: number;

  /** `ended` is called when the front-end has gone. */
  constructor(device: Device, nic: Nic, ended: () => void) {
    this.name = device.name;
    this.pairCount = nic.properties.pairCount;
    this.#mtu = nic.properties.mtu;
    this.#nic = nic;
    this.#device = device;
    this.#ended = ended;
    // A factory that was wrapped in a function of a user's own has none.
    const { shared } = device;
    this.#shared = new Int32Array(
      shared.byteLength < sharedBytes
        ? new SharedArrayBuffer(sharedBytes)
        : shared,
    );
    this.#port = nic.end?.open(this) ?? null;
  }

  // What the session calls.

  deviceFeaturesChanged(_device: Device, features: bigint): void {
    this.#negotiate(features);
  }

  #negotiate(features: bigint): void {
    this.#features = features;
    this.#guestOffloads = negotiatedOffloads(features).toGuest;
    // The control queue is behind all pairs (5.1.2).
    this.#controlIndex = !hasFeature(features, NetFeature.CTRL_VQ)
      ? -1
      : hasFeature(features, NetFeature.MQ)
      ? 2 * this.pairCount
      : 2;
    this.#port?.negotiated?.();
  }

  queueStart(queue: Queue): void {
    // A Worker is not told of them.
    const { features } = this.#device;
    if (features !== this.#features) this.#negotiate(features);
    if (queue.index === this.#controlIndex) {
      this.#control = new ControlQueue(queue, {
        announced: () => this.#announced(),
        usePairs: (count) => this.#usePairs(count),
      });
      return;
    }
    const pair = queue.index >> 1;
    if (pair >= this.pairCount) {
      throw new Vhost2Error(
        "PROTOCOL",
        `Cannot start queue ${queue.index}: the device has ${this.pairCount} queue pairs`,
      );
    }
    if (queue.index % 2 === 0) this.#startReceive(queue, pair);
    else this.#startTransmit(queue, pair);
  }

  #startReceive(queue: Queue, pair: number): void {
    const { statistics, end } = this.#nic;
    this.#receive[pair] = new ReceiveQueue(queue, {
      flags: ringFlags(queue.features).receive,
      counts: statistics.toGuest[pair],
      client: {
        endsByEvents: end?.endsByEvents ?? false,
        ready: () => this.#port?.ready?.(pair),
        unready: () => this.#port?.unready?.(pair),
      },
    });
  }

  #startTransmit(queue: Queue, pair: number): void {
    const { statistics, end, pollMicroseconds } = this.#nic;
    const flags = ringFlags(queue.features);
    const port = this.#port;
    this.#transmit[pair] = new TransmitQueue(queue, {
      headerBytes: flags.headerBytes,
      flags: flags.transmit,
      counts: statistics.fromGuest[pair],
      pollMicroseconds,
      client: {
        endsByEvents: end?.endsByEvents ?? false,
        receive: port?.receive === undefined
          ? null
          : (frames) => port.receive!(frames, pair),
        isCongested: () => port?.isCongested?.() ?? false,
        wake: () => port?.wake?.(pair),
      },
    });
    if (port?.receive === undefined) port?.wake?.(pair);
  }

  async queueStop(queue: Queue): Promise<void> {
    if (this.#control !== undefined && queue.index === this.#controlIndex) {
      await this.#control.stop();
      this.#control = undefined;
      this.#setPairsInUse(0);
      return;
    }
    const list = queue.index % 2 === 0 ? this.#receive : this.#transmit;
    list[queue.index >> 1]?.stop();
    list[queue.index >> 1] = undefined;
  }

  queueKick(queue: Queue): void {
    if (this.#shared[Shared.isRarpWanted] !== 0) this.#takeRarp();
    if (this.#control !== undefined && queue.index === this.#controlIndex) {
      return this.#control.kick();
    }
    const list = queue.index % 2 === 0 ? this.#receive : this.#transmit;
    list[queue.index >> 1]?.kick();
  }

  /** In a Worker at the device's end, where no op says so, by its factory. */
  deviceDestroy(): void {
    this.#port?.close();
    this.#ended();
  }

  getConfig(): Uint8Array {
    const properties = { ...this.#nic.properties, mtu: this.#mtu };
    const shared = this.#shared;
    return encodeConfig(
      properties,
      (shared[Shared.isLinkDown] === 0 ? statusLinkUp : 0) |
        (shared[Shared.isAnnounceWanted] !== 0 ? statusAnnounce : 0),
    );
  }

  setConfig(): void {
    throw new Vhost2Error(
      "PROTOCOL",
      "Cannot write the configuration: a modern driver finds it read-only",
    );
  }

  customMessage(_device: Device, message: CustomMessage): void {
    switch (message.name) {
      case "NET_SET_MTU":
        return this.#setMtu(message.value);
      case "SEND_RARP":
        return this.#sendRarp(message.value);
      default:
        throw new Vhost2Error(
          "PROTOCOL",
          `Cannot handle message ${message.request}: it is not a network device's`,
        );
    }
  }

  // What the end calls.

  get pairsInUse(): number {
    return this.#shared[Shared.pairsInUse] || this.pairCount;
  }

  get guestOffloads(): number {
    return this.#guestOffloads;
  }

  send(
    frames: Frames,
    pair: number,
    first = 0,
    count: number = frames.count - first,
  ): number {
    return this.#receiver(pair)?.send(frames, first, count) ?? 0;
  }

  drop(pair: number, count: number): void {
    const { toGuest } = this.#nic.statistics;
    toGuest[pair % toGuest.length][droppedCounter] += count;
  }

  lose(pair: number, count: number): void {
    this.#nic.statistics.fromGuest[pair][droppedCounter] += count;
  }

  receive(frames: Frames, pair: number): number {
    const queue = this.#transmit[pair];
    frames.clear();
    // What breaks a rule is used up, and there may be more behind it.
    while (queue !== undefined && queue.take(frames) > 0) {
      if (frames.count > 0) break;
    }
    return frames.count;
  }

  wantWake(pair: number): boolean {
    return this.#transmit[pair]?.wantWake() ?? true;
  }

  resume(): void {
    for (const queue of this.#transmit) queue?.resume();
  }

  setLink(isUp: boolean): void {
    const isDown = isUp ? 0 : 1;
    if (Atomics.exchange(this.#shared, Shared.isLinkDown, isDown) === isDown) {
      return;
    }
    this.#device.configChanged();
  }

  report(error: Vhost2Error): void {
    this.#nic.report(error, this.#device);
  }

  // What the device's user calls.

  /** Asks the guest to announce itself, if it can do that. */
  announce(): void {
    const { GUEST_ANNOUNCE, CTRL_VQ } = NetFeature;
    if (
      !hasFeature(this.#features, GUEST_ANNOUNCE) ||
      !hasFeature(this.#features, CTRL_VQ)
    ) return;
    Atomics.store(this.#shared, Shared.isAnnounceWanted, 1);
    this.#device.configChanged();
  }

  /** The queue that frames of `pair` go to: another, if that is not in use. */
  #receiver(pair: number): ReceiveQueue | undefined {
    const inUse = this.pairsInUse;
    const found = this.#receive[pair % inUse];
    if (found !== undefined && found.isUsable) return found;
    return this.#receive.find((queue, i) => i < inUse && queue?.isUsable);
  }

  #announced(): boolean {
    return Atomics.exchange(this.#shared, Shared.isAnnounceWanted, 0) !== 0;
  }

  #usePairs(count: number): boolean {
    if (
      count < 1 || count > this.pairCount ||
      !hasFeature(this.#features, NetFeature.MQ)
    ) return false;
    this.#setPairsInUse(count);
    return true;
  }

  #setPairsInUse(count: number): void {
    const before = Atomics.exchange(this.#shared, Shared.pairsInUse, count);
    if (before !== count) this.#port?.usePairs?.();
  }

  #setMtu(value: bigint): void {
    const { mtu } = this.#nic.properties;
    const most = mtu === 0 ? 0xffff : mtu;
    if (value < leastMtu || value > most) {
      throw new Vhost2Error(
        "PROTOCOL",
        `Cannot use an MTU of ${value} bytes (${leastMtu} to ${most})`,
      );
    }
    this.#mtu = Number(value);
  }

  /** The guest's address comes in the first 6 bytes of the u64. */
  #sendRarp(value: bigint): void {
    const bytes = new Uint8Array(8);
    new DataView(bytes.buffer).setBigUint64(0, value, true);
    if (this.#port !== null) return this.#announceAddress(bytes);
    // The end is in Workers: one of them finds it with the next kick, which
    // any queue of theirs may have at any time.
    new Uint8Array(this.#shared.buffer).set(bytes, Shared.rarpAddress * 4);
    Atomics.store(this.#shared, Shared.isRarpWanted, 1);
    for (const { wires } of this.#device.queues) {
      if (wires.kickFd !== null) core.eventfdSignal(wires.kickFd);
    }
  }

  #takeRarp(): void {
    if (this.#port === null) return;
    const wanted = Atomics.exchange(this.#shared, Shared.isRarpWanted, 0);
    if (wanted === 0) return;
    const bytes = new Uint8Array(this.#shared.buffer, Shared.rarpAddress * 4);
    this.#announceAddress(bytes.slice(0, 8));
  }

  #announceAddress(bytes: Uint8Array): void {
    const port = this.#port;
    if (port?.receive === undefined) return;
    const frames = new Frames(1);
    frames.add(rarpFrame(bytes.subarray(0, 6)));
    port.receive(frames, 0);
  }
}
