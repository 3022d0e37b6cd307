/**
 * Tells the front-end that configuration space has changed
 * (BACKEND_CONFIG_CHANGE_MSG); it reads the space then.
 *
 * One message stands for all changes that it has not read yet: until the last
 * one is acknowledged (without REPLY_ACK: in the same turn of the event loop)
 * at most one more is owed. One is owed too while all queues are stopped, when
 * the device must be silent (vhost-user, "Ring states"), and to the next
 * back-end channel if this one has closed.
 *
 * @module
 */

import type { Vhost2Error } from "../ffi/errors.ts";
import { BackendRequest } from "../protocol/backend_request.ts";
import { featureMask, ProtocolFeature } from "../protocol/features.ts";
import type { BackendChannel } from "../transports/transport.ts";
import type { BackendRequests } from "./backend_requests.ts";

/** What is needed of the session. */
export interface ChangingSession {
  readonly ackedProtocolFeatures: bigint;
  readonly backendChannel: BackendChannel | null;
  readonly isSuspended: boolean;
  readonly requests: Pick<BackendRequests, "ask" | "canAcknowledge">;
  report(error: Vhost2Error): void;
}

const needed = featureMask(ProtocolFeature.CONFIG, ProtocolFeature.BACKEND_REQ);

export class ConfigChanges {
  readonly #session: ChangingSession;
  #isOwed = false;
  /** The last message may not have been read. */
  #isUnread = false;
  /** Nobody reads it any more. */
  #closed: BackendChannel | null = null;

  constructor(session: ChangingSession) {
    this.#session = session;
  }

  /** Configuration space has changed. */
  changed(): void {
    this.#isOwed = this.#canBeTold;
    this.settle();
  }

  /** Sends what is owed, if it may be sent now. */
  settle(): void {
    const { backendChannel, isSuspended } = this.#session;
    if (!this.#isOwed || this.#isUnread || isSuspended) return;
    if (!this.#canBeTold || backendChannel === this.#closed) return;
    this.#isOwed = false;
    this.#isUnread = true;
    this.#send().then(() => {
      this.#isUnread = false;
      this.settle();
    }, (error: Vhost2Error) => {
      this.#isUnread = false;
      this.#isOwed = true;
      this.#closed = backendChannel;
      if (error.code !== "CLOSED") this.#session.report(error);
      this.settle();
    });
  }

  get #canBeTold(): boolean {
    const { ackedProtocolFeatures, backendChannel } = this.#session;
    return (ackedProtocolFeatures & needed) === needed &&
      backendChannel !== null;
  }

  /** Fulfilled when another message would not be one too many. */
  async #send(): Promise<void> {
    const { requests } = this.#session;
    const isAcknowledged = requests.canAcknowledge;
    // Whatever the ack says: there is no other way to tell it.
    await requests.ask(BackendRequest.BACKEND_CONFIG_CHANGE_MSG, null);
    if (isAcknowledged) return;
    await new Promise((resolve) => setImmediate(resolve));
  }
}
