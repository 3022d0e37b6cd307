/**
 * Requests of ours to the front-end, over the channel of SET_BACKEND_REQ_FD:
 * shared objects, shared memory, host notifiers.
 *
 * @module
 */

import { Vhost2Error } from "../ffi/errors.ts";
import {
  BackendRequest as Id,
  type BackendRequestId,
  checkBackendGate,
  findBackendRow,
} from "../protocol/backend_request.ts";
import { hasFeature, ProtocolFeature } from "../protocol/features.ts";
import { type Codec, plainWire } from "../protocol/layout.ts";
import { payloadCodecs } from "../protocol/request_row.ts";
import type { BackendPayloadOf } from "../protocol/backend_request.ts";
import type { BackendChannel, BackendReply } from "../transports/transport.ts";

/** What the requests need to know of their session. */
export interface RequestingSession {
  readonly name: string;
  readonly features: bigint;
  readonly ackedProtocolFeatures: bigint;
  readonly backendChannel: BackendChannel | null;
  /** All rings are stopped: the device must be silent. */
  readonly isSuspended: boolean;
}

export class BackendRequests {
  readonly #session: RequestingSession;

  constructor(session: RequestingSession) {
    this.#session = session;
  }

  /**
   * Sends a request and awaits that it was accepted; without REPLY_ACK, only
   * that it was sent. Rejects when the front-end refuses it, or never agreed to
   * be asked.
   */
  async send<I extends BackendRequestId>(
    id: I,
    payload: BackendPayloadOf<I>,
    fds: readonly number[] = [],
  ): Promise<void> {
    const ack = await this.ask(id, payload, fds);
    if ((ack ?? 0n) === 0n) return;
    throw this.#failure(
      findBackendRow(id)!.name,
      `the front-end answers ${ack}`,
    );
  }

  /** REPLY_ACK is negotiated: what is sent is answered. */
  get canAcknowledge(): boolean {
    return hasFeature(
      this.#session.ackedProtocolFeatures,
      ProtocolFeature.REPLY_ACK,
    );
  }

  /** As `send`, but answers the ack, whatever it is; undefined without one. */
  async ask<I extends BackendRequestId>(
    id: I,
    payload: BackendPayloadOf<I>,
    fds: readonly number[] = [],
  ): Promise<bigint | undefined> {
    const { channel, bytes } = this.#prepare(id, payload, fds.length);
    const needReply = this.canAcknowledge;
    return await channel.request(id, bytes, { fds, needReply });
  }

  /** Asks for a shared object: its descriptor, the caller's; null: no such. */
  async lookUp(uuid: Uint8Array): Promise<number | null> {
    const id = Id.BACKEND_SHARED_OBJECT_LOOKUP;
    const { channel, bytes } = this.#prepare(id, uuid, 0);
    const { value, descriptors }: BackendReply = await channel.exchange(
      id,
      bytes,
    );
    const fd = value === 0n ? descriptors.take() : undefined;
    descriptors.close();
    return fd ?? null;
  }

  #prepare<I extends BackendRequestId>(
    id: I,
    payload: BackendPayloadOf<I>,
    descriptorCount: number,
  ) {
    const row = findBackendRow(id)!;
    const { name } = row;
    const { features, ackedProtocolFeatures, backendChannel, isSuspended } =
      this.#session;
    const closedGate = checkBackendGate(row, descriptorCount, {
      offeredFeatures: features,
      features,
      protocolFeatures: ackedProtocolFeatures,
    });
    if (closedGate !== null) throw this.#failure(name, closedGate);
    if (backendChannel === null) {
      throw this.#failure(name, "the front-end has given no channel for it");
    }
    if (isSuspended) {
      throw this.#failure(name, "all queues are stopped, the device is silent");
    }
    const codec: Codec<unknown> = payloadCodecs[row.payload];
    return {
      channel: backendChannel,
      bytes: codec.encode(payload, plainWire),
    };
  }

  #failure(name: string, reason: string): Vhost2Error {
    return new Vhost2Error(
      "PROTOCOL",
      `Cannot send ${name} to ${this.#session.name}: ${reason}`,
    );
  }
}
