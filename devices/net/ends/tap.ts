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
    return this.#done === count;
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
    this.#isOpen = false;
    deactivate(this);
    this.#watch.close();
  }
}

class TapPort implements EndPort {
  readonly #link: NetLink;
  readonly #fds: readonly number[];
  readonly #readers: TapReader[];
  readonly #closed: () => void;

  constructor(link: NetLink, fds: readonly number[], closed: () => void) {
    this.#link = link;
    this.#fds = fds;
    this.#closed = closed;
    this.#readers = fds.map((fd, pair) => new TapReader(fd, link, pair));
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
    const written = core.tapWrite(
      this.#fds[pair % this.#fds.length],
      frames.words,
      0,
      count,
      frames.bytes,
      frames.bytes.length,
      droppedOut,
    );
    const lost = written < 0 ? count : count - written + droppedOut[0];
    if (lost > 0) this.#link.lose(pair, lost);
  }

  ready(): void {
    for (const reader of this.#readers) reader.wake();
  }

  close(): void {
    for (const reader of this.#readers) reader.close();
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
  const { numQueues = 1 } = options;
  if (!Number.isInteger(numQueues) || numQueues < 1 || numQueues > 127) {
    throw new Vhost2Error(
      "OPTION",
      `Cannot use numQueues: ${numQueues} (a whole number from 1 to 127)`,
    );
  }
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
    }
  } catch (error) {
    close();
    throw error;
  }
  let hasPort = false;
  return {
    name,
    offloads,
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
