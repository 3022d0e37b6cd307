/**
 * The requests of one started queue: parsed, checked, handed to the backing,
 * answered (virtio 1.3, 5.2.6).
 *
 *   readable: type u32, ioprio u32, sector u64, then data of a write or ranges
 *   writable: data of a read, then one status byte at the very end
 *
 * The core has split header and status off, whatever the descriptors were.
 *
 * @module
 */

import type { Vhost2Error } from "../../ffi/errors.ts";
import { hasFeature } from "../../protocol/features.ts";
import {
  type Batch,
  RequestWord,
  SegmentWord,
  type StartedQueue,
  Virtqueue,
} from "../../virtqueue/mod.ts";
import {
  type Backing,
  type BackingClient,
  type BackingQueue,
  Status,
} from "./backings/backing.ts";
import { BlkFeature, type BlkGeometry, sectorSize } from "./config.ts";
import { Counter } from "./statistics.ts";

/** VIRTIO_BLK_T_*. */
export const RequestType = {
  IN: 0,
  OUT: 1,
  FLUSH: 4,
  GET_ID: 8,
  DISCARD: 11,
  WRITE_ZEROES: 13,
} as const;

/** struct virtio_blk_req: bytes before the data. */
const headerBytes = 16;
/** struct virtio_blk_discard_write_zeroes: sector u64, num u32, flags u32. */
const rangeBytes = 16;
const rangeFlagUnmap = 1;
/** VIRTIO_BLK_ID_BYTES. */
export const idBytes = 20;
const twoTo32 = 2 ** 32;

/** What the requests of all queues of one front-end share. */
export interface BlkSession {
  readonly geometry: BlkGeometry;
  readonly backing: Backing;
  readonly counts: Float64Array;
  /** The serial, padded with zeros to `idBytes`. */
  readonly id: Uint8Array<ArrayBuffer>;
  readonly stopTimeoutMs: number | undefined;
  readonly pollMicroseconds: number | undefined;
  /** In sectors of 512 bytes; may change. */
  readonly capacity: number;
  /** Writes are durable when they complete; may change. */
  readonly isWriteThrough: boolean;
  report(error: Vhost2Error): void;
}

/** The requests of one started queue. */
export class RequestQueue implements BackingClient {
  readonly queue: StartedQueue;
  readonly batch: Batch;
  readonly #session: BlkSession;
  readonly #virtqueue: Virtqueue;
  readonly #backing: BackingQueue;
  readonly #canDiscard: boolean;
  readonly #canWriteZeroes: boolean;
  readonly #ranges: DataView<ArrayBuffer>;
  // By head. A request is open while parts of it have to finish.
  readonly #parts: Uint32Array<ArrayBuffer>;
  readonly #statuses: Uint8Array<ArrayBuffer>;
  readonly #statusViews: Uint32Array<ArrayBuffer>;
  readonly #statusOffsets: Uint32Array<ArrayBuffer>;
  /** Bytes written besides the status, should it succeed. */
  readonly #written: Uint32Array<ArrayBuffer>;
  readonly #counters: Uint8Array<ArrayBuffer>;
  readonly #bytes: Float64Array<ArrayBuffer>;
  /** Open requests that a suspension still waits for, and who waits. */
  #unsettled = 0;
  #settled: (() => void) | undefined;

