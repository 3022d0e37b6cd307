/**
 * A small virtio-net driver over a vhost-user device (VIRTIO 1.3 section 5.1).
 *
 * @module
 */

import { Vhost2Error } from "../ffi/errors.ts";
import {
  featureMask,
  hasFeature,
  ProtocolFeature,
} from "../protocol/features.ts";
import { NetFeature } from "../protocol/net.ts";
import { VhostUserDevice } from "./device.ts";
import {
  type RingFormatOptions,
  supportedFeatures,
  supportedProtocolFeatures,
  type VhostUserDeviceOptions,
} from "./negotiation.ts";
import type { QueueDriver } from "../driver/queue_driver.ts";

export { NetFeature };

/** Bytes of struct virtio_net_hdr with num_buffers. */
export const NET_HEADER_SIZE = 12;
/** VIRTIO_NET_HDR_F_*. */
export const NetHeaderFlag = { NEEDS_CSUM: 1, DATA_VALID: 2 } as const;
/** VIRTIO_NET_HDR_GSO_*. */
export const NetGso = {
  NONE: 0,
  TCPV4: 1,
  UDP: 3,
  TCPV6: 4,
  UDP_L4: 5,
  ECN: 0x80,
} as const;

/** What this client does unless told otherwise: it completes its frames. */
const knownFeatures = featureMask(
  NetFeature.MAC,
  NetFeature.STATUS,
  NetFeature.MTU,
  NetFeature.MQ,
  NetFeature.MRG_RXBUF,
);
/** struct virtio_net_config up to mtu. */
const CONFIG_SIZE = 12;
/** An Ethernet header with a VLAN tag. */
const ETHERNET_SIZE = 18;
const MAX_FRAME_SIZE = 65550;

/** struct virtio_net_hdr. */
export interface NetHeaderFields {
  readonly flags: number;
  readonly gsoType: number;
  readonly hdrLen: number;
  readonly gsoSize: number;
  readonly csumStart: number;
  readonly csumOffset: number;
  readonly numBuffers: number;
}

/** struct virtio_net_config; a field counts if its feature is negotiated. */
export interface NetConfig {
  /** `52:54:00:12:34:56` (MAC). */
  readonly mac: string;
  readonly isLinkUp: boolean;
  /** The device asks the driver to announce itself (GUEST_ANNOUNCE). */
  readonly isAnnounceWanted: boolean;
  /** MQ. */
  readonly maxPairCount: number;
  /** Bytes (MTU). */
  readonly mtu: number;
}

/** A frame as it came. */
export interface ReceivedFrame {
  readonly header: NetHeaderFields;
  readonly bytes: Uint8Array<ArrayBuffer>;
  /** The queue pair by which it came. */
  readonly pair: number;
}

/** How a client is opened. */
export interface NetClientOptions
  extends VhostUserDeviceOptions, Partial<RingFormatOptions> {
  /** Queue pairs used; 1 unless given. */
  readonly pairCount?: number;
  /** Whether the control queue is used; no unless given. */
  readonly control?: boolean;
  /** Receive buffers kept in each queue; 32 unless given. */
  readonly bufferCount?: number;
  /**
   * Descriptors of a receive buffer, in bytes each. Unless given one: 2048
   * bytes with MRG_RXBUF, else enough for a frame.
   */
  readonly bufferShape?: readonly number[];
  /** Whether the descriptors go into indirect tables. */
  readonly indirect?: boolean;
}

/** How a frame is sent. */
export interface NetSendOptions {
  /** The queue pair; 0 unless given. */
  readonly pair?: number;
  /** Fields of the header; 0 unless given. */
  readonly header?: Partial<NetHeaderFields>;
  /** Where header and frame, taken together, are cut into descriptors. */
  readonly cuts?: readonly number[];
  /** Whether the descriptors go into an indirect table. */
  readonly indirect?: boolean;
}

/** Writes struct virtio_net_hdr. */
export function encodeNetHeader(
  header: Partial<NetHeaderFields> = {},
): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(NET_HEADER_SIZE);
  const view = new DataView(bytes.buffer);
  view.setUint8(0, header.flags ?? 0);
  view.setUint8(1, header.gsoType ?? 0);
  view.setUint16(2, header.hdrLen ?? 0, true);
  view.setUint16(4, header.gsoSize ?? 0, true);
  view.setUint16(6, header.csumStart ?? 0, true);
  view.setUint16(8, header.csumOffset ?? 0, true);
  view.setUint16(10, header.numBuffers ?? 0, true);
  return bytes;
}

