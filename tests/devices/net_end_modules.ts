/** Ends that Workers make, for tests. */

import { threadId } from "node:worker_threads";
import {
  type BurstEnd,
  burstEnd,
  endFactory,
  type EndModule,
  Frames,
  type NetEnd,
  NetHeader,
  streamEnd,
} from "../../mod.ts";
import { NetHeaderFlag } from "../../frontend/mod.ts";
import { allOffloads } from "./net_lies.ts";

/** One of the ends here. */
export function endModule(
  name: string,
  options?: unknown,
  offloads = 0,
): EndModule {
  return { module: import.meta.url, name, options, offloads };
}

/** What the tests share with the ends of `witness`. */
export const Word = {
  /** Ends made, and closed. */
  made: 0,
  closed: 1,
  /** Frames seen. */
  frames: 2,
  /** A test's order: each end that gets a frame pulls the cable. */
  pullsCable: 3,
  /** Last byte of the source of the last RARP seen. */
  announced: 4,
  /** By queue pair: the thread that got its frames. */
  threads: 8,
  byteSize: 64,
} as const;

/** Sends each frame back, and tells who it was. */
export const witness = endFactory((shared: SharedArrayBuffer): NetEnd => {
  const words = new Int32Array(shared);
  Atomics.add(words, Word.made, 1);
  return {
    name: "witness",
    offloads: 0,
    endsByEvents: true,
    open: (link) => ({
      receive(frames, pair) {
        Atomics.add(words, Word.frames, frames.count);
        Atomics.store(words, Word.threads + pair, threadId);
        const first = frames.at(0);
        if (first[12] === 0x80 && first[13] === 0x35) {
          Atomics.store(words, Word.announced, first[11]);
          return;
        }
        if (Atomics.load(words, Word.pullsCable) !== 0) link.setLink(false);
        link.send(frames, pair);
      },
      close() {},
    }),
    close() {
      Atomics.add(words, Word.closed, 1);
    },
  };
});

async function turnRound(end: BurstEnd): Promise<void> {
  const frames = new Frames();
  for (;;) {
    let count = 0;
    for (let pair = 0; pair < end.pairCount; pair++) {
      while (end.receive(frames, pair) > 0) {
        count += frames.count;
        for (let i = 0; i < frames.count; i++) frames.at(i)[13] ^= 0xff;
        for (let sent = 0; sent < frames.count;) {
          const taken = end.send(frames, pair, sent);
          sent += taken;
          if (taken === 0) await new Promise((resolve) => setTimeout(resolve));
        }
      }
    }
    if (count === 0) await end.whenReadable();
  }
}

/** Fetches bursts and sends them back with a byte turned round. */
export const bursts = endFactory(() => {
  const end = burstEnd();
  turnRound(end);
  return end;
});

/** Web Streams: what is written is read, with the same byte turned round. */
export const streams = endFactory(() =>
  streamEnd(
    new TransformStream<Uint8Array<ArrayBuffer>, Uint8Array<ArrayBuffer>>({
      transform(frame, controller) {
        frame[13] ^= 0xff;
        controller.enqueue(frame);
      },
    }),
  )
);

/** Kills its Worker when a frame begins with 0xee. */
export const fragile = endFactory((): NetEnd => ({
  name: "fragile",
  offloads: 0,
  endsByEvents: true,
  open: (link) => ({
    receive(frames, pair) {
      if (frames.at(0)[0] === 0xee) {
        setTimeout(() => {
          throw new RangeError("nobody catches this");
        });
      }
      link.send(frames, pair);
    },
    close() {},
  }),
  close() {},
}));

/** Words of `inspector`. */
export const Inspected = {
  frames: 0,
  /** Headers that no end may ever see. */
  lies: 1,
  byteSize: 8,
} as const;

function isTrue(frames: Frames, i: number): boolean {
  const { buffer, byteOffset } = frames.header(i);
  const view = new DataView(buffer, byteOffset, NetHeader.byteSize);
  const flags = view.getUint8(NetHeader.flags);
  const gsoType = view.getUint8(NetHeader.gso_type);
  if (flags === 0) return gsoType === 0;
  const start = view.getUint16(NetHeader.csum_start, true);
  const field = start + view.getUint16(NetHeader.csum_offset, true);
  return flags === NetHeaderFlag.NEEDS_CSUM && start >= 14 &&
    field + 2 <= frames.length(i) &&
    (gsoType === 0 || view.getUint16(NetHeader.gso_size, true) > 0);
}

/** Looks at headers: takes whatever a guest may leave to others. */
export const inspector = endFactory((shared: SharedArrayBuffer): NetEnd => {
  const words = new Int32Array(shared);
  return {
    name: "inspector",
    offloads: allOffloads,
    endsByEvents: true,
    open: () => ({
      receive(frames) {
        for (let i = 0; i < frames.count; i++) {
          if (!isTrue(frames, i)) Atomics.add(words, Inspected.lies, 1);
        }
        Atomics.add(words, Inspected.frames, frames.count);
      },
      close() {},
    }),
    close() {},
  };
});
