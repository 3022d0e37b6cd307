/**
 * A capture of what goes over a cable, in the format that Wireshark and
 * tcpdump read (draft-ietf-opsawg-pcap), with nanoseconds.
 *
 * @module
 */

import { resolve } from "node:path";
import type { Vhost2Error } from "../../../ffi/errors.ts";
import type { Frames } from "../frames.ts";
import type { EndPort, NetEnd, NetLink } from "./end.ts";
import { PcapFile } from "./pcap_file.ts";

/** What is captured, and where to. */
export interface PcapOptions {
  /** The file; one that is there is overwritten. */
  readonly path: string;
  /** Bytes kept of a frame; all (262144) unless given. */
  readonly snapLength?: number;
}

/**
 * `end`, with all frames that pass it both ways written to a file, those that
 * the guest has no buffer for excepted. Frames look as they do on the way: long
 * before they are segmented, with partial checksums where those are offloaded.
 * Workers write the same file: records are whole, and in the order of their
 * times.
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
  const { path, snapLength = 262_144 } = options;
  return capturing(end, PcapFile.create(resolve(path), snapLength));
}

/** `end` with a capture in a file that is open. */
export function capturing(end: NetEnd, file: PcapFile): NetEnd {
  const wrapped: NetEnd = {
    name: end.name,
    offloads: end.offloads,
    endsByEvents: end.endsByEvents,
    open: (link) => openPort(end, file, link),
    async close() {
      await end.close();
      file.close();
    },
  };
  if (end.toPortable === undefined) return wrapped;
  return {
    ...wrapped,
    toPortable: () => ({
      kind: "pcap",
      capture: file.portable,
      end: end.toPortable!(),
    }),
  };
}

function openPort(end: NetEnd, file: PcapFile, link: NetLink): EndPort {
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
    get pairsInUse() {
      return link.pairsInUse;
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
    unready: (pair) => port.unready?.(pair),
    usePairs: () => port.usePairs?.(),
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
}
