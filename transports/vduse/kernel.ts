/**
 * What the transport needs of the kernel's VDUSE: a small interface, so that
 * its tests run against a model. `linux.ts` is the real one.
 *
 * @module
 */

/** A device as it is created. */
export interface VduseDescription {
  /** virtio's number of the kind of device. */
  readonly deviceId: number;
  /** Virtio features that the kernel's driver is offered. */
  readonly features: bigint;
  readonly queueCount: number;
  /** The most descriptors that a queue may have. */
  readonly queueSize: number;
  readonly config: Uint8Array;
}

/** A queue as the kernel's driver has set it up. */
export interface VduseQueueInfo {
  /** IOVAs of the three areas. */
  readonly descriptor: bigint;
  readonly driver: bigint;
  readonly device: bigint;
  readonly size: number;
  /** Where it began, as in SET_VRING_BASE: the kernel does not follow it. */
  readonly base: number;
  readonly isReady: boolean;
}

/** A message of the kernel's, which waits for the answer. */
export type VduseRequest =
  & { readonly id: number }
  & (
    | { readonly kind: "getQueueState"; readonly queue: number }
    /** 0 is a reset. */
    | { readonly kind: "setStatus"; readonly status: number }
    /** `last` is inclusive. */
    | {
      readonly kind: "updateIotlb";
      readonly start: bigint;
      readonly last: bigint;
    }
    /** Of a newer kernel. */
    | { readonly kind: "unknown"; readonly number: number }
  );

/** The answer: whether it was done, and for `getQueueState` where it is. */
export interface VduseResponse {
  readonly id: number;
  readonly isFailed?: boolean;
  readonly state?: {
    readonly queue: number;
    readonly base: number;
    readonly isPacked: boolean;
  };
}

/** An entry of the kernel's IOTLB, and its file. */
export interface VduseEntry {
  readonly start: bigint;
  /** Inclusive. */
  readonly last: bigint;
  /** Bytes from the start of the file to `start`. */
  readonly offset: bigint;
  /** 1 read, 2 write, 3 both; whatever the kernel says. */
  readonly access: number;
  /** The kernel's own memory (rings and bounce buffers of its driver). */
  readonly isDomain: boolean;
  /** The caller's. */
  readonly fd: number;
}

/** What a `VduseDevice` throws: it is broken for good, or gone; the reason. */
export class BrokenVduseDevice extends Error {}

/** An open device. Methods throw `BrokenVduseDevice` once it is broken. */
export interface VduseDevice {
  /** Calls `handler` when there may be messages, or it has broken. */
  watch(handler: () => void): () => void;
  /** The next message; null when there is none now. */
  receive(): VduseRequest | null;
  /** False when the kernel does not wait for it any more. */
  respond(response: VduseResponse): boolean;
  /** Features that the driver has accepted. */
  features(): bigint;
  /** Null where there is no such queue. */
  queueInfo(index: number, isPacked: boolean): VduseQueueInfo | null;
  setUpQueue(index: number, size: number): void;
  /** The kernel signals the eventfd `fd` at each kick; -1 ends that. */
  setKick(index: number, fd: number): void;
  /** Interrupts the driver; false while the kernel has not seen DRIVER_OK. */
  inject(index: number): boolean;
  /** The same, for the configuration. */
  injectConfig(): boolean;
  setConfig(config: Uint8Array): void;
  /** The first entry that overlaps the range; null where there is none. */
  entry(start: bigint, last: bigint): VduseEntry | null;
  /**
   * Maps a part of the kernel's own memory, by its file; the address, whose
   * mapping is ended by `core.unmap`.
   */
  map(fd: number, offset: bigint, size: number): bigint;
  /** Another process can open it then; unanswered messages wait for that. */
  close(): void;
}

/** All methods throw Vhost2Error, with what is missing. */
export interface VduseKernel {
  /** Null when there is no such device. */
  open(name: string): VduseDevice | null;
  create(name: string, description: VduseDescription): void;
  /** False while it is attached or open. */
  destroy(name: string): boolean;
  /** Puts it on the vDPA bus, where the kernel's driver takes it. */
  attach(name: string): Promise<void>;
  /** Fulfilled when the driver has let go of it. */
  detach(name: string): Promise<void>;
  /** Whether it is on the vDPA bus. */
  isAttached(name: string): boolean;
  /** The driver that has it there; null for none. */
  driverOf(name: string): string | null;
}
