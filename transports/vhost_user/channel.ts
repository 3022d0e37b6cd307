/**
 * vhost-user messages over a Unix stream socket: framing, partial reads and
 * writes, descriptors.
 *
 * A header says how long the payload is, so each is read exactly; the
 * descriptors of a message come with its header's first byte. While an answer
 * of ours waits for room in the socket nothing more is read: a peer that does
 * not take its replies cannot make us hoard them.
 *
 * @module
 */

import { layouts } from "../../ffi/abi.gen.ts";
import { core } from "../../ffi/core.ts";
import { check, Errno, errnoName, Vhost2Error } from "../../ffi/errors.ts";
import { EventFlag, eventLoop, type Watch } from "../../ffi/event_loop.ts";
import {
  HEADER_SIZE,
  MAX_DESCRIPTORS,
  MAX_PAYLOAD_SIZE,
} from "../../protocol/message.ts";
import {
  Descriptors,
  type Message,
  type OutgoingMessage,
} from "../transport.ts";

const receiveInfo = new Uint32Array(layouts.ReceiveInfo.byteSize / 4);
const receivedFds = new Int32Array(MAX_DESCRIPTORS);

interface Waiter {
  resolve(message: Message | null): void;
  reject(error: Vhost2Error): void;
}

/** One socket with vhost-user messages on it. It owns the descriptor. */
export class Channel {
  readonly #name: string;
  readonly #fd: number;
  readonly #watch: Watch;
  readonly #header = new Uint8Array(HEADER_SIZE);
  readonly #headerView = new DataView(this.#header.buffer);
  #payload: Uint8Array<ArrayBuffer> | undefined;
  /** Bytes that have arrived of the header, or of the payload. */
  #received = 0;
  #fds: number[] = [];
  #waiter: Waiter | undefined;
  #outbox: { bytes: Uint8Array; sent: number; fds: Int32Array }[] = [];
  #isOpen = true;
  /** Called when the peer has gone, also while nobody receives. */
  onHangup: (() => void) | undefined;

