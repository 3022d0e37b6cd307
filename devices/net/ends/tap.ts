/**
 * A TAP interface of the host's kernel as an end: guests are on the host's
 * network, with checksums and segmentation left to whoever is further down.
 *
 * @module
 */

import { core } from "../../../ffi/core.ts";
import { check, Errno, errnoName, Vhost2Error } from "../../../ffi/errors.ts";
import { eventLoop, type Watch } from "../../../ffi/event_loop.ts";
import { activate, deactivate, type Turn } from "../../../virtqueue/poller.ts";
import { requireInteger } from "../../limits.ts";
import { Frames } from "../frames.ts";
import { type EndPort, type NetEnd, type NetLink, Offload } from "./end.ts";

/** The kernel takes all of them; UFO only as what older guests send. */
const offloads = Offload.checksum | Offload.tso4 | Offload.tso6 | Offload.ecn;

/** Which interface. */
export interface TapOptions {
  /**
   * Its name. One that is not there is made, and goes with the end; in it `%d`
   * is a number of the kernel's.
   */
  readonly name: string;
  /** Queues of the interface, one per queue pair; 1 unless given. */
  readonly numQueues?: number;
}

/** IFNAMSIZ. */
const nameBytes = 16;
const droppedOut = new Uint32Array(1);
/** Bursts per turn of the event loop. */
const burstsPerTurn = 4;
/** What is read at once: a few long frames or many short ones. */
const burstFrames = 64;

function openQueue(
  name: string,
  isMultiQueue: boolean,
): { fd: number; name: string } {
  const bytes = new TextEncoder().encode(name);
  const out = new Uint8Array(nameBytes);
  const fd = core.tapOpen(bytes, bytes.length, 0, isMultiQueue ? 1 : 0, out);
  if (fd >= 0) {
    const end = out.indexOf(0);
    return { fd, name: new TextDecoder().decode(out.subarray(0, end)) };
  }
  const reasons: Record<number, string> = {
    [Errno.ENOENT]: "this system has no /dev/net/tun",
    1: "that needs CAP_NET_ADMIN, or an interface that was made for this user",
    [Errno.EBUSY]: "the interface is in use",
    [Errno.EINVAL]:
      "the interface is of another kind, or has another number of queues",
    36: `the name is longer than ${nameBytes - 1} bytes`,
  };
  throw new Vhost2Error(
    "OPTION",
    `Cannot open TAP interface "${name}": ${reasons[-fd] ?? errnoName(-fd)}`,
    { errno: -fd },
  );
}

/** EBADFD: a queue that is not attached takes and gives no frames. */
const notAttached = -77;

/** What comes from one queue of the interface. */
class TapReader implements Turn {
  /** The kernel wakes us. */
  readonly pollMicroseconds = 0;
  readonly #fd: number;
  readonly #link: NetLink;
  readonly #pair: number;
  readonly #frames = new Frames(burstFrames, 512 << 10);
  readonly #watch: Watch;
  /** The guest has taken so many of `#frames`. */
  #done = 0;
  #isWaiting = false;
  #isOpen = true;

  constructor(fd: number, link: NetLink, pair: number) {
    this.#fd = fd;
    this.#link = link;
    this.#pair = pair;
    this.#watch = eventLoop.watch(fd, () => this.wake());
  }

