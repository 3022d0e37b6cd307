/**
 * The socket of SET_BACKEND_REQ_FD: our requests, the front-end's replies.
 *
 * @module
 */

import { Vhost2Error } from "../../ffi/errors.ts";
import {
  FLAG_NEED_REPLY,
  FLAG_REPLY,
  VERSION,
} from "../../protocol/message.ts";
import type { BackendChannel, BackendReply } from "../transport.ts";
import { Channel } from "./channel.ts";

interface PendingReply {
  readonly request: number;
  resolve(reply: BackendReply): void;
  reject(error: Vhost2Error): void;
}

/** Takes the socket over. Replies come in the order of the requests. */
export function openBackendChannel(fd: number, name: string): BackendChannel {
  const channel = new Channel(fd, name);
  const pending: PendingReply[] = [];
  const failAll = () => {
    for (const reply of pending.splice(0)) {
      reply.reject(
        new Vhost2Error("CLOSED", `Cannot await a reply on ${name}: it closed`),
      );
    }
  };
  const read = async () => {
    for (;;) {
      const message = await channel.receive();
      if (message === null) break;
      const expected = pending.shift();
      const isReply = (message.flags & FLAG_REPLY) !== 0;
      if (
        expected === undefined || !isReply ||
        message.request !== expected.request || message.payload.length !== 8
      ) {
        message.descriptors.close();
        expected?.reject(
          new Vhost2Error(
            "PROTOCOL",
            `Cannot use message ${message.request} on ${name}: no such reply is awaited`,
          ),
        );
        break;
      }
      const value = new DataView(message.payload.buffer).getBigUint64(0, true);
      expected.resolve({ value, descriptors: message.descriptors });
    }
  };
  read().catch(() => {}).finally(() => {
    channel.close();
    failAll();
  });
  const send = (
    request: number,
    payload: Uint8Array,
    flags: number,
    fds: readonly number[] | undefined,
  ) => {
    if (channel.isOpen) return channel.send({ request, flags, payload, fds });
    throw new Vhost2Error("CLOSED", `Cannot send on ${name}: it is closed`);
  };
  // deno-lint-ignore require-await -- what `send` throws is to be a rejection
  const exchange: BackendChannel["exchange"] = async (
    request,
    payload,
    { fds } = {},
  ) => {
    send(request, payload, VERSION | FLAG_NEED_REPLY, fds);
    return new Promise<BackendReply>((resolve, reject) => {
      pending.push({ request, resolve, reject });
    });
  };
  return {
    exchange,
    async request(request, payload, { fds, needReply } = {}) {
      if (!needReply) {
        send(request, payload, VERSION, fds);
        return undefined;
      }
      const { value, descriptors } = await exchange(request, payload, { fds });
      descriptors.close();
      return value;
    },
    close: () => channel.close(),
  };
}
