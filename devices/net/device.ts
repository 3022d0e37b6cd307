/**
 * One front-end's network device: the ops that the session calls, and the link
 * that its end uses.
 *
 * @module
 */

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
import { ReceiveQueue, TransmitQueue } from "./queues.ts";
import { rarpFrame } from "./rarp.ts";
import { droppedCounter, type NetStatistics } from "./statistics.ts";

/** What all front-ends of a device share. */
export interface Nic {
  readonly properties: NetProperties;
  readonly end: NetEnd;
  readonly statistics: NetStatistics;
  readonly pollMicroseconds: number | undefined;
  report(error: Vhost2Error, device: Device): void;
}

/** The least that IPv4 asks of a link (RFC 791). */
const leastMtu = 68;

/** A network device as one front-end sees it. */
export class NetDevice implements TargetOps, NetLink {
  readonly name: string;
  readonly pairCount: number;
  readonly #nic: Nic;
  readonly #device: Device;
  readonly #ended: () => void;
  readonly #port: EndPort;
  readonly #receive: (ReceiveQueue | undefined)[] = [];
  readonly #transmit: (TransmitQueue | undefined)[] = [];
  #control: ControlQueue | undefined;
  #features = 0n;
  #guestOffloads = 0;
  #isLinkUp = true;
  #isAnnounceWanted = false;
  /** Pairs that the driver uses, where it says so by the control queue. */
  #pairsInUse: number;
  #mtu: number;

  /** `ended` is called when the front-end has gone. */
  constructor(device: Device, nic: Nic, ended: () => void) {
    this.name = device.name;
    this.pairCount = nic.properties.pairCount;
    this.#pairsInUse = this.pairCount;
    this.#mtu = nic.properties.mtu;
    this.#nic = nic;
    this.#device = device;
    this.#ended = ended;
    this.#port = nic.end.open(this);
  }

  // What the session calls.

  deviceFeaturesChanged(_device: Device, features: bigint): void {
    this.#features = features;
    this.#guestOffloads = negotiatedOffloads(features).toGuest;
    this.#port.negotiated?.();
  }

  queueStart(queue: Queue): void {
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
    const flags = ringFlags(queue.features);
    const { statistics, pollMicroseconds } = this.#nic;
    const port = this.#port;
    if (queue.index % 2 === 0) {
      this.#receive[pair] = new ReceiveQueue(queue, {
        flags: flags.receive,
        counts: statistics.toGuest[pair],
        ready: () => port.ready?.(pair),
      });
      port.ready?.(pair);
      return;
    }
    this.#transmit[pair] = new TransmitQueue(queue, {
      headerBytes: flags.headerBytes,
      flags: flags.transmit,
      counts: statistics.fromGuest[pair],
      pollMicroseconds,
      client: {
        receive: port.receive === undefined
          ? null
          : (frames) => port.receive!(frames, pair),
        isCongested: () => port.isCongested?.() ?? false,
        wake: () => port.wake?.(pair),
      },
    });
    if (port.receive === undefined) port.wake?.(pair);
  }

  async queueStop(queue: Queue): Promise<void> {
    if (this.#control !== undefined && queue.index === this.#controlIndex) {
      await this.#control.stop();
      this.#control = undefined;
      this.#pairsInUse = this.pairCount;
      return;
    }
    const list = queue.index % 2 === 0 ? this.#receive : this.#transmit;
    list[queue.index >> 1]?.stop();
    list[queue.index >> 1] = undefined;
  }

  queueKick(queue: Queue): void {
    if (this.#control !== undefined && queue.index === this.#controlIndex) {
      return this.#control.kick();
    }
    const list = queue.index % 2 === 0 ? this.#receive : this.#transmit;
    list[queue.index >> 1]?.kick();
  }

  deviceDestroy(): void {
    this.#port.close();
    this.#ended();
  }

  getConfig(): Uint8Array {
    const properties = { ...this.#nic.properties, mtu: this.#mtu };
    return encodeConfig(
      properties,
      (this.#isLinkUp ? statusLinkUp : 0) |
        (this.#isAnnounceWanted ? statusAnnounce : 0),
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
    if (isUp === this.#isLinkUp) return;
    this.#isLinkUp = isUp;
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
    this.#isAnnounceWanted = true;
    this.#device.configChanged();
  }

  /** The control queue is behind all pairs (5.1.2); -1 where there is none. */
  get #controlIndex(): number {
    if (!hasFeature(this.#features, NetFeature.CTRL_VQ)) return -1;
    return hasFeature(this.#features, NetFeature.MQ) ? 2 * this.pairCount : 2;
  }

  /** The queue that frames of `pair` go to: another, if that is not in use. */
  #receiver(pair: number): ReceiveQueue | undefined {
    const found = this.#receive[pair % this.#pairsInUse];
    if (found !== undefined && found.isUsable) return found;
    return this.#receive.find((queue) => queue?.isUsable);
  }

  #announced(): boolean {
    const isAsked = this.#isAnnounceWanted;
    this.#isAnnounceWanted = false;
    return isAsked;
  }

  #usePairs(count: number): boolean {
    if (
      count < 1 || count > this.pairCount ||
      !hasFeature(this.#features, NetFeature.MQ)
    ) return false;
    this.#pairsInUse = count;
    return true;
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
    const port = this.#port;
    if (port.receive === undefined) return;
    const frames = new Frames(1);
    frames.add(rarpFrame(bytes.subarray(0, 6)));
    port.receive(frames, 0);
  }
}