  /** There may be frames, or buffers for them. */
  wake(): void {
    if (this.#isOpen) activate(this);
  }

  turn(): boolean {
    let isAny = false;
    for (let burst = 0; burst < burstsPerTurn; burst++) {
      if (!this.#flush()) break;
      if (this.#read() === 0) break;
      isAny = true;
    }
    return isAny;
  }

  /** Nothing was left to read, or nobody to take it: `wake` tells of more. */
  rest(): boolean {
    return true;
  }

  #read(): number {
    const frames = this.#frames;
    const count = core.tapRead(
      this.#fd,
      frames.words,
      frames.maxFrames,
      frames.bytes,
      frames.bytes.length,
    );
    this.#done = 0;
    frames.count = Math.max(0, count);
    if (count < 0) this.#broken(count);
    return frames.count;
  }

  /** Gives the guest what was read; whether that was all. */
  #flush(): boolean {
    const { count } = this.#frames;
    if (this.#done === count) return true;
    this.#done += this.#link.send(this.#frames, this.#pair, this.#done);
    // The guest has given the pair up since: nobody will take the rest.
    if (this.#pair >= this.#link.pairsInUse) this.#drop();
    return this.#done === count;
  }

  #drop(): void {
    const { count } = this.#frames;
    if (this.#done < count) this.#link.drop(this.#pair, count - this.#done);
    this.#done = count;
  }

  #broken(errno: number): void {
    // EIO: the interface is down, and comes up without a word to us.
    if (-errno === 5 || this.#isWaiting) return;
    this.#isWaiting = true;
    this.#link.report(
      new Vhost2Error(
        "SYSTEM",
        `Cannot read the TAP interface of ${this.#link.name}: ${
          errnoName(-errno)
        }`,
        { errno: -errno },
      ),
    );
  }

  close(): void {
    if (this.#isOpen) this.#flush();
    this.#isOpen = false;
    this.#drop();
    deactivate(this);
    this.#watch.close();
  }
}

class TapPort implements EndPort {
  readonly #link: NetLink;
  readonly #fds: readonly number[];
  /** Of the pairs whose receive queues are here and have started. */
  readonly #readers = new Map<number, TapReader>();
  readonly #closed: () => void;

  constructor(link: NetLink, fds: readonly number[], closed: () => void) {
    this.#link = link;
    this.#fds = fds;
    this.#closed = closed;
  }

  negotiated(): void {
    // The kernel does for a guest what it does not do itself.
    const mask = this.#link.guestOffloads & offloads;
    check(
      core.tapSetOffloads(this.#fds[0], mask),
      "Cannot set the offloads of the TAP interface",
    );
  }

  receive(frames: Frames, pair: number): void {
    const { count } = frames;
    let written = this.#write(frames, this.#fds[pair % this.#fds.length]);
    // The guest sends on a pair by which it does not receive.
    if (written === notAttached) written = this.#write(frames, this.#fds[0]);
    const lost = written < 0 ? count : count - written + droppedOut[0];
    if (lost > 0) this.#link.lose(pair, lost);
  }

  #write(frames: Frames, fd: number): number {
    return core.tapWrite(
      fd,
      frames.words,
      0,
      frames.count,
      frames.bytes,
      frames.bytes.length,
      droppedOut,
    );
  }

  ready(pair: number): void {
    const fd = this.#fds[pair];
    if (fd !== undefined && !this.#readers.has(pair)) {
      this.#attach(pair, pair < this.#link.pairsInUse);
      this.#readers.set(pair, new TapReader(fd, this.#link, pair));
    }
    // One pair takes what comes for another that has stopped.
    for (const reader of this.#readers.values()) reader.wake();
  }

  unready(pair: number): void {
    // There is always one queue to which frames come: they wait there.
    if (pair === 0) return;
    this.#attach(pair, false);
    this.#readers.get(pair)?.close();
    this.#readers.delete(pair);
  }

  usePairs(): void {
    // Those of other Workers too: their queues are this process's.
    for (let pair = 1; pair < this.#fds.length; pair++) {
      this.#attach(pair, pair < this.#link.pairsInUse);
    }
  }

  /** Whether the kernel sends frames to a queue; to the first it always does. */
  #attach(queue: number, isWanted: boolean): void {
    if (queue === 0 || queue >= this.#fds.length) return;
    const errno = -core.tapAttachQueue(this.#fds[queue], isWanted ? 1 : 0);
    if (errno <= 0) return;
    this.#link.report(
      new Vhost2Error(
        "SYSTEM",
        `Cannot ${
          isWanted ? "attach" : "detach"
        } queue ${queue} of the TAP interface of ${this.#link.name}: ${
          errnoName(errno)
        }`,
        { errno },
      ),
    );
  }

  close(): void {
    for (const reader of this.#readers.values()) reader.close();
    this.#readers.clear();
    // A Worker that has died could not.
    for (let pair = 1; pair < this.#fds.length; pair++) {
      this.#attach(pair, false);
    }
    this.#closed();
  }
}

/**
 * A TAP interface, for one front-end at a time. It needs CAP_NET_ADMIN, or an
 * interface made for this user (`ip tuntap add mode tap user ...`); address and
 * state are the administrator's business (`ip link set ... up`).
 *
 * @throws Vhost2Error OPTION when there can be no such interface
 */
export function tapEnd(options: TapOptions): NetEnd {
  const numQueues = requireInteger("numQueues", options.numQueues ?? 1, 1, 127);
  const fds: number[] = [];
  const close = () => {
    for (const fd of fds.splice(0)) core.descriptorClose(fd);
  };
  let { name } = options;
  try {
    for (let queue = 0; queue < numQueues; queue++) {
      const opened = openQueue(name, numQueues > 1);
      fds.push(opened.fd);
      name = opened.name;
      // Frames come to those by which a guest receives.
      if (queue > 0) {
        check(
          core.tapAttachQueue(opened.fd, 0),
          `Cannot detach a queue of TAP interface "${name}"`,
        );
      }
    }
  } catch (error) {
    close();
    throw error;
  }
  return endOver(name, fds, close);
}

/** In a Worker: over queues that another isolate has opened. */
export function sharedTapEnd(name: string, fds: readonly number[]): NetEnd {
  return endOver(name, fds, () => {});
}

function endOver(
  name: string,
  fds: readonly number[],
  close: () => void,
): NetEnd {
  let hasPort = false;
  return {
    name,
    offloads,
    endsByEvents: true,
    toPortable: () => ({ kind: "tap", name, fds }),
    open(link) {
      if (hasPort) {
        throw new Vhost2Error(
          "IN_USE",
          `Cannot connect ${link.name}: the TAP interface ${name} has a front-end`,
        );
      }
      hasPort = true;
      return new TapPort(link, fds, () => hasPort = false);
    },
    close,
  };
}
