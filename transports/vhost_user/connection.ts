/**
 * One vhost-user front-end on a Unix socket.
 *
 * @module
 */

import { constants } from "../../ffi/abi.gen.ts";
import { core } from "../../ffi/core.ts";
import { Vhost2Error } from "../../ffi/errors.ts";
import type {
  BackendChannel,
  Connection,
  Descriptors,
  KickSource,
  Message,
  NotificationSink,
  OutgoingMessage,
} from "../transport.ts";
import { openBackendChannel } from "./backend_channel.ts";
import { Channel } from "./channel.ts";
import { openKick, openSink } from "./notifications.ts";

/** All features can be carried by a Unix socket. */
const allFeatures = (1n << 64n) - 1n;

export class VhostUserConnection implements Connection {
  readonly name: string;
  readonly protocolFeatures = allFeatures;
  readonly features = allFeatures;
  readonly carriesDescriptors = true;
  readonly #channel: Channel;

  constructor(fd: number, name: string) {
    this.name = name;
    this.#channel = new Channel(fd, name);
  }

  get hangupFd(): number | null {
    return this.#channel.isOpen ? this.#channel.fd : null;
  }

  get onHangup(): (() => void) | undefined {
    return this.#channel.onHangup;
  }

  set onHangup(handler: (() => void) | undefined) {
    this.#channel.onHangup = handler;
  }

  receive(): Promise<Message | null> {
    return this.#channel.receive();
  }

  send(message: OutgoingMessage): void {
    this.#channel.send(message);
  }

  regionSource(message: Message, index: number): { fd: number } {
    // The n-th descriptor is the n-th region's.
    return { fd: message.descriptors.peek()[index] ?? -1 };
  }

  openKick(
    _queueIndex: number,
    descriptors: Descriptors,
    onKick: (() => void) | null,
  ): KickSource | null {
    return openKick(descriptors, onKick);
  }

  openCall(
    _queueIndex: number,
    descriptors: Descriptors,
  ): NotificationSink | null {
    return openSink(descriptors, "call");
  }

  openError(
    _queueIndex: number,
    descriptors: Descriptors,
  ): NotificationSink | null {
    return openSink(descriptors, "error");
  }

  openBackendChannel(descriptors: Descriptors): BackendChannel {
    const fd = descriptors.take() ?? -1;
    const kind = core.descriptorKind(fd);
    if (kind !== constants.kindSocket) {
      core.descriptorClose(fd);
      throw new Vhost2Error(
        "PROTOCOL",
        `Cannot use descriptor ${fd} as back-end channel: it is not a connected socket`,
      );
    }
    return openBackendChannel(fd, `${this.name} (back-end channel)`);
  }

  close(): void {
    this.#channel.close();
  }
}
