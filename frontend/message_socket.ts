/**
 * A socket with vhost-user messages as a front-end uses it: any message,
 * well-formed or not, and replies to whoever waits for them.
 *
 * Replies come in the order of the requests, so each answer belongs to the
 * oldest call that waits; those to IOTLB messages pass the others, because a
 * back-end must answer them while something else waits for their effect. A reply is taken only with the flags that QEMU takes
 * (version 1 and REPLY, nothing else).
 *
 * @module
 */

import { core } from "../ffi/core.ts";
import { check, Errno, Vhost2Error } from "../ffi/errors.ts";
import { eventLoop } from "../ffi/event_loop.ts";
import { FrontendRequest } from "../protocol/frontend_request.ts";
import { plainWire } from "../protocol/layout.ts";
import {
  classifyReplyHeader,
  FLAG_NEED_REPLY,
  FLAG_REPLY,
  VERSION,
} from "../protocol/message.ts";
import { u64Payload } from "../protocol/payloads.ts";
import type { Message } from "../transports/transport.ts";
import { Channel } from "../transports/vhost_user/channel.ts";

const nothing = new Uint8Array(0);
/** Messages that nobody asked for are kept up to this many. */
const maxInbox = 1024;

/** How a message is sent. */
export interface SendOptions {
  /** Descriptors to go with it; they stay the caller's. */
  readonly fds?: readonly number[];
  /** Sets NEED_REPLY. */
  readonly needReply?: boolean;
  /** The whole flags word, for frames that no correct front-end sends. */
  readonly flags?: number;
}

interface Waiter {
  /** The id of the request; null takes any message. */
  readonly request: number | null;
  resolve(message: Message | null): void;
  reject(error: Vhost2Error): void;
}

/** One socket, owned. */
export class MessageSocket {
  /**
   * Settles when the connection has ended, by either side; with the error if
   * the back-end broke the protocol.
   */
  readonly closed: Promise<Vhost2Error | undefined>;
  readonly #name: string;
  readonly #channel: Channel;
  /** The same socket, for bytes that are no message. */
  readonly #rawFd: number;
  readonly #waiters: Waiter[] = [];
  readonly #inbox: Message[] = [];
  #resumed: Promise<void> | undefined;
  #resume: (() => void) | undefined;
  #isClosed = false;

