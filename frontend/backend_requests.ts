/**
 * The front-end's end of SET_BACKEND_REQ_FD: requests that the back-end makes.
 *
 * @module
 */

import { Vhost2Error } from "../ffi/errors.ts";
import {
  type BackendMessage,
  decodeBackendRequest,
  findBackendRow,
} from "../protocol/backend_request.ts";
import { plainWire } from "../protocol/layout.ts";
import {
  classifyRequestHeader,
  FLAG_NEED_REPLY,
  FLAG_REPLY,
  VERSION,
} from "../protocol/message.ts";
import { u64Payload } from "../protocol/payloads.ts";
import { Channel } from "../transports/vhost_user/channel.ts";
import type { Descriptors, Message } from "../transports/transport.ts";

/** A u64, and descriptors to go with it (SHARED_OBJECT_LOOKUP has one). */
export interface BackendAnswer {
  readonly value: bigint;
  /** They stay the caller's, and open until the answer is sent. */
  readonly fds: readonly number[];
}

/**
 * Answers one request of the back-end: the u64 of its ack (0, success, if
 * nothing is returned), sent only if the back-end asked for one. Throwing is
 * an ack of 1. Descriptors that it takes are its own, the rest are closed.
 */
export type BackendRequestHandler = (
  message: BackendMessage,
  descriptors: Descriptors,
) => Answered | Promise<Answered>;

type Answered = bigint | BackendAnswer | void;

/** The open channel. */
export interface BackendRequests {
  /** Settles when the channel has ended; with the error if one ended it. */
  readonly closed: Promise<Vhost2Error | undefined>;
  close(): void;
}

/** Serves requests in order, one at a time, until the peer closes `fd`. */
export function serveBackendRequests(
  fd: number,
  handler: BackendRequestHandler,
): BackendRequests {
  const channel = new Channel(fd, "back-end channel");

  const refuse = (reason: string) =>
    new Vhost2Error(
      "PROTOCOL",
      `Cannot use a request on the back-end channel: ${reason}`,
    );

  const decode = (message: Message): BackendMessage => {
    const { request, flags, payload, descriptors } = message;
    const broken = classifyRequestHeader({
      request,
      flags,
      size: payload.length,
    });
    if (broken !== null) throw refuse(broken.reason);
    const row = findBackendRow(request);
    if (row === undefined) throw refuse(`${request} is unknown`);
    const decoded = decodeBackendRequest(
      row,
      payload,
      descriptors.count,
      plainWire,
    );
    if (!decoded.ok) throw refuse(decoded.reason);
    return decoded.value;
  };

  const serve = async (): Promise<Vhost2Error | undefined> => {
    try {
      for (;;) {
        const message = await channel.receive();
        if (message === null) return undefined;
        try {
          const request = decode(message);
          let answer: Answered;
          try {
            answer = await handler(request, message.descriptors);
          } catch {
            answer = 1n;
          }
          if (
            (message.flags & FLAG_NEED_REPLY) === 0 &&
            request.row.reply.kind !== "reply"
          ) continue;
          const { value, fds } = typeof answer === "object"
            ? answer
            : { value: answer ?? 0n, fds: [] };
          channel.send({
            request: message.request,
            flags: VERSION | FLAG_REPLY,
            payload: u64Payload.encode(value, plainWire),
            fds,
          });
        } finally {
          message.descriptors.close();
        }
      }
    } catch (error) {
      return error as Vhost2Error;
    } finally {
      channel.close();
    }
  };

  return { closed: serve(), close: () => channel.close() };
}