  /**
   * Starts to process a queue.
   *
   * @throws Vhost2Error SYSTEM when the ring or the backing cannot be used
   */
  constructor(queue: StartedQueue, session: BlkSession) {
    const { geometry } = session;
    this.queue = queue;
    this.#session = session;
    this.#canDiscard = geometry.canDiscard &&
      hasFeature(queue.features, BlkFeature.DISCARD);
    this.#canWriteZeroes = geometry.canWriteZeroes &&
      hasFeature(queue.features, BlkFeature.WRITE_ZEROES);
    this.#ranges = new DataView(
      new ArrayBuffer(geometry.maxRangeCount * rangeBytes),
    );
    this.#parts = new Uint32Array(queue.size);
    this.#statuses = new Uint8Array(queue.size);
    this.#statusViews = new Uint32Array(queue.size);
    this.#statusOffsets = new Uint32Array(queue.size);
    this.#written = new Uint32Array(queue.size);
    this.#counters = new Uint8Array(queue.size);
    this.#bytes = new Float64Array(queue.size);
    this.#virtqueue = new Virtqueue(queue, {
      headerBytes,
      trailerBytes: 1,
      stopTimeoutMs: session.stopTimeoutMs,
      pollMicroseconds: session.pollMicroseconds,
      process: (count) => this.#process(count),
      isCongested: () => this.#backing.isCongested,
      expire: () => this.#expire(),
      suspend: () => this.#suspend(),
      endsByEvents: () => this.#backing.endsByEvents,
    });
    this.batch = this.#virtqueue.batch;
    try {
      this.#backing = session.backing.openQueue(this);
    } catch (error) {
      this.#virtqueue.stop();
      throw error;
    }
  }

  get signal(): AbortSignal {
    return this.#virtqueue.signal;
  }

  /** The driver kicked. */
  kick(): void {
    this.#virtqueue.kick();
  }

  /** Resolves when all requests have ended. */
  async stop(): Promise<void> {
    await this.#virtqueue.stop();
    this.#backing.close();
  }

  isOpen(head: number): boolean {
    return this.#parts[head] > 0;
  }

  report(error: Vhost2Error): void {
    // What a suspension has cancelled has not failed.
    if (this.#settled !== undefined) return;
    this.#session.report(error);
  }

  /** Answers how many bytes the batch moves. */
  #process(count: number): number {
    const { stride, words } = this.batch;
    let bytes = 0;
    for (let i = 0; i < count; i++) {
      const at = i * stride;
      bytes += words[at + RequestWord.readableBytes] +
        words[at + RequestWord.writableBytes];
      this.#begin(at);
    }
    this.#backing.submit();
    return this.#backing.movesData ? bytes : 0;
  }

  #begin(at: number): void {
    const { words } = this.batch;
    const head = words[at + RequestWord.head];
    if (words[at + RequestWord.trailerLength] === 0) {
      // No byte for a status: it goes back as it came.
      this.#session.counts[Counter.malformed]++;
      this.#virtqueue.complete(head, 0);
      return;
    }
    this.#statusViews[head] = words[at + RequestWord.trailerView];
    this.#statusOffsets[head] = words[at + RequestWord.trailerOffset];
    this.#statuses[head] = Status.OK;
    this.#parts[head] = 1;
    if (words[at + RequestWord.headerLength] < headerBytes) {
      return this.finish(head, Status.IOERR);
    }
    const first = words[at + RequestWord.segmentFirst];
    const readableCount = words[at + RequestWord.readableCount];
    const sector = words[at + RequestWord.header + 2] +
      words[at + RequestWord.header + 3] * twoTo32;
    switch (words[at + RequestWord.header]) {
      case RequestType.IN: {
        const length = words[at + RequestWord.writableBytes];
        this.#expect(head, Counter.reads, length, length);
        if (!this.#isInside(sector, length)) {
          return this.finish(head, Status.IOERR);
        }
        return this.#backing.read(
          head,
          sector * sectorSize,
          length,
          first + readableCount,
          words[at + RequestWord.writableCount],
        );
      }
      case RequestType.OUT: {
        const length = words[at + RequestWord.readableBytes];
        this.#expect(head, Counter.writes, length, 0);
        if (
          this.#session.geometry.isReadOnly ||
          !this.#isInside(sector, length)
        ) return this.finish(head, Status.IOERR);
        return this.#backing.write(
          head,
          sector * sectorSize,
          length,
          first,
          readableCount,
          this.#session.isWriteThrough,
        );
      }
      case RequestType.FLUSH:
        this.#expect(head, Counter.flushes, 0, 0);
        return this.#backing.flush(head);
      case RequestType.GET_ID:
        return this.#getId(head, at);
      case RequestType.DISCARD:
        this.#expect(head, Counter.discards, 0, 0);
        return this.#beginRanges(head, at, false);
      case RequestType.WRITE_ZEROES:
        this.#expect(head, Counter.writeZeroes, 0, 0);
        return this.#beginRanges(head, at, true);
      default:
        return this.finish(head, Status.UNSUPP);
    }
  }

  /** What is counted and reported as written should the request succeed. */
  #expect(head: number, counter: number, bytes: number, written: number): void {
    this.#counters[head] = counter;
    this.#bytes[head] = bytes;
    this.#written[head] = written;
  }

  /**
   * Whole blocks inside the disk; numbers beyond 2^53 are beyond any disk. V8
   * makes a loop of the old floating-point unit's of `%`, which took a tenth of
   * all time: blocks are powers of two.
   */
  #isInside(sector: number, bytes: number): boolean {
    const { geometry, capacity } = this.#session;
    const blockBytes = geometry.logicalBlockSize;
    if ((bytes & (blockBytes - 1)) !== 0) return false;
    if (!(sector + bytes / sectorSize <= capacity)) return false;
    if (blockBytes === sectorSize) return true;
    const block = sector * (sectorSize / blockBytes);
    return block === Math.floor(block);
  }

  #getId(head: number, at: number): void {
    const { batch, queue } = this;
    const { id } = this.#session;
    const first = batch.words[at + RequestWord.segmentFirst] +
      batch.words[at + RequestWord.readableCount];
    const count = batch.words[at + RequestWord.writableCount];
    let done = 0;
    for (let i = first; i < first + count && done < id.length; i++) {
      const word = batch.segments + i * SegmentWord.count;
      const view = queue.memory.views[batch.words[word + SegmentWord.view]];
      const length = batch.words[word + SegmentWord.length];
      const part = id.subarray(done, Math.min(id.length, done + length));
      view?.set(part, batch.words[word + SegmentWord.offset]);
      done += part.length;
    }
    this.#expect(head, Counter.getIds, 0, done);
    this.finish(head, Status.OK);
  }

  /** Discard and write zeroes: all ranges are checked before any is begun. */
  #beginRanges(head: number, at: number, isZeroing: boolean): void {
    const { geometry } = this.#session;
    if (geometry.isReadOnly) return this.finish(head, Status.IOERR);
    if (!(isZeroing ? this.#canWriteZeroes : this.#canDiscard)) {
      return this.finish(head, Status.UNSUPP);
    }
    const size = this.batch.words[at + RequestWord.readableBytes];
    if (size === 0 || size % rangeBytes !== 0) {
      return this.finish(head, Status.IOERR);
    }
    const count = size / rangeBytes;
    if (count > geometry.maxRangeCount) {
      return this.finish(head, Status.UNSUPP);
    }
    // One copy: what is checked is what is done, whatever the guest writes.
    this.#copyRanges(at);
    let bytes = 0;
    for (let i = 0; i < count; i++) {
      const status = this.#checkRange(i, isZeroing);
      if (status !== Status.OK) return this.finish(head, status);
      bytes += this.#ranges.getUint32(i * rangeBytes + 8, true) * sectorSize;
    }
    this.#bytes[head] = bytes;
    this.#parts[head] = count;
    for (let i = 0; i < count; i++) this.#beginRange(head, i, isZeroing);
  }

  #copyRanges(at: number): void {
    const { batch, queue } = this;
    const { words } = batch;
    const target = new Uint8Array(this.#ranges.buffer);
    const first = words[at + RequestWord.segmentFirst];
    const end = first + words[at + RequestWord.readableCount];
    let done = 0;
    for (let i = first; i < end; i++) {
      const word = batch.segments + i * SegmentWord.count;
      const view = queue.memory.views[words[word + SegmentWord.view]];
      const offset = words[word + SegmentWord.offset];
      const length = words[word + SegmentWord.length];
      if (view !== undefined) {
        target.set(view.subarray(offset, offset + length), done);
      }
      done += length;
    }
  }

  #sectorOf(i: number): number {
    const at = i * rangeBytes;
    return this.#ranges.getUint32(at, true) +
      this.#ranges.getUint32(at + 4, true) * twoTo32;
  }

  #checkRange(i: number, isZeroing: boolean): number {
    const count = this.#ranges.getUint32(i * rangeBytes + 8, true);
    const flags = this.#ranges.getUint32(i * rangeBytes + 12, true);
    const known = isZeroing ? rangeFlagUnmap : 0;
    if ((flags & ~known) !== 0) return Status.UNSUPP;
    if (
      count > this.#session.geometry.maxRangeSectors ||
      !this.#isInside(this.#sectorOf(i), count * sectorSize)
    ) return Status.IOERR;
    return Status.OK;
  }

  #beginRange(head: number, i: number, isZeroing: boolean): void {
    const offset = this.#sectorOf(i) * sectorSize;
    const length = this.#ranges.getUint32(i * rangeBytes + 8, true) *
      sectorSize;
    const flags = this.#ranges.getUint32(i * rangeBytes + 12, true);
    if (length === 0) return this.finish(head, Status.OK);
    if (!isZeroing) return this.#backing.discard(head, offset, length);
    this.#backing.writeZeroes(
      head,
      offset,
      length,
      (flags & rangeFlagUnmap) !== 0,
      this.#session.isWriteThrough,
    );
  }

  finish(head: number, status: number): void {
    if (this.#parts[head] === 0) return;
    if (status > this.#statuses[head]) this.#statuses[head] = status;
    if (--this.#parts[head] > 0) return;
    if (this.#settled === undefined) return this.#answer(head);
    // Cancelled, or failed: the queue's next run does it again.
    if (this.#statuses[head] === Status.OK) this.#answer(head);
    if (--this.#unsettled === 0) this.#settled();
  }

  #answer(head: number): void {
    const status = this.#statuses[head];
    const { counts } = this.#session;
    let written = 1;
    if (status === Status.OK) {
      const counter = this.#counters[head];
      counts[counter]++;
      const hasBytes = counter !== Counter.flushes &&
        counter !== Counter.getIds;
      if (hasBytes) counts[counter + 1] += this.#bytes[head];
      written += this.#written[head];
    } else {
      counts[
        status === Status.UNSUPP ? Counter.unsupported : Counter.ioErrors
      ]++;
    }
    const view = this.queue.memory.views[this.#statusViews[head]];
    if (view !== undefined) view[this.#statusOffsets[head]] = status;
    this.#virtqueue.complete(head, written);
  }

  /**
   * Resolves when the backing is done with every open request: kernel I/O ends
   * by itself, a user's object is asked to cancel. A write that were only
   * forgotten could undo what the guest writes after its resubmission.
   */
  #suspend(): Promise<void> {
    const settled = new Promise<void>((resolve) => this.#settled = resolve);
    this.#unsettled = this.#parts.filter((count) => count > 0).length;
    if (this.#unsettled === 0) this.#settled!();
    return settled;
  }

  /** The stopping queue waits no longer: all that is open fails. */
  #expire(): void {
    this.#settled = undefined;
    for (let head = 0; head < this.#parts.length; head++) {
      if (this.#parts[head] === 0) continue;
      this.#parts[head] = 0;
      this.#statuses[head] = Status.IOERR;
      this.#answer(head);
    }
  }
}
