/**
 * Work on a memory disk that is too long for one turn of the event loop, done
 * in slices: a guest that asks for gigabytes at once waits for them, and
 * nobody else does.
 *
 * @module
 */

import { blocking } from "../../../ffi/blocking.ts";
import { SegmentWord } from "../../../virtqueue/mod.ts";
import type { BackingClient } from "./backing.ts";
import { Status } from "./backing.ts";
import { Copies } from "./copies.ts";

/** A request of more bytes is done in slices. */
export const largeBytes: number = 256 << 10;
const noSegments = new Uint32Array(0);
/** Bytes per turn of the event loop. */
const sliceBytes = 4 << 20;

/** More requests than this, and no batch is begun until some have ended. */
const enough = 16;

interface Work {
  readonly head: number;
  /** 0: zeroing, and no segments. */
  readonly access: number;
  /** The request's segments, as the batch had them. */
  readonly segments: Uint32Array<ArrayBuffer>;
  /** Word of the segment in hand, and bytes of it that are done. */
  at: number;
  done: number;
  /** Where on the disk it goes on, and how many bytes are left. */
  position: number;
  left: number;
}

/** What the slices are cut from. */
export interface SliceStorage {
  readonly bytes: Uint8Array;
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

  get isCongested(): boolean {
    return this.#work.length >= enough;
  }

  /** A copy; the segments are taken out of the batch here. */
  copy(
    head: number,
    position: number,
    length: number,
    segmentFirst: number,
    segmentCount: number,
    access: number,
  ): void {
    const { words, segments } = this.#client.batch;
    const start = segments + segmentFirst * SegmentWord.count;
    const own = words.slice(start, start + segmentCount * SegmentWord.count);
    this.#add({
      head,
      access,
      segments: own,
      at: 0,
      done: 0,
      position,
      left: length,
    });
  }

  /** Zeroing. */
  zero(head: number, position: number, length: number): void {
    this.#add({
      head,
      access: 0,
      segments: noSegments,
      at: 0,
      done: 0,
      position,
      left: length,
    });
  }

  #add(work: Work): void {
    this.#work.push(work);
    this.#schedule();
  }

  #schedule(): void {
    if (this.#isScheduled) return;
    this.#isScheduled = true;
    blocking.setImmediate(() => this.#run());
  }

  #run(): void {
    this.#isScheduled = false;
    let budget = sliceBytes;
    while (budget > 0 && this.#work.length > 0) {
      budget -= this.#slice(this.#work[0], budget);
    }
    if (this.#work.length > 0) this.#schedule();
  }

  /** Does up to `budget` bytes of one segment; answers how many. */
  #slice(work: Work, budget: number): number {
    // Given up by a queue that stops: its memory may be gone.
    if (!this.#client.isOpen(work.head)) {
      this.#work.shift();
      return 0;
    }
    const length = work.access === 0
      ? this.#zero(work, budget)
      : this.#copy(work, budget);
    work.position += length;
    work.left -= length;
    if (length === 0 || work.left === 0) {
      this.#work.shift();
      this.#client.finish(work.head, length === 0 ? Status.IOERR : Status.OK);
    }
    return length;
  }

  #zero(work: Work, budget: number): number {
    const length = Math.min(budget, work.left);
    this.#storage.zero(work.position, length);
    return length;
  }

  /** 0 when guest memory has gone. */
  #copy(work: Work, budget: number): number {
    const { segments, at } = work;
    const rest = segments[at + SegmentWord.length] - work.done;
    const length = Math.min(budget, rest);
    this.#copies.add(
      segments[at + SegmentWord.view],
      segments[at + SegmentWord.offset] + work.done,
      length,
      work.access,
      work.position,
    );
    const { memory } = this.#client.queue;
    if (!this.#copies.run(memory, this.#storage.bytes)) return 0;
    work.done += length;
    if (length === rest) {
      work.at += SegmentWord.count;
      work.done = 0;
    }
    return length;
  }
}
