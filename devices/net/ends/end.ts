/**
 * What is behind a network device: where a guest's frames go, and where those
 * for it come from. An end is shared by all front-ends of a device, and gives
 * each a port.
 *
 * @module
 */

import { constants } from "../../../ffi/abi.gen.ts";
import type { Vhost2Error } from "../../../ffi/errors.ts";
import type { Frames } from "../frames.ts";

/**
 * What the sender of a frame may leave to its receiver. A mask of these says
 * what an end, or a guest, takes; the segmentations need `checksum` too.
 */
export const Offload = {
  /** The checksum of TCP or UDP: partial, as `virtio_net_hdr` says. */
  checksum: constants.netOffloadChecksum,
  /** TCP over IPv4 in one long frame, to be cut into segments. */
  tso4: constants.netOffloadTso4,
  tso6: constants.netOffloadTso6,
  /** Such TCP with congestion marks. */
  ecn: constants.netOffloadEcn,
  /** UDP datagrams, to be fragmented by IP. */
  ufo: constants.netOffloadUfo,
  /** UDP datagrams in one long frame, to be cut into datagrams. */
  uso: constants.netOffloadUso,
} as const;

/** One front-end's device, as its end sees it. */
export interface NetLink {
  /** For people: the connection's name. */
  readonly name: string;
  /** Queue pairs at most. */
  readonly pairCount: number;
  /** Those from 0 on that the guest uses: all unless it says otherwise. */
  readonly pairsInUse: number;
  /** `Offload` bits that the guest takes now; others are done for it. */
  readonly guestOffloads: number;
  /**
   * Puts frames into the guest's receive buffers, those of queue pair `pair`
   * or, if that is not in use, of another. A frame that the guest cannot take
   * counts as sent and as dropped. Partial checksums that the guest does not
   * complete are completed in `frames`.
   *
   * @returns how many from `first` on are done with: fewer than `count` when
   * buffers are lacking (`ready` tells when they come)
   */
  send(frames: Frames, pair: number, first?: number, count?: number): number;
  /**
   * Counts frames of the end's that no buffer was there for, and that it does
   * not keep.
   */
  drop(pair: number, count: number): void;
  /** Counts frames of the guest's that the end could not pass on. */
  lose(pair: number, count: number): void;
  /**
   * For ends that fetch: takes frames out of the guest's transmit queue.
   *
   * @returns how many are in `frames`; 0 when the queue is empty
   */
  receive(frames: Frames, pair: number): number;
  /**
   * For ends that fetch: `wake` is to be called when the guest's transmit
   * queue is no longer empty.
   *
   * @returns false when there is something to fetch already
   */
  wantWake(pair: number): boolean;
  /** The port takes frames again after `isCongested`. */
  resume(): void;
  /** The link is up or down: what the guest sees as its cable. */
  setLink(isUp: boolean): void;
  /** Something went wrong that is not the guest's fault. */
  report(error: Vhost2Error): void;
}

/** One front-end's place at an end. Nothing here may throw. */
export interface EndPort {
  /**
   * Frames `0` to `frames.count` came from the guest, on queue pair `pair`.
   * They are gone when this returns: what is needed longer must be copied.
   * Without it the end fetches them: `NetLink.receive`.
   */
  receive?(frames: Frames, pair: number): void;
  /** Asked before each burst: true while the guest's frames have to wait. */
  isCongested?(): boolean;
  /**
   * The guest's receive queue of a pair has started, or has buffers again after
   * a `send` that lacked some.
   */
  ready?(pair: number): void;
  /** It takes no frames any more, until the next `ready`. */
  unready?(pair: number): void;
  /** `NetLink.pairsInUse` has changed. Called in one isolate only. */
  usePairs?(): void;
  /** See `NetLink.wantWake`. */
  wake?(pair: number): void;
  /** Features are negotiated: `NetLink.guestOffloads` is right from now on. */
  negotiated?(): void;
  /** The front-end has gone: the link is of no more use. */
  close(): void;
}

/** An end on its way to a Worker: what `NetEnd.toPortable` gives. */
export type PortableEnd =
  | { readonly kind: "echo" | "discard" }
  | {
    readonly kind: "tap";
    readonly name: string;
    /** The queues of the interface: the registering thread's. */
    readonly fds: readonly number[];
  }
  | {
    readonly kind: "pcap";
    readonly capture: PortableCapture;
    readonly end: PortableEnd;
  };

/** The file of a capture on its way to a Worker. */
export interface PortableCapture {
  /** Absolute. */
  readonly path: string;
  readonly snapLength: number;
  /** Where the writers of the file meet. */
  readonly shared: SharedArrayBuffer;
}

/** The other end of a network device's cable. */
export interface NetEnd {
  /** For people: "echo", or the interface's name. */
  readonly name: string;
  /** `Offload` bits of frames that it takes, and may send. */
  readonly offloads: number;
  /**
   * Whether all that its ports do is caused by frames and by events of
   * descriptors: a Worker may then sleep until those come. Unless true, an end
   * is taken to wait for JavaScript: a timer, a promise, a stream.
   */
  readonly endsByEvents?: boolean;
  /**
   * What a Worker makes the same end of. Without it the end belongs to its
   * isolate, and its device is served there.
   */
  toPortable?(): PortableEnd;
  /**
   * A front-end has connected. In Workers each makes an end of its own, and
   * opens it for each front-end that it serves queues of; a front-end's queue
   * pair is in one Worker.
   *
   * @throws Vhost2Error IN_USE when the end has no port for it
   */
  open(link: NetLink): EndPort;
  /** After the last port was closed. */
  close(): void | Promise<void>;
}
