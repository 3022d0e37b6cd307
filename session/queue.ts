/**
 * A started queue, as the user's device sees it.
 *
 * @module
 */

import { Vhost2Error } from "../ffi/errors.ts";
import type { GuestMemory } from "../ffi/guest_memory.ts";
import type { IotlbMiss } from "../ffi/iotlb.ts";
import type { Gpa, RingAddress } from "../protocol/address.ts";
import type { Device } from "./device.ts";
import type { RingAreas } from "./ring_areas.ts";

/** What the session knows when it starts a queue. */
export interface QueueSetup {
  readonly device: Device;
  readonly index: number;
  readonly size: number;
  readonly features: bigint;
  readonly addresses: RingAddresses;
  readonly base: number;
  readonly isPolled: boolean;
  readonly isLogged: boolean;
  readonly memory: GuestMemory;
  readonly inflight: number | null;
  readonly isAnew: boolean;
  readonly wires: QueueWires;
  readonly runId?: number;
  readonly pollMicroseconds?: number;
  /** Where the ring is now; null while it is not mapped (IOVAs). */
  areas(): RingAreas | null;
  missed(misses: readonly IotlbMiss[]): void;
  logAddress(): Gpa | null;
  isEnabled(): boolean;
  setHostNotifier(area: HostNotifier | null): Promise<void>;
  call(): void;
  fail(reason: string, cause?: unknown): void;
}

/** How driver and device notify each other, for a Worker that serves a queue. */
export interface QueueWires {
  /** The eventfd of the kick; null where there is none. */
  readonly kickFd: number | null;
  /**
   * The eventfd of the call; "session" where `Queue.call` has to be called in
   * the session's own isolate, null where the driver polls.
   */
  readonly call: () => number | "session" | null;
}

/** A doorbell that the guest's driver writes to directly. */
export interface HostNotifier {
  /** The file (of a PCI device) that holds it; it stays the caller's. */
  readonly fd: number;
  /** Bytes from the start of the file. */
  readonly offset: number;
  /** Bytes; a page. */
  readonly size: number;
}

/** Where the ring is, in the space of the front-end's addresses. */
export interface RingAddresses {
  readonly space: "gpa" | "uva" | "iova";
  readonly descriptor: RingAddress;
  readonly available: RingAddress;
  readonly used: RingAddress;
}

/**
 * A virtqueue between `queueStart` and the completion of `queueStop`. Nothing
 * of it changes in that time but `logAddress`. (virtio 1.3, sections 2.7 and
 * 2.8 for the layout of the three areas.)
 */
export class Queue {
  /** The device that it belongs to. */
  readonly device: Device;
  /** 0-based. */
  readonly index: number;
  /** Number of descriptors; the specification's "queue size". */
  readonly size: number;
  /** Negotiated virtio features, without LOG_ALL, which may change. */
  readonly features: bigint;
  /** The front-end gave no kick: whoever processes the queue must look. */
  readonly isPolled: boolean;
  /**
   * What is written for the queue may have to be logged: LOG_SHMFD is
   * negotiated.
   */
  readonly isLogged: boolean;
  /** For `virtqueue/`: the ring's addresses. */
  readonly addresses: RingAddresses;
  /** For `virtqueue/`: names this run, where a Worker serves it. */
  readonly runId: number | undefined;
  /** For `virtqueue/`: the target's, where it has one. */
  readonly pollMicroseconds: number | undefined;
  /** For a Worker that serves the queue. */
  readonly wires: QueueWires;
  /** For a Worker: told when the call or the log address has changed. */
  onChanged: (() => void) | undefined;
  /** For `virtqueue/`: the memory in which the ring and its buffers are. */
  readonly memory: GuestMemory;
  /**
   * For `virtqueue/`: the core's handle of the inflight region, in which the
   * queue's part is that of `index`; null when nothing is tracked.
   */
  readonly inflight: number | null;
  /**
   * For `virtqueue/`: the driver has begun the ring anew since it stopped, so
   * that what the inflight region says of it is of no interest.
   */
  readonly isAnew: boolean;
  /**
   * Set before `queueStop`: the front-end does not want to wait. What is in
   * flight may stay so, recorded in the inflight region, if it is sure that
   * nothing comes of it any more (`VirtqueueOptions.suspend`).
   */
  leavesInFlight = false;
  /** By `virtqueue/`, when it has stopped: how many requests did stay so. */
  leftInFlight = 0;
  /**
   * Position in the available ring, free-running, 16 bits. With RING_PACKED
   * 32 bits: position (15) and wrap counter of what is available, then the
   * same of what is used. It is where to begin on start; the device keeps it
   * up to date until its `queueStop` has completed, because the front-end is
   * told it (GET_VRING_BASE).
   */
  availableIndex: number;
  readonly #setup: QueueSetup;
  #isStarted = true;
  #isBroken = false;

