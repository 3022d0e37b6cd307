/**
 * What a user's device implements: the RFC's `tgt_ops`, all optional.
 *
 * @module
 */

import type { Message } from "../transports/transport.ts";
import type { Device } from "./device.ts";
import type { Queue } from "./queue.ts";

/** Why configuration space is being written. */
export type SetConfigReason = "frontend" | "migration";

/** A message that the library does not know, as it arrived. */
export interface CustomMessage {
  readonly request: number;
  readonly flags: number;
  readonly payload: Uint8Array<ArrayBuffer>;
  /** Takes the next descriptor over; whoever takes it closes it. */
  takeDescriptor(): number | undefined;
}

/**
 * The ops of one device. The asynchronous ones complete when their promise
 * settles; no other op is called for the device in the meantime, and the
 * front-end's messages wait.
 *
 * In order: `deviceCreate`; then `deviceFeaturesChanged` at least once before
 * `deviceInit`; `deviceInit` before the first `queueStart` and again, with all
 * queues stopped, after memory was removed or changed; `queueStart` and
 * `queueStop` for each queue on its own; at the end `queueStop` of what still
 * runs, then `deviceDestroy`.
 */
export interface TargetOps {
  /**
   * A front-end has connected. A rejection ends the connection; no other op
   * is called then, not even `deviceDestroy`.
   */
  deviceCreate?(device: Device): void | Promise<void>;
  /**
   * Memory and features are in place. All queues are stopped. A rejection ends
   * the connection.
   */
  deviceInit?(device: Device): void | Promise<void>;
  /**
   * `device.features` has changed; queues may be running, but then only
   * LOG_ALL has changed. A rejection ends the connection.
   */
  deviceFeaturesChanged?(
    device: Device,
    features: bigint,
  ): void | Promise<void>;
  /**
   * Start to process the queue. It does not change, nor does the memory,
   * before `queueStop` has completed. A queue whose start was rejected is not
   * stopped; it is started again when the front-end sets it up again.
   */
  queueStart?(queue: Queue): void | Promise<void>;
  /**
   * Stop to process the queue; after completion it must not be touched. A
   * rejection is tried again after 10 ms, doubling to 1 s, ten times; then the
   * memory is taken away and the device destroyed.
   */
  queueStop?(queue: Queue): void | Promise<void>;
  /** The front-end has gone; all queues are stopped. Retried as `queueStop`. */
  deviceDestroy?(device: Device): void | Promise<void>;
  /**
   * A message outside the library's table. What is returned is sent as the
   * reply; without a value the message is acknowledged if the front-end asked
   * for that. A rejection is a non-zero ack, or the end of the connection
   * where none was asked for.
   */
  customMessage?(
    device: Device,
    message: CustomMessage,
  ): void | Uint8Array | Promise<void | Uint8Array>;

  /** The driver kicked a started queue. Synchronous. */
  queueKick?(queue: Queue): void;
  /**
   * All of configuration space, at most 256 bytes. Synchronous. Offering the
   * CONFIG protocol feature needs this op.
   */
  getConfig?(device: Device): Uint8Array;
  /**
   * The driver wrote `data` at `offset`, or a migration restores it.
   * Synchronous; throwing refuses the write.
   */
  setConfig?(
    device: Device,
    offset: number,
    data: Uint8Array,
    reason: SetConfigReason,
  ): void;
}

/** A message as `customMessage` sees it. */
export function customMessage(message: Message): CustomMessage {
  return {
    request: message.request,
    flags: message.flags,
    payload: message.payload,
    takeDescriptor: () => message.descriptors.take(),
  };
}
