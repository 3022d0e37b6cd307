/**
 * One request as an object: views of guest memory, and a completion at any
 * later time.
 *
 * @module
 */

import { RequestWord, SegmentWord } from "./batch.ts";
import type { Virtqueue } from "./virtqueue.ts";

/**
 * A request of the driver's. The views are guest memory: the guest may change
 * them at any time, so read each field once, or take `read()`, which copies.
 */
export class Request {
  /** The descriptor chain's head, which names the request. */
  readonly head: number;
  /** The header, copied, when the queue was set up with `headerBytes`. */
  readonly header: Uint8Array<ArrayBuffer>;
  /** What the driver gives, in order. */
  readonly readable: readonly Uint8Array<ArrayBuffer>[];
  /** Where the device may write, in order. */
  readonly writable: readonly Uint8Array<ArrayBuffer>[];
  /** Bytes in `readable`. */
  readonly readableBytes: number;
  /** Bytes in `writable`. */
  readonly writableBytes: number;
  readonly #virtqueue: Virtqueue;
  #isOpen = true;

  /** Of record `i` in the virtqueue's batch. */
  constructor(virtqueue: Virtqueue, i: number) {
    const { batch } = virtqueue;
    const { words } = batch;
    const at = i * batch.stride;
    const { views } = virtqueue.queue.memory;
    const segments = (first: number, count: number) => {
      const list: Uint8Array<ArrayBuffer>[] = [];
      for (let j = first; j < first + count; j++) {
        const word = batch.segments + j * SegmentWord.count;
        const offset = words[word + SegmentWord.offset];
        const view = views[words[word + SegmentWord.view]]!;
        list.push(
          view.subarray(offset, offset + words[word + SegmentWord.length]),
        );
      }
      return list;
    };
    const first = words[at + RequestWord.segmentFirst];
    const readableCount = words[at + RequestWord.readableCount];
    this.#virtqueue = virtqueue;
    this.head = words[at + RequestWord.head];
    this.header = batch.header(i);
    this.readable = segments(first, readableCount);
    this.writable = segments(
      first + readableCount,
      words[at + RequestWord.writableCount],
    );
    this.readableBytes = words[at + RequestWord.readableBytes];
    this.writableBytes = words[at + RequestWord.writableBytes];
  }

  /** Aborted when the queue stops and waits no longer for this request. */
  get signal(): AbortSignal {
    return this.#virtqueue.signal;
  }

  /** A copy of all readable bytes: the guest cannot change it any more. */
  read(): Uint8Array<ArrayBuffer> {
    const copy = new Uint8Array(this.readableBytes);
    let position = 0;
    for (const view of this.readable) {
      copy.set(view, position);
      position += view.length;
    }
    return copy;
  }

  /**
   * Writes `bytes` into the writable views, from `offset` on.
   *
   * @returns how many bytes there was room for
   */
  write(bytes: Uint8Array, offset = 0): number {
    let skip = offset;
    let done = 0;
    for (const view of this.writable) {
      if (skip >= view.length) {
        skip -= view.length;
        continue;
      }
      const part = bytes.subarray(done, done + view.length - skip);
      view.set(part, skip);
      skip = 0;
      done += part.length;
      if (done === bytes.length) break;
    }
    return done;
  }

  /**
   * Returns the request to the driver, from any code at any time, once.
   *
   * @param written bytes written, counted from the start of `writable`
   * @returns false when it was completed before or the queue has stopped
   */
  complete(written = 0): boolean {
    if (!this.#isOpen) return false;
    this.#isOpen = false;
    return this.#virtqueue.complete(this.head, written);
  }
}
