/**
 * What a transport is to the session: messages, memory, notifications and
 * lifecycle, behind one small interface. Nothing here needs a file descriptor:
 * a PCI transport has registers, doorbells and a shared-memory BAR instead.
 *
 * @module
 */

import { core } from "../ffi/core.ts";
import type { Vhost2Error } from "../ffi/errors.ts";
import type { GuestMemory, RegionDescription } from "../ffi/guest_memory.ts";
import type { StartedQueue } from "../virtqueue/started_queue.ts";

/** The descriptors that came with a message; whoever takes one closes it. */
export class Descriptors {
  readonly #fds: number[];

  constructor(fds: number[] = []) {
    this.#fds = fds;
  }

  /** How many are left. */
  get count(): number {
    return this.#fds.length;
  }

  /** The numbers, still owned here. */
  peek(): readonly number[] {
    return this.#fds;
  }

  /** Hands the first one over to the caller. */
  take(): number | undefined {
    return this.#fds.shift();
  }

  /** Closes all that nobody took. */
  close(): void {
    for (const fd of this.#fds.splice(0)) core.descriptorClose(fd);
  }
}

/** One vhost-user message as it arrived. */
export interface Message {
  readonly request: number;
  readonly flags: number;
  readonly payload: Uint8Array<ArrayBuffer>;
  readonly descriptors: Descriptors;
}

/** A message to be sent; descriptors stay the sender's. */
export interface OutgoingMessage {
  readonly request: number;
  readonly flags: number;
  readonly payload: Uint8Array;
  readonly fds?: readonly number[];
}

/** An open notification from the driver (kick). */
export interface KickSource {
  /** The eventfd, where the transport has one (a Worker waits on it). */
  readonly fd: number | null;
  close(): void;
}

/** An open notification to the driver (call) or to the front-end (error). */
export interface NotificationSink {
  /** The eventfd, where the transport has one (a Worker signals it). */
  readonly fd: number | null;
  /** Never blocks. */
  signal(): void;
  close(): void;
}

/** The front-end's reply to a request of ours. */
export interface BackendReply {
  readonly value: bigint;
  /** The caller's. */
  readonly descriptors: Descriptors;
}

/** The channel for our own requests to the front-end (BACKEND_REQ). */
export interface BackendChannel {
  /**
   * Sends one request; with `needReply` the front-end's u64 is awaited.
   * Rejects when the channel has closed.
   */
  request(
    request: number,
    payload: Uint8Array,
    options?: { fds?: readonly number[]; needReply?: boolean },
  ): Promise<bigint | undefined>;
  /** As `request` with `needReply`, for a reply that may carry descriptors. */
  exchange(
    request: number,
    payload: Uint8Array,
    options?: { fds?: readonly number[] },
  ): Promise<BackendReply>;
  close(): void;
}

/** A started queue as a data path has it; the session's `Queue` is one. */
export interface DataPathQueue extends StartedQueue {
  readonly availableRing: Uint8Array;
  readonly usedRing: Uint8Array;
  /** How driver and device notify each other. */
  readonly wires: {
    /** The call's eventfd; "session": by `call()`; null: the driver polls. */
    readonly call: () => number | "session" | null;
  };
  /** Called when the call has changed. */
  onChanged: (() => void) | undefined;
  /** As `Queue.setHostNotifier`. */
  setHostNotifier(
    area: { fd: number; offset: number; size: number } | null,
  ): Promise<void>;
}

/** What a data path is told of its session. */
export interface DataPathHost {
  /** For messages to people. */
  readonly name: string;
  readonly memory: GuestMemory;
  report(error: Vhost2Error): void;
  /** Tells the front-end that configuration space has changed. */
  configChanged(): void;
  /** Ends the session: the device has gone. */
  close(): void;
}

/**
 * Where the device of a session is a real one: it is given the guest's memory
 * and queues, and the user's ops look on. All but `kick`, `readConfig`,
 * `writeConfig` and `detach` are called as ops are, one at a time.
 */
export interface DataPath {
  /** Virtio features that the device offers, unless the user says which. */
  readonly features: bigint;
  /** The same of protocol features to declare. */
  readonly protocolFeatures: bigint;
  /** Queues that the device has. */
  readonly queueCount: number;
  /** Bytes of its configuration space; 0 where it has none. */
  readonly configSize: number;
  /** Before anything else. */
  attach(host: DataPathHost): void;
  featuresChanged(features: bigint): Promise<void>;
  startQueue(queue: DataPathQueue): Promise<void>;
  /** The device does nothing with the queue when it resolves. */
  stopQueue(queue: DataPathQueue): Promise<void>;
  kick(queue: DataPathQueue): void;
  /** All of configuration space. */
  readConfig(): Uint8Array;
  writeConfig(offset: number, data: Uint8Array): void;
  /** All queues are stopped, and none starts again. */
  end(): Promise<void>;
  /** The device reaches nothing of the session's any more, at once. */
  detach(): void;
}

/** One established channel to one front-end. */
export interface Connection {
  /** For people, such as `vhost-user:/tmp/disk.sock`. */
  readonly name: string;
  /** Protocol features that this transport can carry. */
  readonly protocolFeatures: bigint;
  /** The same of virtio features, for those that need messages of their own. */
  readonly features: bigint;
  /**
   * Whether messages bring descriptors. Where they do not, the transport has
   * something of its own in the place of each.
   */
  readonly carriesDescriptors: boolean;
  /**
   * A descriptor that hangs up when the front-end goes, for a native wait;
   * null where there is none. It stays the connection's.
   */
  readonly hangupFd: number | null;
  /**
   * The next message; null when the front-end has gone. One call at a time.
   * Rejects with PROTOCOL when the framing is broken.
   */
  receive(): Promise<Message | null>;
  /** Queues a message; never blocks, never throws for a peer that has gone. */
  send(message: OutgoingMessage): void;
  /** Where region `index` of a memory message lives. */
  regionSource(
    message: Message,
    index: number,
  ): RegionDescription["source"];
  /**
   * Opens what SET_VRING_KICK gives; null when there is nothing that kicks,
   * and the ring is to be polled. Without `onKick` somebody else waits for its
   * descriptor.
   */
  openKick(
    queueIndex: number,
    descriptors: Descriptors,
    onKick: (() => void) | null,
  ): KickSource | null;
  /** Opens what SET_VRING_CALL gives. */
  openCall(
    queueIndex: number,
    descriptors: Descriptors,
  ): NotificationSink | null;
  /** Opens what SET_VRING_ERR gives. */
  openError(
    queueIndex: number,
    descriptors: Descriptors,
  ): NotificationSink | null;
  /** Opens what SET_BACKEND_REQ_FD gives. */
  openBackendChannel(descriptors: Descriptors): BackendChannel;
  /**
   * Called when the front-end has gone, also while nobody receives; there may
   * be messages of its left.
   */
  onHangup: (() => void) | undefined;
  /** Where the device is a real one, which processes the queues. */
  readonly dataPath?: DataPath;
  /** Ends the channel; a pending `receive` answers null. */
  close(): void;
}

/** What a transport tells the target that it serves. */
export interface TransportHost {
  /** Queues that the device has at most. */
  readonly queueCount: number;
  /** The kind of device, where it is told. */
  readonly deviceType: string | undefined;
  /**
   * A front-end has come; the host owns the connection. Fulfilled when its
   * session has ended (as `Transport.disconnected`, also while the transport
   * is being opened).
   */
  connected(connection: Connection): Promise<void>;
  /** Something failed that leaves the transport working (or retrying). */
  failed(error: Vhost2Error): void;
  /** There was a last connection, and no other will come. */
  ended(): void;
}

/** An open transport: listening, or keeping a connection. */
export interface Transport {
  /**
   * Where the front-end can be told to go, it is, while its session still
   * serves it; resolves when it has gone. `close` follows.
   */
  dismiss?(): Promise<void>;
  /**
   * Stops accepting and connecting; existing connections stay the host's. What
   * the connections need ends after the last of them: then a promise resolves.
   */
  close(): void | Promise<void>;
  /** A connection given to the host has ended: a connector may try again. */
  disconnected(connection: Connection): void;
}
