/**
 * What `virtqueue/` needs of a started queue; the session's `Queue` is one.
 *
 * @module
 */

import type { GuestMemory } from "../ffi/guest_memory.ts";
import type { IotlbMiss } from "../ffi/iotlb.ts";

export interface StartedQueue {
  readonly index: number;
  readonly size: number;
  readonly features: bigint;
  readonly addresses: {
    readonly space: "gpa" | "uva" | "iova";
    readonly descriptor: bigint;
    readonly available: bigint;
    readonly used: bigint;
  };
  readonly memory: GuestMemory;
  readonly isPolled: boolean;
  /** What is written for it may have to be logged (LOG_SHMFD). */
  readonly isLogged: boolean;
  /** The core's handle of the inflight region; null when nothing is tracked. */
  readonly inflight: number | null;
  /** What the region says of the queue is of an earlier ring. */
  readonly isAnew?: boolean;
  /** At a stop: requests in flight may stay recorded there. */
  readonly leavesInFlight: boolean;
  /** Set when it has stopped: how many requests did stay there. */
  leftInFlight: number;
  /** Names this run of the queue among all of the process, where it has to. */
  readonly runId?: number;
  /** Microseconds to look for more after the last work, where that is set. */
  readonly pollMicroseconds?: number;
  availableIndex: number;
  call(): void;
  /** Kicks when one of these has come. */
  missed(misses: readonly IotlbMiss[]): void;
  fail(reason: string, cause?: unknown): void;
}