/** Reads struct virtio_net_hdr. */
export function decodeNetHeader(bytes: Uint8Array): NetHeaderFields {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return {
    flags: view.getUint8(0),
    gsoType: view.getUint8(1),
    hdrLen: view.getUint16(2, true),
    gsoSize: view.getUint16(4, true),
    csumStart: view.getUint16(6, true),
    csumOffset: view.getUint16(8, true),
    numBuffers: view.getUint16(10, true),
  };
}

/** Reads struct virtio_net_config. */
export function decodeNetConfig(bytes: Uint8Array): NetConfig {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const status = view.getUint16(6, true);
  return {
    mac: Array.from(
      bytes.subarray(0, 6),
      (byte) => byte.toString(16).padStart(2, "0"),
    ).join(":"),
    isLinkUp: (status & 1) !== 0,
    isAnnounceWanted: (status & 2) !== 0,
    maxPairCount: view.getUint16(8, true),
    mtu: view.getUint16(10, true),
  };
}

/** A frame of which not all buffers have come. */
interface PartialFrame {
  readonly header: NetHeaderFields;
  readonly parts: Uint8Array<ArrayBuffer>[];
  left: number;
}

/**
 * A network card of a vhost-user device.
 *
 * @example
 * ```ts
 * import { echoEnd, netDevice, registerTarget } from "vhost2";
 * import { NetClient } from "vhost2/frontend";
 * const path = `${Deno.makeTempDirSync()}/net.sock`;
 * await using target = await registerTarget({
 *   transport: "vhost-user",
 *   address: path,
 *   ...netDevice({ end: echoEnd() }),
 * });
 * const card = await NetClient.open({ path });
 * await card.send(Uint8Array.from({ length: 60 }, (_, i) => i));
 * const { bytes } = await card.receive();
 * if (bytes[0] !== 6) throw new Error(`${target.name}: not sent back`);
 * await card.close();
 * ```
 */
