/**
 * The session's side of a VDUSE device: a front-end that is in this process
 * (`front_end.ts`) sends it messages and reads its replies. Kicks are eventfds
 * of ours that the kernel signals, calls are requests to it, and what is mapped
 * is told with each message.
 *
 * @module
 */

import { core } from "../../ffi/core.ts";
import { check, Vhost2Error } from "../../ffi/errors.ts";
import { eventLoop } from "../../ffi/event_loop.ts";
import type { RegionDescription } from "../../ffi/guest_memory.ts";
import { BackendRequest } from "../../protocol/backend_request.ts";
import { featureMask, ProtocolFeature } from "../../protocol/features.ts";
import {
  findFrontendRow,
  type FrontendRequestId,
  type PayloadOf,
  type ReplyOf,
} from "../../protocol/frontend_request.ts";
import { type Codec, plainWire } from "../../protocol/layout.ts";
import { FLAG_NEED_REPLY, VERSION } from "../../protocol/message.ts";
import { u64Payload } from "../../protocol/payloads.ts";
import { payloadCodecs } from "../../protocol/request_row.ts";
import {
  type BackendChannel,
  type Connection,
  Descriptors,
  type KickSource,
  type Message,
  type NotificationSink,
  type OutgoingMessage,
} from "../transport.ts";
import type { VduseDevice } from "./kernel.ts";

type RegionSource = RegionDescription["source"];

/** A message, and where the region that it names is. */
interface LocalMessage extends Message {
  readonly source?: RegionSource;
}

interface Pending {
  readonly request: number;
  resolve(payload: Uint8Array): void;
  reject(error: Vhost2Error): void;
}

/** Before an interrupt is tried again that came too early, doubling. */
const minInjectMs = 1;
const maxInjectMs = 100;

export class VduseConnection implements Connection {
  readonly name: string;
  readonly protocolFeatures: bigint = featureMask(
    ProtocolFeature.REPLY_ACK,
    ProtocolFeature.BACKEND_REQ,
    ProtocolFeature.CONFIG,
    ProtocolFeature.RESET_DEVICE,
    ProtocolFeature.CONFIGURE_MEM_SLOTS,
    ProtocolFeature.INFLIGHT_SHMFD,
  );
  readonly features: bigint = (1n << 64n) - 1n;
  readonly carriesDescriptors = false;
  readonly hangupFd = null;
  onHangup: (() => void) | undefined;
  /** The device's configuration has changed. */
  onConfigChange: (() => void) | undefined;
  /** The kernel's side; undefined until there is one. */
  device: VduseDevice | undefined;
  readonly #inbox: LocalMessage[] = [];
  readonly #pending: Pending[] = [];
  readonly #undo = new Set<() => void>();
  #waiter: ((message: Message | null) => void) | undefined;
  #hasEnded = false;

  constructor(name: string) {
    this.name = name;
  }

  /** False once the session has closed it, or `hangUp` was called. */
  get isOpen(): boolean {
    return !this.#hasEnded;
  }

