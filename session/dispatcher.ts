/**
 * From a message to its handler and back: every column of the message's row is
 * checked before the handler runs, and exactly one answer is sent.
 *
 * @module
 */

import { Vhost2Error } from "../ffi/errors.ts";
import { describeMessage } from "../protocol/describe.ts";
import {
  featureMask,
  hasFeature,
  ProtocolFeature,
  VirtioFeature,
} from "../protocol/features.ts";
import {
  decodeFrontendRequest,
  findFrontendRow,
  FrontendRequest,
  type FrontendRow,
} from "../protocol/frontend_request.ts";
import { type Codec, plainWire } from "../protocol/layout.ts";
import {
  classifyRequestHeader,
  FLAG_NEED_REPLY,
  FLAG_REPLY,
  VERSION,
} from "../protocol/message.ts";
import { iotlbMessage, u64Payload } from "../protocol/payloads.ts";
import { checkGate, payloadCodecs, replyDue } from "../protocol/request_row.ts";
import type { Message } from "../transports/transport.ts";
import {
  type ClassMessage,
  type CustomReply,
  encodeClassReply,
  encodeCustomReply,
  failedSession,
  isClassMessage,
} from "./class_messages.ts";
import { handlers } from "./handlers.ts";
import { Refusal } from "./refusal.ts";
import { ReplyWithDescriptors } from "./reply.ts";
import type { Session } from "./session.ts";
import { customMessage } from "./target_ops.ts";

type Handler = (
  session: Session,
  payload: unknown,
  message: Message,
) => unknown;

const protocolFeaturesMask = featureMask(VirtioFeature.PROTOCOL_FEATURES);

export class Dispatcher {
  readonly #session: Session;

  constructor(session: Session) {
    this.#session = session;
  }

  /**
   * Handles an IOTLB message that goes past the others, also while an op runs;
   * false for any other message, and for one that has to be refused.
   */
  takeNow(message: Message): boolean {
    const session = this.#session;
    if (
      message.request !== FrontendRequest.IOTLB_MSG ||
      !session.translations.isActive
    ) return false;
    const header = { ...message, size: message.payload.length };
    if (classifyRequestHeader(header) !== null) return false;
    const decoded = iotlbMessage.decode(message.payload, plainWire);
    if (!decoded.ok || message.descriptors.count > 0) return false;
    this.#trace("received", message, 0);
    this.#ack(message, session.translations.take(decoded.value));
    return true;
  }

