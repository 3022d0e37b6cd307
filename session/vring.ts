/**
 * vhost-user's control object of one queue: what the front-end has set, and
 * whether the queue runs.
 *
 * @module
 */

import type { VringAddress } from "../protocol/payloads.ts";
import type { KickSource, NotificationSink } from "../transports/transport.ts";
import type { Queue } from "./queue.ts";

/** Whether the user's device has the queue. */
export type RunState =
  | { readonly kind: "stopped" }
  /** `queueStart` is being awaited. */
  | { readonly kind: "starting"; readonly queue: Queue }
  | { readonly kind: "started"; readonly queue: Queue }
  /** `queueStop` is being awaited. */
  | { readonly kind: "stopping"; readonly queue: Queue }
  /** The start failed; the front-end must set something up again. */
  | { readonly kind: "failed" };

/** How the front-end notifies: not yet, not at all, by messages or events. */
export type Kick =
  | { readonly kind: "none" }
  | { readonly kind: "polled" }
  /** By VRING_KICK messages. */
  | { readonly kind: "inBand" }
  | { readonly kind: "event"; readonly source: KickSource };

export class Vring {
  readonly index: number;
  /** Number of descriptors; 0 until SET_VRING_NUM. */
  size = 0;
  /**
   * Where to start from, and where the last run stopped; null until either is
   * known. Packed: 15 bits of position and a wrap counter of what is available,
   * then the same of what is used.
   */
  base: number | null = null;
  addresses: VringAddress | null = null;
  isEnabled = false;
  kick: Kick = { kind: "none" };
  call: NotificationSink | null = null;
  error: NotificationSink | null = null;
  run: RunState = { kind: "stopped" };
  /** The last stop left requests in the inflight region. */
  hasLeftInFlight = false;
  /** The base at the last stop. */
  stoppedAt: number | null = null;
  /** The base was set to another one than that: the driver began anew. */
  isAnew = false;

  /** The device runs it while it is disabled too, without side effects. */
  readonly runsDisabled: boolean;

  constructor(index: number, runsDisabled = false) {
    this.index = index;
    this.runsDisabled = runsDisabled;
  }

  /** Whether everything is set that a start needs, memory aside. */
  get isReady(): boolean {
    return (this.isEnabled || this.runsDisabled) && this.isSetUp;
  }

  /** The same for a ring that is disabled. */
  get isSetUp(): boolean {
    return this.size > 0 && this.addresses !== null &&
      this.kick.kind !== "none" && this.run.kind === "stopped";
  }

  /** The queue while the user's device has it. */
  get queue(): Queue | null {
    return "queue" in this.run ? this.run.queue : null;
  }

  /** Something was set up again: a failed start may be tried again. */
  forgetFailure(): void {
    if (this.run.kind === "failed") this.run = { kind: "stopped" };
  }

  setKick(kick: Kick): void {
    if (this.kick.kind === "event") this.kick.source.close();
    this.kick = kick;
  }

  setCall(sink: NotificationSink | null): void {
    const old = this.call;
    this.call = sink;
    this.queue?.onChanged?.();
    old?.close();
  }

  setError(sink: NotificationSink | null): void {
    this.error?.close();
    this.error = sink;
  }

  /** As GET_VRING_BASE leaves it: the base, and what is enabled, stay. */
  forgetSetup(): void {
    this.forgetFailure();
    this.addresses = null;
    this.setKick({ kind: "none" });
  }

  /** As RESET_DEVICE leaves it. */
  reset(): void {
    this.forgetSetup();
    this.isEnabled = false;
    this.size = 0;
    this.base = null;
    this.stoppedAt = null;
    this.isAnew = false;
    this.hasLeftInFlight = false;
  }

  close(): void {
    this.setKick({ kind: "none" });
    this.setCall(null);
    this.setError(null);
  }
}