  /**
   * Sends a message; its reply, or null for an ack. Rejects with PROTOCOL
   * when the session refuses it, with CLOSED when the session ends.
   */
  async ask<Id extends FrontendRequestId>(
    id: Id,
    payload: PayloadOf<Id>,
    { fds = [], source }: {
      /** The session's to close. */
      fds?: number[];
      source?: RegionSource;
    } = {},
  ): Promise<ReplyOf<Id>> {
    const row = findFrontendRow(id)!;
    const codec = payloadCodecs[row.payload] as Codec<unknown>;
    const descriptors = new Descriptors(fds);
    const bytes = await new Promise<Uint8Array>((resolve, reject) => {
      if (this.#hasEnded) {
        descriptors.close();
        throw this.ended();
      }
      this.#pending.push({ request: id, resolve, reject });
      this.#inbox.push({
        request: id,
        flags: VERSION | FLAG_NEED_REPLY,
        payload: codec.encode(payload, plainWire).slice(),
        descriptors,
        source,
      });
      this.#deliver();
    });
    const { reply } = row;
    const isAck = reply.kind !== "reply";
    const answer = isAck ? u64Payload : payloadCodecs[reply.payload];
    const decoded = (answer as Codec<unknown>).decode(bytes, plainWire);
    if (!decoded.ok || isAck && decoded.value !== 0n) {
      throw new Vhost2Error(
        "PROTOCOL",
        `Cannot go on with ${this.name}: the device refuses ${row.name}`,
      );
    }
    return (isAck ? null : decoded.value) as ReplyOf<Id>;
  }

  /** Why nothing can be done for its session. */
  ended(): Vhost2Error {
    return new Vhost2Error(
      "CLOSED",
      `Cannot send to the session of ${this.name}: it has ended`,
    );
  }

  receive(): Promise<Message | null> {
    return new Promise((resolve) => {
      this.#waiter = resolve;
      this.#deliver();
    });
  }

  #deliver(): void {
    const waiter = this.#waiter;
    if (waiter === undefined) return;
    const message = this.#inbox.shift();
    if (message === undefined && !this.#hasEnded) return;
    this.#waiter = undefined;
    waiter(message ?? null);
  }

  send(message: OutgoingMessage): void {
    const first = this.#pending.shift();
    if (first?.request === message.request) first.resolve(message.payload);
  }

  regionSource(message: Message, index: number): RegionSource {
    const { source } = message as LocalMessage;
    return source ?? { fd: message.descriptors.peek()[index] ?? -1 };
  }

  openKick(
    queueIndex: number,
    _descriptors: Descriptors,
    onKick: (() => void) | null,
  ): KickSource {
    const fd = check(core.eventfdCreate(), "Cannot make the eventfd of a kick");
    try {
      const watch = onKick === null ? null : eventLoop.watch(fd, onKick);
      try {
        this.device?.setKick(queueIndex, fd);
      } catch (error) {
        watch?.close();
        throw error;
      }
      const close = () => {
        if (!this.#undo.delete(close)) return;
        watch?.close();
        this.#quietly(() => this.device?.setKick(queueIndex, -1));
        core.descriptorClose(fd);
      };
      this.#undo.add(close);
      return { fd, close };
    } catch (error) {
      core.descriptorClose(fd);
      throw error;
    }
  }

  /** A broken device is noticed by whoever reads its messages. */
  #quietly<T>(action: () => T): T | undefined {
    try {
      return action();
    } catch {
      return undefined;
    }
  }

  /**
   * The kernel takes an interrupt only once it has seen our answer to
   * DRIVER_OK, after which we already work: such a one is tried again.
   */
  openCall(queueIndex: number): NotificationSink {
    let timer: ReturnType<typeof setTimeout> | undefined;
    let isOpen = true;
    let delayMs = minInjectMs;
    const signal = () => {
      if (!isOpen || timer !== undefined) return;
      const isTaken = this.#quietly(() => this.device?.inject(queueIndex));
      if (isTaken !== false) {
        delayMs = minInjectMs;
        return;
      }
      timer = setTimeout(() => {
        timer = undefined;
        signal();
      }, delayMs);
      delayMs = Math.min(2 * delayMs, maxInjectMs);
    };
    const close = () => {
      isOpen = false;
      clearTimeout(timer);
      this.#undo.delete(close);
    };
    this.#undo.add(close);
    return { fd: null, signal, close };
  }

  /** The kernel has no way to be told of a broken ring. */
  openError(): null {
    return null;
  }

  openBackendChannel(): BackendChannel {
    const request = (id: number): Promise<bigint> => {
      const isKnown = id === BackendRequest.BACKEND_CONFIG_CHANGE_MSG;
      if (isKnown) this.onConfigChange?.();
      return Promise.resolve(isKnown ? 0n : 1n);
    };
    return {
      request,
      exchange: async (id) => ({
        value: await request(id),
        descriptors: new Descriptors(),
      }),
      close: () => {},
    };
  }

  /** The kernel's device has gone or broken: the session comes to its end. */
  hangUp(): void {
    if (this.#hasEnded) return;
    this.#end();
    this.onHangup?.();
  }

  close(): void {
    if (!this.#hasEnded) this.#end();
    for (const undo of [...this.#undo]) undo();
  }

  #end(): void {
    this.#hasEnded = true;
    for (const { descriptors } of this.#inbox.splice(0)) descriptors.close();
    for (const { reject } of this.#pending.splice(0)) reject(this.ended());
    this.#deliver();
  }
}