  /**
   * @param fd a connected stream socket, from here on the channel's
   * @param name for messages to people
   */
  constructor(fd: number, name: string) {
    this.#fd = fd;
    this.#name = name;
    try {
      this.#watch = eventLoop.watch(fd, (events) => {
        this.#ready();
        if ((events & EventFlag.hangup) !== 0) this.onHangup?.();
      });
    } catch (error) {
      core.descriptorClose(fd);
      throw error;
    }
  }

  /** The socket; it stays the channel's. */
  get fd(): number {
    return this.#fd;
  }

  get isOpen(): boolean {
    return this.#isOpen;
  }

  /** The next message, or null at the end of the stream. */
  receive(): Promise<Message | null> {
    return new Promise((resolve, reject) => {
      if (this.#waiter !== undefined) {
        throw new Vhost2Error(
          "CLOSED",
          `Cannot read ${this.#name} twice at once`,
        );
      }
      this.#waiter = { resolve, reject };
      this.#ready();
    });
  }

  /** Queues and sends as much as the socket takes. */
  send(message: OutgoingMessage): void {
    if (!this.#isOpen) return;
    const bytes = new Uint8Array(HEADER_SIZE + message.payload.length);
    const view = new DataView(bytes.buffer);
    view.setUint32(0, message.request, true);
    view.setUint32(4, message.flags, true);
    view.setUint32(8, message.payload.length, true);
    bytes.set(message.payload, HEADER_SIZE);
    // Kept open by duplicates: the sender may close its own at once.
    const fds = Int32Array.from(
      message.fds ?? [],
      (fd) =>
        check(core.descriptorDuplicate(fd), `Cannot send descriptor ${fd}`),
    );
    this.#outbox.push({ bytes, sent: 0, fds });
    this.#flush();
  }

  /** Closes the socket; a pending `receive` answers null. */
  close(): void {
    if (!this.#isOpen) return;
    this.#isOpen = false;
    this.#watch.close();
    core.descriptorClose(this.#fd);
    for (const fd of this.#fds.splice(0)) core.descriptorClose(fd);
    for (const { fds } of this.#outbox.splice(0)) closeAll(fds);
    this.#settle((waiter) => waiter.resolve(null));
  }

  #settle(with_: (waiter: Waiter) => void): void {
    const waiter = this.#waiter;
    this.#waiter = undefined;
    if (waiter !== undefined) with_(waiter);
  }

  #ready(): void {
    if (!this.#isOpen) return this.#settle((waiter) => waiter.resolve(null));
    if (this.#outbox.length > 0) this.#flush();
    if (this.#waiter === undefined || this.#outbox.length > 0) return;
    try {
      const message = this.#read();
      if (message === undefined) return;
      this.#settle((waiter) => waiter.resolve(message));
    } catch (error) {
      this.#settle((waiter) => waiter.reject(error as Vhost2Error));
      this.close();
    }
  }

  /** A whole message, null at the end, undefined when more must arrive. */
  #read(): Message | null | undefined {
    for (;;) {
      const target = this.#payload ?? this.#header;
      if (this.#received < target.length) {
        const rest = target.subarray(this.#received);
        const count = core.socketReceive(
          this.#fd,
          rest,
          rest.length,
          receivedFds,
          MAX_DESCRIPTORS,
          receiveInfo,
        );
        if (count === -Errno.EAGAIN) return undefined;
        if (count < 0) {
          // A reset is a peer that has gone, as at the end of the stream.
          this.close();
          return null;
        }
        this.#collect();
        if (count === 0) {
          if (this.#received > 0 || this.#payload !== undefined) {
            throw this.#broken("the stream ends inside a message");
          }
          this.close();
          return null;
        }
        this.#received += count;
        if (this.#received < target.length) continue;
      }
      if (this.#payload === undefined) {
        const size = this.#headerView.getUint32(8, true);
        if (size > MAX_PAYLOAD_SIZE) {
          throw this.#broken(
            `payload of ${size} bytes (at most ${MAX_PAYLOAD_SIZE} are sent)`,
          );
        }
        this.#payload = new Uint8Array(size);
        this.#received = 0;
        continue;
      }
      const message = {
        request: this.#headerView.getUint32(0, true),
        flags: this.#headerView.getUint32(4, true),
        payload: this.#payload,
        descriptors: new Descriptors(this.#fds),
      };
      this.#payload = undefined;
      this.#received = 0;
      this.#fds = [];
      return message;
    }
  }

  #collect(): void {
    const count = receiveInfo[layouts.ReceiveInfo.descriptorCount / 4];
    for (let i = 0; i < count; i++) this.#fds.push(receivedFds[i]);
    if (receiveInfo[layouts.ReceiveInfo.truncated / 4] !== 0) {
      throw this.#broken(
        `more than ${MAX_DESCRIPTORS} descriptors, or some lost`,
      );
    }
    if (this.#fds.length > MAX_DESCRIPTORS) {
      throw this.#broken(`${this.#fds.length} descriptors in one message`);
    }
  }

  #broken(what: string): Vhost2Error {
    return new Vhost2Error(
      "PROTOCOL",
      `Cannot read from ${this.#name}: ${what}`,
    );
  }

  #flush(): void {
    while (this.#outbox.length > 0) {
      const item = this.#outbox[0];
      const rest = item.bytes.subarray(item.sent);
      const fdCount = item.sent === 0 ? item.fds.length : 0;
      const count = core.socketSend(
        this.#fd,
        rest,
        rest.length,
        fdCount > 0 ? item.fds : null,
        fdCount,
      );
      if (count === -Errno.EAGAIN) {
        this.#watch.setWritable(true);
        return;
      }
      if (count < 0) {
        // EPIPE and the like: the reader finds the end of the stream itself,
        // after what the peer sent before it went.
        for (const { fds } of this.#outbox.splice(0)) closeAll(fds);
        if (-count !== Errno.EPIPE) this.#lastError = errnoName(-count);
        return;
      }
      item.sent += count;
      if (item.sent < item.bytes.length) continue;
      closeAll(item.fds);
      this.#outbox.shift();
      if (this.#outbox.length === 0) this.#watch.setWritable(false);
    }
  }

  #lastError: string | undefined;

  /** Why sending failed, where that was no plain disconnect. */
  get sendError(): string | undefined {
    return this.#lastError;
  }
}

function closeAll(fds: Int32Array): void {
  for (const fd of fds) core.descriptorClose(fd);
}
