/**
 * Calls and errors as messages on the back-end channel, for a front-end that
 * gave no eventfd (INBAND_NOTIFICATIONS).
 *
 * An eventfd counts what nobody has read yet; here the acknowledgement, which
 * must be negotiated, tells that a message was read. Until it comes one more
 * is owed at most, so a front-end that reads nothing makes us hoard nothing.
 *
 * @module
 */

import { BackendRequest } from "../protocol/backend_request.ts";
import { hasFeature, ProtocolFeature } from "../protocol/features.ts";
import { plainWire } from "../protocol/layout.ts";
import { vringState } from "../protocol/payloads.ts";
import type { BackendChannel } from "../transports/transport.ts";
import type { Vring } from "./vring.ts";

/** What in-band notifications need to know of their session. */
export interface InBandSession {
  readonly ackedProtocolFeatures: bigint;
  readonly backendChannel: BackendChannel | null;
}

type NotificationId =
  | typeof BackendRequest.BACKEND_VRING_CALL
  | typeof BackendRequest.BACKEND_VRING_ERR;

export class InBandNotifications {
  readonly #session: InBandSession;
  /** Sent and not acknowledged; true: another one is owed then. */
  readonly #unread = new Map<string, boolean>();

  constructor(session: InBandSession) {
    this.#session = session;
  }

  /** Whether calls and errors may be messages. */
  get isNegotiated(): boolean {
    return hasFeature(
      this.#session.ackedProtocolFeatures,
      ProtocolFeature.INBAND_NOTIFICATIONS,
    );
  }

  /** Used buffers: BACKEND_VRING_CALL. */
  call(vring: Vring): void {
    this.#notify(BackendRequest.BACKEND_VRING_CALL, vring);
  }

  /** The ring is broken: BACKEND_VRING_ERR. */
  error(vring: Vring): void {
    this.#notify(BackendRequest.BACKEND_VRING_ERR, vring);
  }

  #notify(id: NotificationId, vring: Vring): void {
    const { backendChannel } = this.#session;
    if (backendChannel === null || !this.isNegotiated) return;
    const key = `${id} ${vring.index}`;
    if (this.#unread.has(key)) {
      this.#unread.set(key, true);
      return;
    }
    this.#unread.set(key, false);
    const state = { index: vring.index, num: 0 };
    const payload = vringState.encode(state, plainWire);
    backendChannel.request(id, payload, { needReply: true })
      // A channel that has closed: there is nobody left to tell.
      .catch(() => {})
      .then(() => {
        const isOwed = this.#unread.get(key) === true;
        this.#unread.delete(key);
        // A suspended device is silent.
        if (isOwed && vring.queue !== null) this.#notify(id, vring);
      });
  }
}
