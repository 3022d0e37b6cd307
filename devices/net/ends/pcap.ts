/**
 * A capture of what goes over a cable, in the format that Wireshark and
 * tcpdump read (draft-ietf-opsawg-pcap), with nanoseconds.
 *
 * @module
 */

import { closeSync, openSync, writeSync } from "node:fs";
import { Vhost2Error } from "../../../ffi/errors.ts";
import type { Frames } from "../frames.ts";
import type { EndPort, NetEnd, NetLink } from "./end.ts";

const magicNanoseconds = 0xa1b23c4d;
const linkTypeEthernet = 1;
const fileHeaderBytes = 24;
const recordHeaderBytes = 16;

/** What is captured, and where to. */
export interface PcapOptions {
  /** The file; one that is there is overwritten. */
  readonly path: string;
  /** Bytes kept of a frame; all (262144) unless given. */
  readonly snapLength?: number;
}

class PcapFile {
  readonly #path: string;
  readonly #snapLength: number;
  #fd: number;
  #buffer = new Uint8Array(64 << 10);
  #view = new DataView(this.#buffer.buffer);

  constructor({ path, snapLength = 262_144 }: PcapOptions) {
    if (
      !Number.isInteger(snapLength) || snapLength < 1 || snapLength > 262_144
    ) {
      throw new Vhost2Error(
        "OPTION",
        `Cannot use snapLength: ${snapLength} (a whole number from 1 to 262144)`,
      );
    }
    this.#path = path;
    this.#snapLength = snapLength;
    try {
      this.#fd = openSync(path, "w");
    } catch (cause) {
      throw new Vhost2Error(
        "OPTION",
        `Cannot write ${path}: ${(cause as NodeJS.ErrnoException).code}`,
        { cause },
      );
    }
    const view = this.#view;
    view.setUint32(0, magicNanoseconds, true);
    view.setUint16(4, 2, true);
    view.setUint16(6, 4, true);
    view.setUint32(16, snapLength, true);
    view.setUint32(20, linkTypeEthernet, true);
    this.#write(fileHeaderBytes);
  }

  /** Frames `first` to `first + count`, seen now; throws when it cannot. */
  add(frames: Frames, first: number, count: number): void {
    if (this.#fd < 0) return;
    const now = performance.timeOrigin + performance.now();
    const seconds = Math.floor(now / 1000);
    const nanoseconds = Math.floor((now - seconds * 1000) * 1e6);
    let at = 0;
    for (let i = first; i < first + count; i++) {
      const length = frames.length(i);
      const kept = Math.min(length, this.#snapLength);
      if (at + recordHeaderBytes + kept > this.#buffer.length) {
        this.#write(at);
        at = 0;
        this.#reserve(recordHeaderBytes + kept);
      }
      const view = this.#view;
      view.setUint32(at, seconds, true);
      view.setUint32(at + 4, nanoseconds, true);
      view.setUint32(at + 8, kept, true);
      view.setUint32(at + 12, length, true);
      at += recordHeaderBytes;
      const offset = frames.offset(i);
      this.#buffer.set(frames.bytes.subarray(offset, offset + kept), at);
      at += kept;
    }
    this.#write(at);
  }

  #reserve(size: number): void {
    if (size <= this.#buffer.length) return;
    this.#buffer = new Uint8Array(size);
    this.#view = new DataView(this.#buffer.buffer);
  }

  #write(size: number): void {
    try {
      for (let done = 0; done < size;) {
        done += writeSync(this.#fd, this.#buffer, done, size - done);
      }
    } catch (cause) {
      this.close();
      throw new Vhost2Error(
        "OP",
        `Cannot go on with the capture in ${this.#path}: ${
          (cause as NodeJS.ErrnoException).code
        }`,
        { cause },
      );
    }
  }

  close(): void {
    if (this.#fd >= 0) closeSync(this.#fd);
    this.#fd = -1;
  }
}

/**
 * `end`, with all frames that pass it both ways written to a file, those that
 * the guest has no buffer for excepted. Frames look as they do on the way: long
 * before they are segmented, with partial checksums where those are offloaded.
 *
 * @throws Vhost2Error OPTION when the file cannot be written
 *
 * @example
 * ```ts
 * import { echoEnd, netDevice, pcapTap } from "vhost2";
 * const path = `${Deno.makeTempDirSync()}/echo.pcap`;
 * await using nic = netDevice({ end: pcapTap(echoEnd(), { path }) });
 * if (nic.statistics.snapshot().toGuest.packets !== 0) throw new Error(path);
 * ```
 */
export function pcapTap(end: NetEnd, options: PcapOptions): NetEnd {
  const file = new PcapFile(options);
  const open = (link: NetLink): EndPort => {
    const capture = (frames: Frames, first: number, count: number) => {
      try {
        file.add(frames, first, count);
      } catch (error) {
        // The network is worth more than its record.
        link.report(error as Vhost2Error);
      }
    };
    const port = end.open({
      get name() {
        return link.name;
      },
      get pairCount() {
        return link.pairCount;
      },
      get guestOffloads() {
        return link.guestOffloads;
      },
      send(frames, pair, first = 0, count = frames.count - first) {
        const sent = link.send(frames, pair, first, count);
        if (sent > 0) capture(frames, first, sent);
        return sent;
      },
      drop: (pair, count) => link.drop(pair, count),
      lose: (pair, count) => link.lose(pair, count),
      receive(frames, pair) {
        const count = link.receive(frames, pair);
        if (count > 0) capture(frames, 0, count);
        return count;
      },
      wantWake: (pair) => link.wantWake(pair),
      resume: () => link.resume(),
      setLink: (isUp) => link.setLink(isUp),
      report: (error) => link.report(error),
    });
    const wrapped: EndPort = {
      isCongested: () => port.isCongested?.() ?? false,
      ready: (pair) => port.ready?.(pair),
      wake: (pair) => port.wake?.(pair),
      negotiated: () => port.negotiated?.(),
      close: () => port.close(),
    };
    if (port.receive !== undefined) {
      wrapped.receive = (frames, pair) => {
        capture(frames, 0, frames.count);
        port.receive!(frames, pair);
      };
    }
    return wrapped;
  };
  return {
    name: end.name,
    offloads: end.offloads,
    open,
    async close() {
      await end.close();
      file.close();
    },
  };
}
