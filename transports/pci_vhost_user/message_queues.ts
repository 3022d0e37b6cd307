/**
 * vhost-user messages over the device's two virtqueues: queue 0 brings them,
 * queue 1 takes them. A buffer is exactly one message: the 12-byte header and
 * the payload.
 *
 * @module
 */

import type { QueueDriver } from "../../driver/queue_driver.ts";
import type { VirtioPciDevice } from "../../pci/virtio_pci_device.ts";
import {
  decodeHeader,
  encodeHeader,
  HEADER_SIZE,
  MAX_PAYLOAD_SIZE,
} from "../../protocol/message.ts";
import type { OutgoingMessage } from "../transport.ts";

/** Bytes of a buffer: no message is larger. */
const bufferSize = HEADER_SIZE + MAX_PAYLOAD_SIZE;
/** Buffers that wait for messages. */
const bufferCount = 16;
/** Descriptors wanted of each queue. */
const queueSize = 64;
/** Bytes of DMA memory: the buffers, the rings, messages on their way. */
export const queueMemorySize = 512 << 10;

/** A message as it came; the payload is a copy. */
export interface RawMessage {
  readonly request: number;
  readonly flags: number;
  readonly payload: Uint8Array<ArrayBuffer>;
}

/** What becomes of what comes. */
export interface MessageReceiver {
  message(message: RawMessage): void;
  /** A buffer without a message: how crosvm says that the front-end has gone. */
  empty(): void;
  /** The device broke the rules of its queues. */
  broken(reason: string): void;
  /** A message has left. */
  sent(): void;
}

export class MessageQueues {
  readonly #receiving: QueueDriver;
  readonly #sending: QueueDriver;
  readonly #receiver: MessageReceiver;
  #outstanding = 0;
  #isPaused = false;
  /** Buffers to be given back when the pause ends. */
  readonly #held: bigint[] = [];
  #isOpen = true;

  constructor(device: VirtioPciDevice, receiver: MessageReceiver) {
    this.#receiver = receiver;
    this.#receiving = device.addQueue(0, queueSize);
    this.#sending = device.addQueue(1, queueSize);
  }

  /** Posts the buffers: after DRIVER_OK, and before the front-end may come. */
  start(): void {
    const count = Math.min(bufferCount, this.#receiving.queueSize);
    for (let i = 0; i < count; i++) {
      this.#post(this.#receiving.ram.allocate(bufferSize));
    }
  }

  /** Messages that the device has not taken. */
  get outstanding(): number {
    return this.#outstanding;
  }

  /** Looks for messages now, not waiting for an interrupt. */
  poll(): void {
    if (this.#isOpen) this.#receiving.poll();
  }

  /** While paused no buffer is given back: the device cannot send more. */
  setPaused(isPaused: boolean): void {
    this.#isPaused = isPaused;
    if (isPaused) return;
    for (const address of this.#held.splice(0)) this.#post(address);
  }

  /** Sends a message; an error of the device's is told by `broken`. */
  send(message: OutgoingMessage): void {
    if (!this.#isOpen) return;
    const header = encodeHeader({
      request: message.request,
      flags: message.flags,
      size: message.payload.length,
    });
    this.#outstanding++;
    this.#sending.submit({ readable: [concat(header, message.payload)] })
      .then(() => {
        this.#outstanding--;
        if (this.#isOpen) this.#receiver.sent();
      }, (error: Error) => this.#failed(error));
  }

  /** No message comes or goes any more; the queues are the device's. */
  close(): void {
    this.#isOpen = false;
  }

  #post(address: bigint): void {
    if (!this.#isOpen) return;
    const buffer = { address, length: bufferSize, isWritable: true };
    this.#receiving.submitChain([buffer]).then(
      (written) => this.#received(address, written),
      (error: Error) => this.#failed(error),
    );
  }

  #failed(error: Error): void {
    if (this.#isOpen) this.#receiver.broken(error.message);
  }

  #received(address: bigint, written: number): void {
    if (!this.#isOpen) return;
    // Whole, and before the device gets the buffer back.
    const bytes = this.#receiving.ram.read(address, written);
    if (this.#isPaused) this.#held.push(address);
    else this.#post(address);
    if (written === 0) return this.#receiver.empty();
    const header = decodeHeader(bytes);
    if (header === null || header.size !== written - HEADER_SIZE) {
      return this.#receiver.broken(
        `a message of ${written} bytes says that its payload has ${
          header?.size ?? "no"
        }`,
      );
    }
    this.#receiver.message({
      request: header.request,
      flags: header.flags,
      payload: bytes.slice(HEADER_SIZE),
    });
  }
}

function concat(first: Uint8Array, second: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(first.length + second.length);
  bytes.set(first);
  bytes.set(second, first.length);
  return bytes;
}