  /** Handles one message. Throws when the connection must end. */
  async dispatch(message: Message): Promise<void> {
    this.#trace("received", message, message.descriptors.count);
    const header = { ...message, size: message.payload.length };
    const broken = classifyRequestHeader(header);
    if (broken !== null) {
      throw new Vhost2Error(
        "PROTOCOL",
        `Cannot take a message of ${this.#session.name}: ${broken.reason}`,
      );
    }
    const row = findFrontendRow(message.request);
    if (
      this.#session.postcopy.isAckDue &&
      row?.id !== FrontendRequest.SET_MEM_TABLE
    ) {
      throw new Vhost2Error(
        "PROTOCOL",
        `Cannot take a message of ${this.#session.name}: request ${message.request} came where postcopy's ack of SET_MEM_TABLE is due`,
      );
    }
    try {
      const reply = row === undefined
        ? await this.#custom(message)
        : await this.#known(row, message);
      if (reply instanceof ReplyWithDescriptors) {
        this.#send(message.request, reply.value, reply.fds);
      } else if (reply !== null) this.#send(message.request, reply);
      else if (this.#isAckWanted(message)) this.#ack(message, 0n);
    } catch (error) {
      this.#refuse(row, message, error as Error);
    }
  }

  async #known(
    row: FrontendRow,
    message: Message,
  ): Promise<Uint8Array | ReplyWithDescriptors<Uint8Array> | null> {
    const session = this.#session;
    const handler = handlers[row.id] as Handler | undefined;
    const closedGate = checkGate(row, {
      offeredFeatures: session.options.features,
      // QEMU's vhost-user-net enables rings before SET_FEATURES: until that
      // comes, whoever knows protocol features has them.
      features: session.ackedFeatures ?? protocolFeaturesMask,
      protocolFeatures: session.ackedProtocolFeatures,
      device: session.options.deviceType,
    });
    if (closedGate !== null) throw new Refusal(closedGate);
    if (handler === undefined && !isClassMessage(row)) {
      return await this.#custom(message);
    }
    const decoded = decodeFrontendRequest(
      row,
      message.payload,
      session.connection.carriesDescriptors ? message.descriptors.count : null,
      plainWire,
    );
    if (!decoded.ok) throw new Refusal(decoded.reason);
    if (row.perVring) {
      const { index } = decoded.value.payload as { index: number };
      if (index >= session.vrings.length) {
        throw new Refusal(
          `${row.name}: vring ${index} of ${session.vrings.length}`,
        );
      }
    }
    if (handler === undefined) {
      return await this.#class({
        name: row.name,
        value: decoded.value.payload,
      } as ClassMessage, message);
    }
    // Before the handler: the ack of the bases has no such reply itself.
    const postcopy = session.postcopy.repliesWithBases;
    const value = await handler(session, decoded.value.payload, message);
    const due = replyDue(row, {
      needReply: false,
      protocolFeatures: session.ackedProtocolFeatures,
      postcopy,
    });
    if (due.kind !== "reply") return null;
    const { encode } = payloadCodecs[due.payload] as Codec<unknown>;
    if (!(value instanceof ReplyWithDescriptors)) {
      return encode(value, plainWire);
    }
    return new ReplyWithDescriptors(encode(value.value, plainWire), value.fds);
  }

  async #custom(message: Message): Promise<Uint8Array | null> {
    return encodeCustomReply(await this.#callCustom(message));
  }

  /** A message whose payload the table knows, and the device its meaning. */
  async #class(
    typed: ClassMessage,
    message: Message,
  ): Promise<Uint8Array | null> {
    try {
      return encodeClassReply(typed, await this.#callCustom(message, typed));
    } catch (error) {
      if (typed.name !== "CREATE_CRYPTO_SESSION") throw error;
      // A reply is due, and it has a way to say "failed".
      this.#session.report(this.#refusal(typed.name, error as Error));
      return encodeClassReply(typed, failedSession);
    }
  }

  async #callCustom(
    message: Message,
    typed?: ClassMessage,
  ): Promise<CustomReply> {
    const { ops, device, sequencer } = this.#session;
    if (ops.customMessage === undefined) {
      throw new Refusal(`unknown request ${message.request}`);
    }
    return await sequencer.call(
      "customMessage",
      () => ops.customMessage!(device, customMessage(message, typed)),
    );
  }

  #refusal(name: string, cause: Error): Vhost2Error {
    return new Vhost2Error(
      "PROTOCOL",
      `Cannot accept ${name} of ${this.#session.name}: ${cause.message}`,
      { cause },
    );
  }

  /**
   * Tells the front-end, by an error reply or a non-zero ack; where it waits
   * for neither, only the end of the connection can tell it.
   */
  #refuse(row: FrontendRow | undefined, message: Message, error: Error): void {
    const name = row?.name ?? `request ${message.request}`;
    const refusal = this.#refusal(name, error);
    if (row?.id === FrontendRequest.GET_CONFIG) {
      // The specification's way to say "failed": no payload at all.
      this.#session.report(refusal);
      return this.#send(message.request, new Uint8Array(0));
    }
    if (row?.reply.kind === "reply" || !this.#isAckWanted(message)) {
      throw refusal;
    }
    this.#session.report(refusal);
    this.#ack(message, 1n);
  }

  /** REPLY_ACK need not be acked for GET_ and SET_PROTOCOL_FEATURES to work. */
  #isAckWanted(message: Message): boolean {
    return (message.flags & FLAG_NEED_REPLY) !== 0 &&
      hasFeature(
        this.#session.ackedProtocolFeatures,
        ProtocolFeature.REPLY_ACK,
      );
  }

  #ack(message: Message, value: bigint): void {
    this.#send(message.request, u64Payload.encode(value, plainWire));
  }

  #send(
    request: number,
    payload: Uint8Array,
    fds: readonly number[] = [],
  ): void {
    // QEMU refuses a reply with any other flag, an echoed NEED_REPLY too.
    const flags = VERSION | FLAG_REPLY;
    this.#trace("sent", { request, flags, payload }, fds.length);
    this.#session.connection.send({ request, flags, payload, fds });
  }

  #trace(
    direction: "received" | "sent",
    message: { request: number; flags: number; payload: Uint8Array },
    descriptorCount: number,
  ): void {
    this.#session.options.trace?.(describeMessage({
      direction,
      header: { ...message, size: message.payload.length },
      payload: message.payload,
      descriptorCount,
    }));
  }
}
