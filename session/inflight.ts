/**
 * The inflight region of a session: made for the front-end (GET_INFLIGHT_FD)
 * or brought by it (SET_INFLIGHT_FD), for rings to track their requests in.
 *
 * @module
 */

import { core } from "../ffi/core.ts";
import type { GuestMemory } from "../ffi/guest_memory.ts";
import {
  inflightBytes,
  InflightRegion,
  makeInflightFd,
} from "../ffi/inflight_region.ts";
import type { InflightDescription } from "../protocol/payloads.ts";
import { Refusal } from "./refusal.ts";

const maxQueueSize = 32768;

/** What the tracking needs of its session. */
export interface TrackingSession {
  readonly memory: GuestMemory;
  readonly vrings: { readonly length: number };
  /** Which layout a queue's part has. */
  readonly isPacked: boolean;
}

export class InflightTracking {
  readonly #session: TrackingSession;
  #region: InflightRegion | null = null;
  #numQueues = 0;
  /** Of the region that was made here, until it was sent. */
  #fd: number | null = null;

  constructor(session: TrackingSession) {
    this.#session = session;
  }

  /** The core's handle of the region for queue `index`; null without one. */
  handleOf(index: number): number | null {
    return this.#region !== null && index < this.#numQueues
      ? this.#region.handle
      : null;
  }

  /**
   * Makes a region that nobody has used, and tracks in it from here on.
   * All queues must be stopped.
   *
   * @returns what it is, and its descriptor, which stays ours
   */
  make(
    { numQueues, queueSize }: InflightDescription,
  ): { description: InflightDescription; fd: number } {
    this.#requireSizes(numQueues, queueSize);
    const { isPacked } = this.#session;
    const bytes = inflightBytes(numQueues, queueSize, isPacked);
    const fd = makeInflightFd(bytes);
    const description: InflightDescription = {
      mmapSize: BigInt(bytes),
      mmapOffset: 0n,
      numQueues,
      queueSize,
    };
    try {
      this.adopt(description, fd);
    } catch (error) {
      core.descriptorClose(fd);
      throw error;
    }
    this.#fd = fd;
    return { description, fd };
  }

  /**
   * Tracks in a region of the front-end's from here on: queues resubmit what is
   * in flight there when they start. `fd` stays the caller's. All queues must
   * be stopped.
   */
  adopt(description: InflightDescription, fd: number): void {
    const { numQueues, queueSize } = description;
    this.#requireSizes(numQueues, queueSize);
    const { memory, isPacked } = this.#session;
    const region = new InflightRegion(memory, fd, description, isPacked);
    this.forget();
    this.#region = region;
    this.#numQueues = numQueues;
  }

  /** Tracks no more. All queues must be stopped. */
  forget(): void {
    this.#region?.close();
    this.#region = null;
    this.#numQueues = 0;
    if (this.#fd !== null) core.descriptorClose(this.#fd);
    this.#fd = null;
  }

  #requireSizes(numQueues: number, queueSize: number): void {
    const { length } = this.#session.vrings;
    if (numQueues === 0 || numQueues > length) {
      throw new Refusal(`num queues ${numQueues} is not from 1 to ${length}`);
    }
    if (queueSize === 0 || queueSize > maxQueueSize) {
      throw new Refusal(
        `queue size ${queueSize} is not from 1 to ${maxQueueSize}`,
      );
    }
  }
}