  /**
   * @param fd a connected stream socket, from here on this object's
   * @param name for messages to people
   */
  constructor(fd: number, name: string) {
    this.#name = name;
    this.#rawFd = core.descriptorDuplicate(fd);
    if (this.#rawFd < 0) {
      core.descriptorClose(fd);
      check(this.#rawFd, `Cannot use descriptor ${fd}`);
    }
    eventLoop.ref();
    try {
      this.#channel = new Channel(fd, name);
    } catch (error) {
      core.descriptorClose(this.#rawFd);
      eventLoop.unref();
      throw error;
    }
    this.closed = this.#read();
  }

  /** False once either side has closed. */
  get isOpen(): boolean {
    return this.#channel.isOpen;
  }

  /** Closes the socket; what waits for a reply rejects. */
  close(): void {
    this.#isClosed = true;
    this.resume();
    this.#channel.close();
    for (const message of this.#inbox.splice(0)) message.descriptors.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  /** Sends one message; nothing happens when the back-end has gone. */
  send(
    request: number,
    payload: Uint8Array = nothing,
    options: SendOptions = {},
  ): void {
    const flags = options.flags ??
      VERSION | (options.needReply ? FLAG_NEED_REPLY : 0);
    this.#channel.send({ request, flags, payload, fds: options.fds });
  }

  /**
   * Sends one message and awaits the reply to it. The reply's descriptors are
   * the caller's. Rejects with CLOSED when the connection ends before.
   */
  request(
    request: number,
    payload: Uint8Array = nothing,
    options: SendOptions = {},
  ): Promise<Message> {
    if (!this.isOpen) return Promise.reject(this.goneError());
    const reply = this.#wait(request) as Promise<Message>;
    this.send(request, payload, options);
    return reply;
  }

  /** As `request` with NEED_REPLY; returns the ack's u64, whatever it is. */
  async acknowledged(
    request: number,
    payload: Uint8Array = nothing,
    options: SendOptions = {},
  ): Promise<bigint> {
    const reply = await this.request(request, payload, {
      ...options,
      needReply: true,
    });
    reply.descriptors.close();
    const decoded = u64Payload.decode(reply.payload, plainWire);
    if (decoded.ok) return decoded.value;
    throw this.brokenError(`ack of ${request}: ${decoded.reason}`);
  }

  /**
   * Sends bytes as they are, past all queues: half messages, garbage. Returns
   * how many the socket took; 0 when it is full or the back-end has gone.
   */
  sendRaw(bytes: Uint8Array, fds: readonly number[] = []): number {
    if (!this.isOpen) return 0;
    const count = core.socketSend(
      this.#rawFd,
      bytes,
      bytes.length,
      fds.length > 0 ? Int32Array.from(fds) : null,
      fds.length,
    );
    if (count === -Errno.EAGAIN || count === -Errno.EPIPE) return 0;
    return check(count, `Cannot send on ${this.#name}`);
  }

  /**
   * The next message that answers no request, in its turn among those that
   * wait; null when the connection has ended. Its descriptors are the
   * caller's.
   */
  receive(): Promise<Message | null> {
    const message = this.#inbox.shift();
    if (message !== undefined) return Promise.resolve(message);
    return this.isOpen ? this.#wait(null) : Promise.resolve(null);
  }

  /** Stops reading, so that the back-end's replies fill the socket. */
  pause(): void {
    this.#resumed ??= new Promise((resolve) => this.#resume = resolve);
  }

  /** Reads again. */
  resume(): void {
    this.#resumed = undefined;
    this.#resume?.();
  }

  #wait(request: number | null): Promise<Message | null> {
    return new Promise((resolve, reject) => {
      this.#waiters.push({ request, resolve, reject });
    });
  }

  /** For what cannot be done any more. */
  protected goneError(): Vhost2Error {
    return new Vhost2Error(
      "CLOSED",
      `Cannot await a reply on ${this.#name}: it has closed`,
    );
  }

  /** For what the back-end should not have sent. */
  protected brokenError(reason: string): Vhost2Error {
    return new Vhost2Error(
      "PROTOCOL",
      `Cannot use a message on ${this.#name}: ${reason}`,
    );
  }

  async #read(): Promise<Vhost2Error | undefined> {
    let error: Vhost2Error | undefined;
    try {
      for (;;) {
        await this.#resumed;
        const message = await this.#channel.receive();
        if (message === null) break;
        this.#deliver(message);
      }
    } catch (thrown) {
      error = thrown as Vhost2Error;
    }
    this.#channel.close();
    core.descriptorClose(this.#rawFd);
    for (const { request, resolve, reject } of this.#waiters.splice(0)) {
      if (request === null) resolve(null);
      else reject(error ?? this.goneError());
    }
    eventLoop.unref();
    return error;
  }

  #takeWaiter(request: number): Waiter | undefined {
    const isIotlb = (one: number | null) => one === FrontendRequest.IOTLB_MSG;
    const index = this.#waiters.findIndex((waiter) =>
      isIotlb(waiter.request) === isIotlb(request)
    );
    return this.#waiters.splice(Math.max(0, index), 1)[0];
  }

  #deliver(message: Message): void {
    // Read before, delivered after the close: nobody will take it.
    if (this.#isClosed) return message.descriptors.close();
    const waiter = this.#takeWaiter(message.request);
    if (waiter === undefined) {
      if (this.#inbox.length < maxInbox) {
        this.#inbox.push(message);
        return;
      }
      message.descriptors.close();
      throw this.brokenError(`more than ${maxInbox} that nobody asked for`);
    }
    const reason = waiter.request === null
      ? null
      : refusalOfReply(message, waiter.request);
    if (reason === null) return waiter.resolve(message);
    message.descriptors.close();
    const error = this.brokenError(reason);
    waiter.reject(error);
    throw error;
  }
}

/** Why a message is not the reply to `request`; null if it is. */
function refusalOfReply(message: Message, request: number): string | null {
  const { flags, payload } = message;
  const header = { request: message.request, flags, size: payload.length };
  const error = classifyReplyHeader(header, request);
  if (error !== null) return error.reason;
  return flags === (VERSION | FLAG_REPLY)
    ? null
    : `reply to ${request} has flags 0x${flags.toString(16)}, not 0x5`;
}