  /** Made by the session only. */
  constructor(setup: QueueSetup) {
    this.#setup = setup;
    this.device = setup.device;
    this.index = setup.index;
    this.size = setup.size;
    this.features = setup.features;
    this.isPolled = setup.isPolled;
    this.isLogged = setup.isLogged;
    this.addresses = setup.addresses;
    this.memory = setup.memory;
    this.inflight = setup.inflight;
    this.isAnew = setup.isAnew;
    this.runId = setup.runId;
    this.pollMicroseconds = setup.pollMicroseconds;
    this.wires = setup.wires;
    this.availableIndex = setup.base;
  }

  /**
   * 16 bytes per descriptor. Empty after the queue's memory has gone. With
   * ACCESS_PLATFORM the three areas move with the front-end's IOMMU: get them
   * anew after every `await`, and find them empty while they are not mapped
   * (`queueKick` says when to look again).
   */
  get descriptorTable(): Uint8Array<ArrayBuffer> {
    return this.#setup.areas()?.descriptor ?? new Uint8Array(0);
  }

  /**
   * flags, idx, ring[size], used_event; u16 each. With RING_PACKED the driver
   * event suppression: position and wrap counter, flags; u16 each.
   */
  get availableRing(): Uint8Array<ArrayBuffer> {
    return this.#setup.areas()?.available ?? new Uint8Array(0);
  }

  /**
   * flags, idx (u16), ring[size] of { id, len } (u32), avail_event (u16). With
   * RING_PACKED the device event suppression: as the driver's.
   */
  get usedRing(): Uint8Array<ArrayBuffer> {
    return this.#setup.areas()?.used ?? new Uint8Array(0);
  }

  /**
   * For `virtqueue/`: these IOVAs are missing. The front-end is asked, and the
   * queue kicked when one of them has come.
   */
  missed(misses: readonly IotlbMiss[]): void {
    if (this.#isStarted) this.#setup.missed(misses);
  }

  /**
   * Guest address that stands for the used ring in the dirty log, or null:
   * migration sets and clears it while the queue runs.
   */
  get logAddress(): Gpa | null {
    return this.#isStarted ? this.#setup.logAddress() : null;
  }

  /**
   * For who writes the used ring by himself: logs `length` bytes at `offset`
   * of it (of the device event suppression, with RING_PACKED), after they were
   * written. Does nothing while `logAddress` is null. What was written into the
   * request's buffers is a matter of `device.markDirty`.
   */
  markUsed(offset: number, length: number): void {
    if (!this.#isStarted) return;
    this.memory.log.markRing(this.index, offset, length);
  }

  /** False once the queue has been stopped. */
  get isStarted(): boolean {
    return this.#isStarted;
  }

  /**
   * Tells the driver that there are used buffers. Never blocks; may be called
   * from anywhere, inside ops too. Does nothing on a stopped queue or when the
   * driver polls.
   */
  call(): void {
    if (this.#isStarted) this.#setup.call();
  }

  /**
   * Gives the front-end a doorbell to map into the guest in place of the kick,
   * or, by null, takes it away; the end of the queue does that too. Rejects
   * when the front-end refuses it or HOST_NOTIFIER is not negotiated.
   */
  setHostNotifier(area: HostNotifier | null): Promise<void> {
    if (this.#isStarted) return this.#setup.setHostNotifier(area);
    return Promise.reject(
      new Vhost2Error(
        "CLOSED",
        `Cannot set the host notifier of queue ${this.index}: it is stopped`,
      ),
    );
  }

  /**
   * False while the front-end has disabled the ring, which it then still runs
   * if `runsDisabledRings` says so: requests go back, and nothing else is done.
   */
  get isEnabled(): boolean {
    return this.#isStarted && this.#setup.isEnabled();
  }

  /** `fail` was called: no kick is delivered any more. */
  get isBroken(): boolean {
    return this.#isBroken;
  }

  /**
   * Declares the ring broken: the reason is reported and the front-end told
   * through its error descriptor, once. The queue stays started, and idle,
   * until the front-end stops it.
   *
   * @param cause the error behind it, for whoever is told
   */
  fail(reason: string, cause?: unknown): void {
    if (!this.#isStarted || this.#isBroken) return;
    this.#isBroken = true;
    this.#setup.fail(reason, cause);
  }

  /** For the session: the queue has ended. */
  markStopped(): void {
    this.#isStarted = false;
  }
}
