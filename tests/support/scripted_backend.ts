/** A back-end that does what the test says, message by message. */

import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import { FrontendConnection } from "../../frontend/mod.ts";
import { FLAG_REPLY, VERSION } from "../../protocol/message.ts";
import type { Message } from "../../transports/transport.ts";
import { Channel } from "../../transports/vhost_user/channel.ts";

/** The 8 bytes of a u64. */
export function u64(value: bigint): Uint8Array {
  const bytes = new Uint8Array(8);
  new DataView(bytes.buffer).setBigUint64(0, value, true);
  return bytes;
}

export class ScriptedBackend {
  readonly channel: Channel;

  constructor(fd: number) {
    this.channel = new Channel(fd, "scripted back-end");
  }

  /** The next message; its descriptors are the caller's. */
  async next(request?: number): Promise<Message> {
    const message = await this.channel.receive();
    assert.ok(message !== null, "the front-end has closed");
    if (request !== undefined) assert.equal(message.request, request);
    return message;
  }

  /** Answers a message with the flags that QEMU wants, or others. */
  reply(
    message: Message,
    payload: Uint8Array,
    options: { flags?: number; request?: number; fds?: number[] } = {},
  ): void {
    this.channel.send({
      request: options.request ?? message.request,
      flags: options.flags ?? VERSION | FLAG_REPLY,
      payload,
      fds: options.fds,
    });
  }

  close(): void {
    this.channel.close();
  }
}

/** Runs `body` with a front-end and a scripted back-end on a socket pair. */
export async function withScriptedBackend(
  body: (
    connection: FrontendConnection,
    backend: ScriptedBackend,
  ) => Promise<void>,
): Promise<void> {
  const ends = new Int32Array(2);
  assert.equal(core.socketPair(ends), 0);
  const connection = FrontendConnection.fromFd(ends[0]);
  const backend = new ScriptedBackend(ends[1]);
  try {
    await body(connection, backend);
  } finally {
    backend.close();
    connection.close();
    await connection.closed;
  }
}
