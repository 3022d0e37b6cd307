/**
 * Work on a memory disk that is too long for one turn of the event loop, done
 * in slices: a guest that asks for gigabytes at once waits for them, and
 * nobody else does.
 *
 * @module
 */

import { SegmentWord } from "../../../virtqueue/mod.ts";
import type { BackingClient } from "./backing.ts";
import { Status } from "./backing.ts";
import { Copies } from "./copies.ts";

/** A request of more bytes is done in slices. */
export const largeBytes: number = 256 << 10;
/** Bytes per turn of the event loop. */
const sliceBytes = 4 << 20;

/** A stretch of one request: a copy, or zeroing where there is no segment. */
interface Piece {
  readonly view: number;
  readonly offset: number;
  readonly length: number;
  readonly position: number;
}

interface Work {
  readonly head: number;
  readonly access: number;
  readonly pieces: Piece[];
  /** Bytes done of the first piece. */
  done: number;
}

/** What the slices are cut from. */
export interface SliceStorage {
  readonly bytes: Uint8Array<ArrayBuffer>;
  zero(offset: number, length: number): void;
}

/** The long requests of one queue, one after the other. */
export class Slices {
  readonly #client: BackingClient;
  readonly #storage: SliceStorage;
  readonly #copies = new Copies();
  readonly #work: Work[] = [];
  #isScheduled = false;

  constructor(client: BackingClient, storage: SliceStorage) {
    this.#client = client;
    this.#storage = storage;
  }

  /** A copy; the segments are taken out of the batch here. */
  copy(
    head: number,
    position: number,
    segmentFirst: number,
    segmentCount: number,
    access: number,
  ): void {
    const { words, segments } = this.#client.batch;
    const pieces: Piece[] = [];
    let at = segments + segmentFirst * SegmentWord.count;
    let next = position;
    for (let i = 0; i < segmentCount; i++, at += SegmentWord.count) {
      const length = words[at + SegmentWord.length];
      pieces.push({
        view: words[at + SegmentWord.view],
        offset: words[at + SegmentWord.offset],
        length,
        position: next,
      });
      next += length;
    }
    this.#add({ head, access, pieces, done: 0 });
  }

  /** Zeroing. */
  zero(head: number, position: number, length: number): void {
    const piece = { view: 0, offset: 0, length, position };
    this.#add({ head, access: 0, pieces: [piece], done: 0 });
  }

  #add(work: Work): void {
    this.#work.push(work);
    this.#schedule();
  }

  #schedule(): void {
    if (this.#isScheduled) return;
    this.#isScheduled = true;
    setImmediate(() => this.#run());
  }

  #run(): void {
    this.#isScheduled = false;
    let budget = sliceBytes;
    while (budget > 0 && this.#work.length > 0) {
      budget -= this.#slice(this.#work[0], budget);
    }
    if (this.#work.length > 0) this.#schedule();
  }

  /** Does up to `budget` bytes of one piece; answers how many. */
  #slice(work: Work, budget: number): number {
    const { head, access, pieces } = work;
    // Given up by a queue that stops: its memory may be gone.
    if (!this.#client.isOpen(head)) {
      this.#work.shift();
      return 0;
    }
    const piece = pieces[0];
    const length = Math.min(budget, piece.length - work.done);
    const position = piece.position + work.done;
    if (access === 0) {
      this.#storage.zero(position, length);
    } else {
      const offset = piece.offset + work.done;
      this.#copies.add(piece.view, offset, length, access, position);
      const { memory } = this.#client.queue;
      if (!this.#copies.run(memory, this.#storage.bytes)) {
        this.#work.shift();
        this.#client.finish(head, Status.IOERR);
        return length;
      }
    }
    work.done += length;
    if (work.done === piece.length) {
      pieces.shift();
      work.done = 0;
    }
    if (pieces.length === 0) {
      this.#work.shift();
      this.#client.finish(head, Status.OK);
    }
    return length;
  }
}
