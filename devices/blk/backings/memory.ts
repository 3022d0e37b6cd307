/**
 * A disk in the memory of this process. Pages that were never written cost
 * none.
 *
 * @module
 */

import { constants as bufferLimits } from "node:buffer";
import { core } from "../../../ffi/core.ts";
import { Vhost2Error } from "../../../ffi/errors.ts";
import { SegmentWord } from "../../../virtqueue/mod.ts";
import type {
  Backing,
  BackingClient,
  BackingQueue,
  PortableBacking,
} from "./backing.ts";
import { Status } from "./backing.ts";
import { Copies, fromGuest, toGuest } from "./copies.ts";
import { largeBytes, Slices } from "./slices.ts";

/** Zeroing skips what was never written, in steps of these many bytes. */
const stepShift = 16;
const stepSize = 1 << stepShift;
const pageSize = 4096;

/** Used up inside one batch, so that all queues of an isolate share them. */
const copies = new Copies();

type PortableMemory = Extract<PortableBacking, { kind: "memory" }>;

class Storage {
  /** At least as many as the disk has. */
  bytes: Uint8Array<SharedArrayBuffer>;
  /** 1 for each step that was written. */
  written: Uint8Array<SharedArrayBuffer>;
  /** Workers have it too: it stays where it is. */
  isShared = false;

  constructor(
    bytes: Uint8Array<SharedArrayBuffer>,
    written: SharedArrayBuffer,
  ) {
    this.bytes = bytes;
    this.written = new Uint8Array(written);
  }

  static ofSize(size: number): Storage {
    return new Storage(
      allocate(size),
      new SharedArrayBuffer(Math.ceil(size / stepSize)),
    );
  }

  resize(before: number, size: number): void {
    if (size <= this.bytes.length) {
      // What comes back later comes back as zeros.
      if (size > before) this.zero(before, size - before);
      return;
    }
    if (this.isShared) {
      throw new Vhost2Error(
        "OPTION",
        `Cannot make a memory disk that Workers serve larger than ${this.bytes.length} bytes: ${size} (memoryBacking can be given a maxSize)`,
      );
    }
    const kept = before;
    const { bytes, written } = Storage.ofSize(size);
    for (let step = 0; step * stepSize < kept; step++) {
      if (this.written[step] === 0) continue;
      written[step] = 1;
      const start = step * stepSize;
      const end = Math.min(kept, start + stepSize);
      bytes.set(this.bytes.subarray(start, end), start);
    }
    this.bytes = bytes;
    this.written = written;
  }

  markWritten(offset: number, length: number): void {
    const last = Math.floor((offset + length - 1) / stepSize);
    for (let step = Math.floor(offset / stepSize); step <= last; step++) {
      this.written[step] = 1;
    }
  }

  zero(offset: number, length: number): void {
    const end = offset + length;
    let at = offset;
    while (at < end) {
      const step = Math.floor(at / stepSize);
      const next = Math.min(end, (step + 1) * stepSize);
      if (this.written[step] === 1) this.bytes.fill(0, at, next);
      at = next;
    }
  }
}

/** Aligned to pages, as guests' buffers are: copies are a third faster so. */
function allocate(size: number): Uint8Array<SharedArrayBuffer> {
  try {
    const buffer = new SharedArrayBuffer(size + pageSize);
    const start = pageSize - core.pageOffset(new Uint8Array(buffer));
    return new Uint8Array(buffer, start % pageSize, size);
  } catch (cause) {
    throw new Vhost2Error(
      "OPTION",
      `Cannot make a memory disk of ${size} bytes: this runtime gives no buffer of that size (its limit is ${bufferLimits.MAX_LENGTH})`,
      { cause },
    );
  }
}

class MemoryQueue implements BackingQueue {
  readonly movesData = true;
  // Long ones by `setImmediate`, which the isolate does not block before.
  readonly endsByEvents = true;
  readonly #client: BackingClient;
  readonly #storage: Storage;
  readonly #slices: Slices;
  /** Heads of the requests whose copies wait for `submit`. */
  readonly #heads: Uint32Array<ArrayBuffer>;
  #count = 0;

