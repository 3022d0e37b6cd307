/**
 * What a disk asks of the place where its bytes are.
 *
 * @module
 */

import type { Vhost2Error } from "../../../ffi/errors.ts";
import type { Batch, StartedQueue } from "../../../virtqueue/mod.ts";

/** How a request ended: the status byte of virtio 1.3, 5.2.6. */
export const Status = { OK: 0, IOERR: 1, UNSUPP: 2 } as const;

/** The requests of one started queue, as its backing sees them. */
export interface BackingClient {
  readonly queue: StartedQueue;
  /** The batch that is being processed. */
  readonly batch: Batch;
  /** Aborted when the stopping queue waits no longer for its requests. */
  readonly signal: AbortSignal;
  /**
   * Ends a request, or one part of it, at any time; what comes after the
   * request has been ended otherwise does nothing.
   */
  finish(head: number, status: number): void;
  /** Whether the request still waits for its `finish`. */
  isOpen(head: number): boolean;
  /** Tells the user what a failed request does not say. */
  report(error: Vhost2Error): void;
}

/**
 * Serves the requests of one started queue. `head` names the request; offsets
 * and lengths are bytes, whole blocks inside the disk. Data is in segments
 * `segmentFirst` and on of the client's batch, valid until `submit` returns.
 */
export interface BackingQueue {
  /** Whether the event loop stands still while data moves. */
  readonly movesData: boolean;
  /** Whether there is work enough: no batch is begun while it is true. */
  readonly isCongested: boolean;
  /**
   * Whether all its requests end by events that a blocked Worker notices, and
   * none by a promise or a timer.
   */
  readonly endsByEvents: boolean;
  read(
    head: number,
    offset: number,
    length: number,
    segmentFirst: number,
    segmentCount: number,
  ): void;
  /** `isDurable`: not finished before it would survive a loss of power. */
  write(
    head: number,
    offset: number,
    length: number,
    segmentFirst: number,
    segmentCount: number,
    isDurable: boolean,
  ): void;
  flush(head: number): void;
  /** What is read there afterwards is anything. */
  discard(head: number, offset: number, length: number): void;
  /** What is read there afterwards is zeros. */
  writeZeroes(
    head: number,
    offset: number,
    length: number,
    mayUnmap: boolean,
    isDurable: boolean,
  ): void;
  /** The batch ends: what was put off is begun now. */
  submit(): void;
  /** The queue has stopped: nothing more is asked. */
  close(): void;
}

/** How an open file is used. */
export interface FileUse {
  /** With O_DIRECT: of offsets, lengths and addresses; 1 without. */
  readonly alignment: number;
  /** `FileFlag`s of each write, and of each that is to be durable. */
  readonly writeFlags: number;
  readonly durableWriteFlags: number;
}

/** A backing on its way to a Worker. */
export type PortableBacking =
  | { readonly kind: "null"; readonly size: number }
  | {
    readonly kind: "memory";
    readonly bytes: SharedArrayBuffer;
    /** Where the disk is in it. */
    readonly start: number;
    readonly size: number;
    readonly written: SharedArrayBuffer;
  }
  | {
    readonly kind: "file";
    readonly path: string;
    /** The maker's; the Worker duplicates it. */
    readonly fd: number;
    readonly isReadOnly: boolean;
    readonly use: FileUse;
  };

/** The place where a disk's bytes are, shared by all its queues. */
export interface Backing {
  /** For people: "memory", or the file's path. */
  readonly name: string;
  /** Bytes. */
  readonly size: number;
  /** Bytes in the smallest request that it can serve; 512 unless given. */
  readonly blockSize?: 512 | 4096;
  readonly isReadOnly: boolean;
  readonly canDiscard: boolean;
  readonly canWriteZeroes: boolean;
  openQueue(client: BackingClient): BackingQueue;
  /** For Workers, where it can be served in several isolates at once. */
  toPortable?(): PortableBacking;
  /** Makes room for another size; rejects when that cannot be. */
  resize(size: number): void | Promise<void>;
  /** After the last queue was closed. */
  close(): void | Promise<void>;
}
