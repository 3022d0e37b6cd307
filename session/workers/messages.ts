/**
 * What the registering thread and its Workers say to each other. A message to
 * a Worker is followed by a signal on its wake event, which is in the Worker's
 * poll set: it is noticed while the Worker blocks in the core.
 *
 * @module
 */

import type { MessagePort } from "node:worker_threads";
import type { ErrorMessage } from "../../ffi/errors.ts";
import type { SharedMemoryHandle } from "../../ffi/guest_memory.ts";
import type { Access, IotlbMiss } from "../../ffi/iotlb.ts";
import type { RingAddresses } from "../queue.ts";

/** What a Worker begins with. */
export interface WorkerSetup {
  readonly port: MessagePort;
  /** Its wake event; the registering thread's, open as long as the Worker. */
  readonly wakeFd: number;
  /** See `ffi/held.ts`. */
  readonly accounts: SharedArrayBuffer;
  /** Words at `Control`. */
  readonly control: SharedArrayBuffer;
  readonly module: string;
  readonly name: string;
  readonly options: unknown;
}

/** Words (i32) that a Worker writes. */
export const Control = {
  /** Its thread, 0 before it runs. */
  thread: 0,
  /** How many messages it has taken. */
  received: 1,
  byteSize: 8,
} as const;

/** What a Worker needs to know of a device. */
export interface DeviceMessage {
  readonly id: number;
  readonly name: string;
  readonly memory: SharedMemoryHandle;
  /** One u64: negotiated features, kept up to date. */
  readonly features: SharedArrayBuffer;
  /** See `Device.shared`. */
  readonly shared: SharedArrayBuffer;
}

/** A queue to be started. Descriptors are the registering thread's. */
export interface QueueMessage {
  /** Names this run of the queue. */
  readonly run: number;
  readonly index: number;
  readonly size: number;
  readonly features: bigint;
  readonly addresses: RingAddresses;
  readonly base: number;
  readonly isEnabled: boolean;
  readonly isPolled: boolean;
  readonly isLogged: boolean;
  readonly inflight: number | null;
  readonly isAnew: boolean;
  readonly pollMicroseconds: number | undefined;
  /** Open until the Worker has let go of the queue. */
  readonly kickFd: number | null;
  /** The same; which eventfd it is changes with SET_VRING_CALL. */
  readonly callFd: number;
  /** Words at `RunState`, which the registering thread writes. */
  readonly state: SharedArrayBuffer;
}

/** Of one run of a queue: what may change while it runs. */
export const RunState = {
  /** i32, one of `CallRoute`. */
  callRoute: 0,
  /** i64: the log address, -1 for none. */
  logAddress: 8,
  byteSize: 16,
} as const;

/** How the driver is called. */
export const CallRoute = { none: 0, event: 1, session: 2 } as const;

/** To a Worker. `call` numbers what is to be answered. */
export type ToWorker =
  | {
    readonly kind: "start";
    readonly call: number;
    readonly device: DeviceMessage;
    readonly queue: QueueMessage;
  }
  | {
    readonly kind: "stop";
    readonly call: number;
    readonly run: number;
    /** See `Queue.leavesInFlight`. */
    readonly leavesInFlight: boolean;
  }
  | { readonly kind: "kick"; readonly run: number }
  /** The end of a `translate`. */
  | {
    readonly kind: "translated";
    readonly device: number;
    readonly wait: number;
    readonly error: ErrorMessage | null;
  }
  /** The device's end. */
  | { readonly kind: "leave"; readonly call: number; readonly device: number }
  | { readonly kind: "end" };

/** How a call has ended. */
export interface Answer {
  readonly error: ErrorMessage | null;
  /** Of a stop: where the queue stopped. */
  readonly base: number;
  /** Of a stop: see `Queue.leftInFlight`. */
  readonly leftInFlight: number;
  /** No view of the device's memory is left in the Worker. */
  readonly isDetached: boolean;
}

/** From a Worker. */
export type FromWorker =
  | { readonly kind: "ready" }
  | { readonly kind: "answer"; readonly call: number; readonly answer: Answer }
  | {
    readonly kind: "fail";
    readonly run: number;
    readonly reason: string;
    readonly cause: ErrorMessage | undefined;
  }
  | { readonly kind: "call"; readonly run: number }
  /** The queue waits for the IOTLB; a kick says that it has come. */
  | {
    readonly kind: "missed";
    readonly run: number;
    readonly misses: readonly IotlbMiss[];
  }
  /** The device waits for a translation, for the sake of a run or of none. */
  | {
    readonly kind: "translate";
    readonly device: number;
    readonly wait: number;
    readonly run: number | null;
    readonly iova: bigint;
    readonly access: Access;
  }
  | { readonly kind: "configChanged"; readonly device: number }
  | {
    readonly kind: "report";
    readonly device: number;
    readonly error: ErrorMessage;
  }
  /** What nobody caught; the Worker ends. */
  | { readonly kind: "died"; readonly error: ErrorMessage }
  | { readonly kind: "ended" };
