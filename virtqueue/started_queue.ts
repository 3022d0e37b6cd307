/**
 * What `virtqueue/` needs of a started queue; the session's `Queue` is one.
 *
 * @module
 */

import type { GuestMemory } from "../ffi/guest_memory.ts";

export interface StartedQueue {
  readonly index: number;
  readonly size: number;
  readonly features: bigint;
  readonly addresses: {
    readonly space: "gpa" | "uva";
    readonly descriptor: bigint;
    readonly available: bigint;
    readonly used: bigint;
  };
  readonly memory: GuestMemory;
  readonly isPolled: boolean;
  /** What is written for it may have to be logged (LOG_SHMFD). */
  readonly isLogged: boolean;
  availableIndex: number;
  call(): void;
  fail(reason: string): void;
}
