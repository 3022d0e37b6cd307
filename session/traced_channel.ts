/**
 * The back-end's channel when messages are shown: a line for each request of
 * ours and each answer.
 *
 * @module
 */

import { describeMessage } from "../protocol/describe.ts";
import { plainWire } from "../protocol/layout.ts";
import { FLAG_NEED_REPLY, FLAG_REPLY, VERSION } from "../protocol/message.ts";
import { u64Payload } from "../protocol/payloads.ts";
import type { BackendChannel, BackendReply } from "../transports/transport.ts";

/** `channel`, with its messages given to `trace`. */
export function tracedChannel(
  channel: BackendChannel,
  trace: (line: string) => void,
): BackendChannel {
  const show = (
    direction: "sent" | "received",
    request: number,
    flags: number,
    payload: Uint8Array,
    descriptorCount = 0,
  ) =>
    trace(describeMessage({
      direction,
      channel: "backend",
      header: { request, flags: VERSION | flags, size: payload.length },
      payload,
      descriptorCount,
    }));
  const showReply = (request: number, value: bigint, descriptors = 0) =>
    show(
      "received",
      request,
      FLAG_REPLY,
      u64Payload.encode(value, plainWire),
      descriptors,
    );
  return {
    async request(request, payload, options = {}) {
      const flags = options.needReply ? FLAG_NEED_REPLY : 0;
      show("sent", request, flags, payload, options.fds?.length);
      const value = await channel.request(request, payload, options);
      if (value !== undefined) showReply(request, value);
      return value;
    },
    async exchange(request, payload, options = {}): Promise<BackendReply> {
      show("sent", request, FLAG_NEED_REPLY, payload, options.fds?.length);
      const reply = await channel.exchange(request, payload, options);
      showReply(request, reply.value, reply.descriptors.count);
      return reply;
    },
    close: () => channel.close(),
  };
}
