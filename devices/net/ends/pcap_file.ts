/**
 * The file of a capture (draft-ietf-opsawg-pcap), which several isolates may
 * write at once: one record after the other, in the order of their times.
 *
 * Who writes has the lock, whose word is his thread: a Worker may be ended at
 * any place and then never unlocks. What is whole ends at `end`; the next
 * writer goes on there, over whatever a dead one has begun.
 *
 * @module
 */

import {
  closeSync,
  fstatSync,
  ftruncateSync,
  openSync,
  writeSync,
} from "node:fs";
import { core } from "../../../ffi/core.ts";
import { Vhost2Error } from "../../../ffi/errors.ts";
import { requireInteger } from "../../limits.ts";
import type { Frames } from "../frames.ts";
import type { PortableCapture } from "./end.ts";

const magicNanoseconds = 0xa1b23c4d;
const linkTypeEthernet = 1;
const fileHeaderBytes = 24;
const recordHeaderBytes = 16;
const maxSnapLength = 262_144;

/** Of the shared memory: words (i32), then doubles. */
const Word = { owner: 0, hasEnded: 1 } as const;
const Double = { end: 1, time: 2, count: 3 } as const;
/** Between two looks whether the owner of the lock lives, in milliseconds. */
const ownerLookMs = 20;

function cannot(action: string, path: string, cause: unknown): Vhost2Error {
  const { code } = cause as NodeJS.ErrnoException;
  return new Vhost2Error(
    action === "write" ? "OPTION" : "OP",
    `Cannot ${action} ${path}: ${code ?? cause}`,
    { cause },
  );
}

/** The file, as one isolate has it. */
export class PcapFile {
  /** For a Worker. */
  readonly portable: PortableCapture;
  readonly #words: Int32Array<SharedArrayBuffer>;
  readonly #doubles: Float64Array<SharedArrayBuffer>;
  readonly #isOwner: boolean;
  readonly #thread = core.threadId();
  readonly #fd: number;
  /** Pipes have no positions: what is written is written. */
  readonly #hasPositions: boolean;
  #isOpen = true;
  #buffer = new Uint8Array(64 << 10);
  #view = new DataView(this.#buffer.buffer);

  private constructor(portable: PortableCapture, isOwner: boolean) {
    this.portable = portable;
    this.#words = new Int32Array(portable.shared, 0, 2);
    this.#doubles = new Float64Array(portable.shared);
    this.#isOwner = isOwner;
    try {
      this.#fd = openSync(portable.path, isOwner ? "w" : "r+");
      this.#hasPositions = fstatSync(this.#fd).isFile();
    } catch (cause) {
      throw cannot("write", portable.path, cause);
    }
  }

  /**
   * Begins a capture.
   *
   * @throws Vhost2Error OPTION when the file cannot be written
   */
  static create(path: string, snapLength: number): PcapFile {
    requireInteger("snapLength", snapLength, 1, maxSnapLength);
    const shared = new SharedArrayBuffer(Double.count * 8);
    const file = new PcapFile({ path, snapLength, shared }, true);
    const view = file.#view;
    view.setUint32(0, magicNanoseconds, true);
    view.setUint16(4, 2, true);
    view.setUint16(6, 4, true);
    view.setUint32(16, snapLength, true);
    view.setUint32(20, linkTypeEthernet, true);
    try {
      file.#write(fileHeaderBytes);
    } catch (error) {
      closeSync(file.#fd);
      throw cannot("write", path, (error as Error).cause);
    }
    return file;
  }

  /** In a Worker: goes on with a capture that another isolate has begun. */
  static join(portable: PortableCapture): PcapFile {
    return new PcapFile(portable, false);
  }

  /** Frames `first` to `first + count`, seen now; throws when it cannot. */
  add(frames: Frames, first: number, count: number): void {
    this.#lock();
    try {
      if (this.#words[Word.hasEnded] === 0) this.#add(frames, first, count);
    } finally {
      this.#unlock();
    }
  }

  #add(frames: Frames, first: number, count: number): void {
    // Not before what another isolate, or a clock since set back, has written.
    const time = Math.max(
      performance.timeOrigin + performance.now(),
      this.#doubles[Double.time],
    );
    this.#doubles[Double.time] = time;
    const seconds = Math.floor(time / 1000);
    const nanoseconds = Math.floor((time - seconds * 1000) * 1e6);
    const { snapLength } = this.portable;
    let at = 0;
    for (let i = first; i < first + count; i++) {
      const length = frames.length(i);
      const kept = Math.min(length, snapLength);
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

  /** Whole records. */
  #write(size: number): void {
    const end = this.#doubles[Double.end];
    try {
      for (let done = 0; done < size;) {
        const position = this.#hasPositions ? end + done : null;
        done += writeSync(
          this.#fd,
          this.#buffer,
          done,
          size - done,
          position,
        );
      }
    } catch (cause) {
      // For all: a capture with a gap would be taken for what happened.
      this.#words[Word.hasEnded] = 1;
      throw cannot("go on with the capture in", this.portable.path, cause);
    }
    this.#doubles[Double.end] = end + size;
  }

  #lock(): void {
    const words = this.#words;
    for (;;) {
      const owner = Atomics.compareExchange(
        words,
        Word.owner,
        0,
        this.#thread,
      );
      if (owner === 0) return;
      Atomics.wait(words, Word.owner, owner, ownerLookMs);
      if (core.threadIsAlive(owner) === 1) continue;
      const found = Atomics.compareExchange(
        words,
        Word.owner,
        owner,
        this.#thread,
      );
      if (found === owner) return;
    }
  }

  #unlock(): void {
    Atomics.store(this.#words, Word.owner, 0);
    Atomics.notify(this.#words, Word.owner, 1);
  }

  /** Nothing is written by this isolate any more. */
  close(): void {
    if (!this.#isOpen) return;
    this.#isOpen = false;
    if (this.#isOwner) {
      this.#lock();
      this.#words[Word.hasEnded] = 1;
      if (this.#hasPositions) {
        ftruncateSync(this.#fd, this.#doubles[Double.end]);
      }
      this.#unlock();
    }
    closeSync(this.#fd);
  }
}
