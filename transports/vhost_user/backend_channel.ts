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
import type { BackendChannel } from "../transport.ts";
import { Channel } from "./channel.ts";

interface PendingReply {
  readonly request: number;
  resolve(value: bigint): void;
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
      message.descriptors.close();
      const expected = pending.shift();
      const isReply = (message.flags & FLAG_REPLY) !== 0;
      if (
        expected === undefined || !isReply ||
        message.request !== expected.request || message.payload.length !== 8
      ) {
        expected?.reject(
          new Vhost2Error(
            "PROTOCOL",
            `Cannot use message ${message.request} on ${name}: no such reply is awaited`,
          ),
        );
        break;
      }
      expected.resolve(
        new DataView(message.payload.buffer).getBigUint64(0, true),
      );
    }
  };
  read().catch(() => {}).finally(() => {
    channel.close();
    failAll();
  });
  return {
    request(request, payload, options = {}) {
      if (!channel.isOpen) {
        return Promise.reject(
          new Vhost2Error("CLOSED", `Cannot send on ${name}: it is closed`),
        );
      }
      const flags = VERSION | (options.needReply ? FLAG_NEED_REPLY : 0);
      channel.send({ request, flags, payload, fds: options.fds });
      if (!options.needReply) return Promise.resolve(undefined);
      return new Promise((resolve, reject) => {
        pending.push({ request, resolve, reject });
      });
    },
    close: () => channel.close(),
  };
}
