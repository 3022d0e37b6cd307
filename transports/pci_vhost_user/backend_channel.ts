/**
 * Requests of ours to the front-end, on the device's sending queue; the
 * replies come among the front-end's own requests, told apart by their REPLY
 * flag, in the order of the requests.
 *
 * @module
 */

import { Vhost2Error } from "../../ffi/errors.ts";
import { FLAG_NEED_REPLY, VERSION } from "../../protocol/message.ts";
import {
  type BackendChannel,
  type BackendReply,
  Descriptors,
  type OutgoingMessage,
} from "../transport.ts";
import type { RawMessage } from "./message_queues.ts";

interface PendingReply {
  readonly request: number;
  resolve(reply: BackendReply): void;
  reject(error: Vhost2Error): void;
}

export class PciBackendChannel implements BackendChannel {
  readonly #name: string;
  readonly #send: (message: OutgoingMessage) => void;
  readonly #pending: PendingReply[] = [];
  #isOpen = true;

  constructor(name: string, send: (message: OutgoingMessage) => void) {
    this.#name = name;
    this.#send = send;
  }

  async request(
    request: number,
    payload: Uint8Array,
    { fds, needReply }: {
      fds?: readonly number[];
      needReply?: boolean;
    } = {},
  ): Promise<bigint | undefined> {
    if (needReply) {
      return (await this.exchange(request, payload, { fds })).value;
    }
    this.#write(request, payload, VERSION, fds);
    return undefined;
  }

  // deno-lint-ignore require-await -- what `#write` throws is to be a rejection
  async exchange(
    request: number,
    payload: Uint8Array,
    { fds }: { fds?: readonly number[] } = {},
  ): Promise<BackendReply> {
    this.#write(request, payload, VERSION | FLAG_NEED_REPLY, fds);
    return new Promise<BackendReply>((resolve, reject) => {
      this.#pending.push({ request, resolve, reject });
    });
  }

  #write(
    request: number,
    payload: Uint8Array,
    flags: number,
    fds: readonly number[] = [],
  ): void {
    if (!this.#isOpen) {
      throw new Vhost2Error(
        "CLOSED",
        `Cannot send on ${this.#name}: it is closed`,
      );
    }
    if (fds.length > 0) {
      throw new Vhost2Error(
        "PROTOCOL",
        `Cannot send on ${this.#name}: a PCI device carries no descriptors`,
      );
    }
    this.#send({ request, flags, payload });
  }

  /** A reply came. False when it is none that is awaited. */
  reply({ request, payload }: RawMessage): boolean {
    const expected = this.#pending.shift();
    if (expected === undefined) return false;
    if (request !== expected.request || payload.length !== 8) {
      expected.reject(
        new Vhost2Error(
          "PROTOCOL",
          `Cannot use message ${request} on ${this.#name}: no such reply is awaited`,
        ),
      );
      return false;
    }
    const value = new DataView(payload.buffer).getBigUint64(0, true);
    expected.resolve({ value, descriptors: new Descriptors() });
    return true;
  }

  close(): void {
    this.#isOpen = false;
    for (const { reject } of this.#pending.splice(0)) {
      reject(
        new Vhost2Error(
          "CLOSED",
          `Cannot await a reply on ${this.#name}: it closed`,
        ),
      );
    }
  }
}
