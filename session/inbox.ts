/**
 * The front-end's messages on their way to the session: in order, one at a
 * time, but IOTLB messages at once.
 *
 * An op may wait for a translation that only an IOTLB message brings. So while
 * one runs the socket is read ahead, where IOTLB messages can come at all: they
 * are taken as they arrive, and the others wait here, a bounded number of them.
 *
 * @module
 */

import type { Connection, Message } from "../transports/transport.ts";

/** As many messages wait at most; then no more are read. */
const maxWaiting = 32;
/** After so many messages taken at once the event loop gets its turn. */
const messagesPerTurn = 32;

export interface InboxOptions {
  readonly connection: Connection;
  /** Takes a message that does not wait its turn; false for any other. */
  takeNow(message: Message): boolean;
  /** Whether messages that do not wait can come. */
  readsAhead(): boolean;
}

export class Inbox {
  readonly #options: InboxOptions;
  readonly #messages: Message[] = [];
  #isReading = false;
  #hasEnded = false;
  #error: unknown;
  #isWoken = false;
  #isLooking = false;
  #isClosed = false;
  #waiter: (() => void) | undefined;
  /** Fulfilled when the end of the stream has been read. */
  readonly ended: Promise<void>;
  readonly #end: () => void;

  constructor(options: InboxOptions) {
    this.#options = options;
    let end = () => {};
    this.ended = new Promise((resolve) => end = resolve);
    this.#end = end;
  }

  /**
   * The next message; null when the front-end has gone, undefined after
   * `wake`. One call at a time. Rejects with PROTOCOL when the framing is
   * broken.
   */
  async next(): Promise<Message | null | undefined> {
    for (;;) {
      const message = this.#messages.shift();
      if (message !== undefined) return message;
      if (this.#error !== undefined) throw this.#error;
      if (this.#hasEnded) return null;
      if (this.#isWoken) {
        this.#isWoken = false;
        return undefined;
      }
      const arrived = new Promise<void>((resolve) => this.#waiter = resolve);
      this.readAhead();
      await arrived;
    }
  }

  /** Lets `next` answer without a message. */
  wake(): void {
    this.#isWoken = true;
    this.#notify();
  }

  /** Reads until something other than an IOTLB message has come. */
  lookAhead(): void {
    this.#isLooking = true;
    this.readAhead();
  }

  /** Reads what may be read now. */
  readAhead(): void {
    if (this.#isReading || !this.#isWanted) return;
    this.#isReading = true;
    this.#read();
  }

  /** Nobody takes what is left. */
  close(): void {
    this.#isClosed = true;
    for (const message of this.#messages.splice(0)) {
      message.descriptors.close();
    }
  }

  get #isWanted(): boolean {
    if (this.#hasEnded || this.#isClosed) return false;
    const count = this.#messages.length;
    return count === 0 && (this.#waiter !== undefined || this.#isLooking) ||
      count < maxWaiting && this.#options.readsAhead();
  }

  async #read(): Promise<void> {
    const { connection } = this.#options;
    try {
      for (let count = 1; this.#isWanted; count++) {
        const message = await connection.receive();
        if (message === null) {
          this.#stop();
          break;
        }
        if (this.#isClosed) message.descriptors.close();
        else if (!this.#takes(message)) {
          this.#isLooking = false;
          this.#messages.push(message);
          this.#notify();
        }
        if (count % messagesPerTurn === 0) {
          await new Promise((resolve) => setImmediate(resolve));
        }
      }
    } catch (error) {
      this.#error = error;
      this.#stop();
    } finally {
      this.#isReading = false;
    }
  }

  #takes(message: Message): boolean {
    if (!this.#options.takeNow(message)) return false;
    message.descriptors.close();
    return true;
  }

  #stop(): void {
    this.#hasEnded = true;
    this.#end();
    this.#notify();
  }

  #notify(): void {
    const waiter = this.#waiter;
    this.#waiter = undefined;
    waiter?.();
  }
}