  constructor(client: BackingClient, storage: Storage) {
    this.#client = client;
    this.#storage = storage;
    this.#slices = new Slices(client, storage);
    this.#heads = new Uint32Array(client.batch.maxRequests);
  }

  get isCongested(): boolean {
    return this.#slices.isCongested;
  }

  read(
    head: number,
    offset: number,
    length: number,
    segmentFirst: number,
    segmentCount: number,
  ): void {
    this.#stage(head, offset, length, segmentFirst, segmentCount, toGuest);
  }

  write(
    head: number,
    offset: number,
    length: number,
    segmentFirst: number,
    segmentCount: number,
  ): void {
    if (length > 0) this.#storage.markWritten(offset, length);
    this.#stage(head, offset, length, segmentFirst, segmentCount, fromGuest);
  }

  #stage(
    head: number,
    offset: number,
    bytes: number,
    segmentFirst: number,
    segmentCount: number,
    access: number,
  ): void {
    if (bytes > largeBytes) {
      this.#slices.copy(
        head,
        offset,
        bytes,
        segmentFirst,
        segmentCount,
        access,
      );
      return;
    }
    const { words, segments } = this.#client.batch;
    let at = segments + segmentFirst * SegmentWord.count;
    let position = offset;
    for (let i = 0; i < segmentCount; i++, at += SegmentWord.count) {
      const length = words[at + SegmentWord.length];
      copies.add(
        words[at + SegmentWord.view],
        words[at + SegmentWord.offset],
        length,
        access,
        position,
      );
      position += length;
    }
    this.#heads[this.#count++] = head;
  }

  flush(head: number): void {
    this.#client.finish(head, Status.OK);
  }

  discard(head: number, offset: number, length: number): void {
    this.#zero(head, offset, length);
  }

  writeZeroes(head: number, offset: number, length: number): void {
    this.#zero(head, offset, length);
  }

  #zero(head: number, offset: number, length: number): void {
    // Many ranges make one request: each waits for its slice.
    this.#slices.zero(head, offset, length);
  }

  submit(): void {
    const count = this.#count;
    if (count === 0) return;
    this.#count = 0;
    const isDone = copies.run(this.#client.queue.memory, this.#storage.bytes);
    const status = isDone ? Status.OK : Status.IOERR;
    for (let i = 0; i < count; i++) this.#client.finish(this.#heads[i], status);
  }

  close(): void {}
}

/**
 * A disk of `size` bytes in memory, all zeros at first. A resize copies what
 * was written, unless there is room for it already.
 *
 * @param size bytes, a multiple of the logical block
 * @param options `maxSize`: bytes that it may come to have while Workers serve
 * it; what is not used takes no memory
 * @throws Vhost2Error OPTION when the runtime gives no such buffer (Node 20
 * ends at 4 GiB)
 */
export function memoryBacking(
  size: number,
  options: { readonly maxSize?: number } = {},
): Backing {
  const room = Math.max(size, options.maxSize ?? 0);
  return backingOver(Storage.ofSize(room), size);
}

/** In a Worker: over memory that another isolate has made. */
export function sharedMemoryBacking(
  { bytes, start, size, written }: PortableMemory,
): Backing {
  const disk = new Uint8Array(bytes, start, size);
  return backingOver(new Storage(disk, written), size);
}

function backingOver(storage: Storage, size: number): Backing {
  let current = size;
  return {
    name: "memory",
    get size() {
      return current;
    },
    isReadOnly: false,
    canDiscard: true,
    canWriteZeroes: true,
    openQueue: (client) => new MemoryQueue(client, storage),
    toPortable() {
      storage.isShared = true;
      const { bytes, written } = storage;
      return {
        kind: "memory",
        bytes: bytes.buffer,
        start: bytes.byteOffset,
        size: bytes.length,
        written: written.buffer,
      };
    },
    resize(size) {
      storage.resize(current, size);
      current = size;
    },
    close() {
      storage.bytes = new Uint8Array(new SharedArrayBuffer(0));
      storage.written = new Uint8Array(new SharedArrayBuffer(0));
      current = 0;
    },
  };
}