export class NetClient {
  readonly device: VhostUserDevice<QueueDriver>;
  /** Queue pairs in use. */
  readonly pairCount: number;
  #config: NetConfig;
  readonly #options: NetClientOptions;
  readonly #shape: readonly number[];
  readonly #received: ReceivedFrame[] = [];
  readonly #waiting: {
    resolve(frame: ReceivedFrame): void;
    reject(error: unknown): void;
  }[] = [];
  readonly #partial: (PartialFrame | undefined)[] = [];
  /** Called with each frame, which `receive` then does not get. */
  onFrame: ((frame: ReceivedFrame) => void) | undefined;
  #failure: unknown;
  #isOpen = true;

  private constructor(
    device: VhostUserDevice<QueueDriver>,
    config: NetConfig,
    options: NetClientOptions,
  ) {
    this.device = device;
    this.#config = config;
    this.#options = options;
    this.pairCount = options.pairCount ?? 1;
    const isMergeable = hasFeature(device.features, NetFeature.MRG_RXBUF);
    const isLong = hasFeature(device.features, NetFeature.GUEST_TSO4) ||
      hasFeature(device.features, NetFeature.GUEST_TSO6) ||
      hasFeature(device.features, NetFeature.GUEST_UFO);
    this.#shape = options.bufferShape ?? [
      isMergeable ? 2048 : NET_HEADER_SIZE +
        (isLong ? MAX_FRAME_SIZE : Math.max(config.mtu, 1500) + ETHERNET_SIZE),
    ];
  }

  /** Opens the device and fills its receive queues. */
  static async open(options: NetClientOptions): Promise<NetClient> {
    const pairCount = options.pairCount ?? 1;
    const control = options.control ?? false;
    const device = await VhostUserDevice.open({
      packed: false,
      queueCount: 2 * pairCount + (control ? 1 : 0),
      protocolFeatures: supportedProtocolFeatures |
        featureMask(ProtocolFeature.RARP, ProtocolFeature.NET_MTU),
      ...options,
      features: options.features ??
        (supportedFeatures | knownFeatures |
          (control ? featureMask(NetFeature.CTRL_VQ) : 0n)),
    });
    try {
      const config = await device.getConfig(0, CONFIG_SIZE);
      const client = new NetClient(device, decodeNetConfig(config), options);
      client.#fill();
      return client;
    } catch (error) {
      await device.close();
      throw error;
    }
  }

  /** Configuration space as it was when last read. */
  get config(): NetConfig {
    return this.#config;
  }

  /** Frames that have come and that nobody has taken. */
  get pending(): number {
    return this.#received.length;
  }

  /** Reads configuration space again, after a change. */
  async refreshConfig(): Promise<NetConfig> {
    const bytes = await this.device.getConfig(0, CONFIG_SIZE);
    return this.#config = decodeNetConfig(bytes);
  }

  /** The queue by which frames of a pair come. */
  receiveQueue(pair = 0): QueueDriver {
    return this.device.queues[2 * pair];
  }

  /** The queue by which frames of a pair go. */
  transmitQueue(pair = 0): QueueDriver {
    return this.device.queues[2 * pair + 1];
  }

  /** Sends a frame; fulfilled when the device has it. */
  async send(frame: Uint8Array, options: NetSendOptions = {}): Promise<void> {
    const all = new Uint8Array(NET_HEADER_SIZE + frame.length);
    all.set(encodeNetHeader(options.header));
    all.set(frame, NET_HEADER_SIZE);
    const cuts = [...options.cuts ?? [NET_HEADER_SIZE], all.length];
    let start = 0;
    const readable: Uint8Array[] = [];
    for (const end of cuts) {
      if (end > start) readable.push(all.subarray(start, end));
      start = Math.max(start, end);
    }
    await this.transmitQueue(options.pair).submit({
      readable,
      indirect: options.indirect ?? this.#options.indirect,
    });
  }

  /** The next frame that comes. */
  receive(): Promise<ReceivedFrame> {
    const frame = this.#received.shift();
    if (frame !== undefined) return Promise.resolve(frame);
    if (this.#failure !== undefined) return Promise.reject(this.#failure);
    return new Promise((resolve, reject) =>
      this.#waiting.push({ resolve, reject })
    );
  }

  /**
   * A command of the control queue; needs `control`. Its answer: VIRTIO_NET_OK
   * (0), VIRTIO_NET_ERR (1), 255 where there is none.
   */
  async control(
    group: number,
    command: number,
    data: Uint8Array = new Uint8Array(0),
  ): Promise<number> {
    const index = 2 * this.pairCount;
    const answer = await this.device.queues[index].submit({
      readable: [
        Uint8Array.of(group, command),
        ...(data.length > 0 ? [data] : []),
      ],
      writable: [1],
      initial: 255,
    });
    return answer.data[0][0];
  }

  /** Stops the queues and closes the device. */
  async close(): Promise<void> {
    this.#isOpen = false;
    await this.device.close();
    this.#fail(
      new Vhost2Error("CLOSED", "Cannot receive a frame: the card is closed"),
    );
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  #fill(): void {
    const count = this.#options.bufferCount ?? 32;
    for (let pair = 0; pair < this.pairCount; pair++) {
      for (let i = 0; i < count; i++) this.#give(pair);
    }
  }

  /** Puts a buffer into a receive queue, again and again. */
  async #give(pair: number): Promise<void> {
    try {
      while (this.#isOpen) {
        const { written, data } = await this.receiveQueue(pair).submit({
          writable: this.#shape,
          indirect: this.#options.indirect,
        });
        this.#take(pair, joined(data).subarray(0, written));
      }
    } catch (error) {
      if (this.#isOpen) this.#fail(error);
    }
  }

  #take(pair: number, bytes: Uint8Array<ArrayBuffer>): void {
    let frame = this.#partial[pair];
    if (frame !== undefined) {
      frame.parts.push(bytes);
      frame.left--;
    } else {
      // Linux counts such a buffer as an error and goes on.
      if (bytes.length < NET_HEADER_SIZE) return;
      const header = decodeNetHeader(bytes);
      const isMergeable = hasFeature(
        this.device.features,
        NetFeature.MRG_RXBUF,
      );
      frame = {
        header,
        parts: [bytes.subarray(NET_HEADER_SIZE)],
        left: isMergeable ? header.numBuffers - 1 : 0,
      };
    }
    this.#partial[pair] = frame.left > 0 ? frame : undefined;
    if (frame.left > 0) return;
    this.#deliver({ header: frame.header, bytes: joined(frame.parts), pair });
  }

  #deliver(frame: ReceivedFrame): void {
    if (this.onFrame !== undefined) return this.onFrame(frame);
    const waiting = this.#waiting.shift();
    if (waiting !== undefined) waiting.resolve(frame);
    else this.#received.push(frame);
  }

  #fail(error: unknown): void {
    this.#failure ??= error;
    for (const { reject } of this.#waiting.splice(0)) reject(error);
  }
}

function joined(
  parts: readonly Uint8Array<ArrayBuffer>[],
): Uint8Array<ArrayBuffer> {
  if (parts.length === 1) return parts[0];
  const all = new Uint8Array(
    parts.reduce((sum, part) => sum + part.length, 0),
  );
  let offset = 0;
  for (const part of parts) {
    all.set(part, offset);
    offset += part.length;
  }
  return all;
}
