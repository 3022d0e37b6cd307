/**
 * What a user's device implements: the RFC's `tgt_ops`, all optional.
 *
 * @module
 */

import type { Message } from "../transports/transport.ts";
import type { ClassMessage, CustomReply } from "./class_messages.ts";
import type { Device } from "./device.ts";
import type { Queue } from "./queue.ts";

/** Why configuration space is being written. */
export type SetConfigReason = "frontend" | "migration";

/** A transfer of a device's own state. */
export interface StateTransfer {
  readonly direction: "save" | "load";
  /**
   * The front-end's pipe or file, at `/proc/self/fd/<fd>` for APIs that take
   * paths. It is the library's: closed when the op has completed, which is the
   * end of the stream for a front-end that reads.
   */
  readonly fd: number;
}

/** A message that the user's device handles, as it arrived. */
export type CustomMessage =
  & {
    readonly request: number;
    readonly flags: number;
    readonly payload: Uint8Array<ArrayBuffer>;
    /** Takes the next descriptor over; whoever takes it closes it. */
    takeDescriptor(): number | undefined;
  }
  & (
    /** A message of a class of devices: its name, its decoded payload. */
    | ClassMessage
    /** A number that the library does not know. */
    | { readonly name?: undefined; readonly value?: undefined }
  );

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
   * A message outside the library's table, or one of the device's class:
   * SEND_RARP, NET_SET_MTU, CREATE_CRYPTO_SESSION, CLOSE_CRYPTO_SESSION (see
   * `DeviceOptions.protocolFeatures`) and GPU_SET_SOCKET (`deviceType`), which
   * have a `name` and a decoded `value`.
   *
   * Bytes returned are sent as the reply, a bigint as a u64; without a value
   * the message is acknowledged if the front-end asked for that. A rejection is
   * a non-zero ack, or the end of the connection where none was asked for.
   *
   * To the messages with a name only an ack is due, and anything but 0 is a
   * refusal; but CREATE_CRYPTO_SESSION is answered with the session's id as a
   * bigint (or with all 1072 bytes), and a rejection says that there is none.
   */
  customMessage?(
    device: Device,
    message: CustomMessage,
  ): CustomReply | Promise<CustomReply>;

  /**
   * A descriptor of the shared object (a dma-buf) that this device has added
   * by `addSharedObject`; it stays the device's. Null: there is none. Offering
   * the SHARED_OBJECT protocol feature needs this op.
   *
   * @param uuid 16 bytes
   */
  getSharedObject?(
    device: Device,
    uuid: Uint8Array,
  ): number | null | Promise<number | null>;

  /**
   * Migration: write all of the device's own state to a descriptor (save), or
   * take it over from there up to its end (load). All queues are stopped and
   * none starts before the promise settles; other ops may be called meanwhile.
   * A rejection tells the front-end that the state cannot be used. When it goes
   * away `device.signal` is aborted, and nobody waits for the op any more.
   * Offering the DEVICE_STATE protocol feature needs this op.
   */
  transferState?(device: Device, transfer: StateTransfer): void | Promise<void>;

  /** The driver kicked a started queue. Synchronous. */
  queueKick?(queue: Queue): void;
  /**
   * All of configuration space, at most 256 bytes. Synchronous. Offering the
   * CONFIG protocol feature needs this op.
   *
   * @param own with PCI-vDPA, what the device itself says, to be passed on or
   * changed
   */
  getConfig?(device: Device, own?: Uint8Array): Uint8Array;
  /**
   * The driver wrote `data` at `offset`, or a migration restores it.
   * Synchronous; throwing refuses the write. With PCI-vDPA the device has it
   * afterwards.
   */
  setConfig?(
    device: Device,
    offset: number,
    data: Uint8Array,
    reason: SetConfigReason,
  ): void;
}

/** A message as `customMessage` sees it. */
export function customMessage(
  message: Message,
  typed?: ClassMessage,
): CustomMessage {
  return {
    ...typed,
    request: message.request,
    flags: message.flags,
    payload: message.payload,
    takeDescriptor: () => message.descriptors.take(),
  };
}
