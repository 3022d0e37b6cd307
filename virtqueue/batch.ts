/**
 * Requests in batches: the words that the core fills and devices read in
 * place, as struct-of-records without an object per request.
 *
 * @module
 */

import { constants, layouts } from "../ffi/abi.gen.ts";

const recordWords = layouts.Request.byteSize / 4;
const segmentWords = layouts.Segment.byteSize / 4;
/** The longest chain (1024 descriptors) with every one of them cut in two. */
const segmentCapacity = 2048;

/** Word offsets inside a record. */
export const RequestWord = {
  head: layouts.Request.head / 4,
  segmentFirst: layouts.Request.segmentFirst / 4,
  readableCount: layouts.Request.readableCount / 4,
  writableCount: layouts.Request.writableCount / 4,
  readableBytes: layouts.Request.readableBytes / 4,
  writableBytes: layouts.Request.writableBytes / 4,
  headerLength: layouts.Request.headerLength / 4,
  trailerLength: layouts.Request.trailerLength / 4,
  trailerView: layouts.Request.trailerView / 4,
  trailerOffset: layouts.Request.trailerOffset / 4,
  serial: layouts.Request.serial / 4,
  /** The header's bytes begin here. */
  header: recordWords,
} as const;

/** Word offsets inside a segment. */
export const SegmentWord = {
  view: layouts.Segment.view / 4,
  offset: layouts.Segment.offset / 4,
  length: layouts.Segment.length / 4,
  access: layouts.Segment.access / 4,
  /** Words of one segment. */
  count: segmentWords,
} as const;

/** `Segment.access` of bytes that the device writes. */
export const accessWrite: number = constants.accessWrite;

/**
 * The words of up to `maxRequests` requests. Record i begins at word
 * `i * stride`; segment j at `segments + j * SegmentWord.count`.
 */
export class Batch {
  readonly maxRequests: number;
  readonly headerBytes: number;
  readonly stride: number;
  /** Word at which the segments begin. */
  readonly segments: number;
  readonly words: Uint32Array<ArrayBuffer>;
  /** The same bytes, for headers. */
  readonly bytes: Uint8Array<ArrayBuffer>;
  readonly view: DataView<ArrayBuffer>;

  constructor(maxRequests: number, headerBytes: number) {
    this.maxRequests = maxRequests;
    this.headerBytes = headerBytes;
    const words = recordWords + Math.ceil(headerBytes / 4);
    this.stride = Math.ceil(words / 4) * 4;
    this.segments = maxRequests * this.stride;
    this.words = new Uint32Array(
      this.segments + segmentCapacity * segmentWords,
    );
    this.bytes = new Uint8Array(this.words.buffer);
    this.view = new DataView(this.words.buffer);
  }

  /** The words of the segments alone, as the core's file I/O takes them. */
  get segmentArea(): Uint32Array<ArrayBuffer> {
    return this.words.subarray(this.segments);
  }

  /** How many segments the batch can hold. */
  get segmentCapacity(): number {
    return segmentCapacity;
  }

  /** A copy of the header of request `i`. */
  header(i: number): Uint8Array<ArrayBuffer> {
    const at = i * this.stride;
    const start = (at + RequestWord.header) * 4;
    return this.bytes.slice(
      start,
      start + this.words[at + RequestWord.headerLength],
    );
  }
}

const shared = new Map<string, Batch>();

/**
 * The isolate's batch of a shape. What is in it is used up before the next
 * pop, so that all queues of an isolate can share it and stay in the cache.
 */
export function sharedBatch(maxRequests: number, headerBytes: number): Batch {
  const key = `${maxRequests}:${headerBytes}`;
  let batch = shared.get(key);
  if (batch === undefined) {
    batch = new Batch(maxRequests, headerBytes);
    shared.set(key, batch);
  }
  return batch;
}
