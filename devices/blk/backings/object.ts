/**
 * A disk in any object with asynchronous methods: a user's own storage.
 *
 * The object gets buffers of its own, never guest memory: what it writes into
 * a buffer after its method has ended reaches nobody, and the guest cannot
 * change under its eyes what is being written.
 *
 * @module
 */

import { Vhost2Error } from "../../../ffi/errors.ts";
import { SegmentWord } from "../../../virtqueue/mod.ts";
import type { Backing, BackingClient, BackingQueue } from "./backing.ts";
import { Status } from "./backing.ts";
import { Copies, fromGuest, toGuest } from "./copies.ts";

type Later = void | Promise<void>;

/**
 * A disk as a user writes it. Offsets and lengths are bytes, whole logical
 * blocks inside the disk. Methods run side by side and end in any order; one
 * that throws or rejects fails its request and nothing else. `signal` is
 * aborted when the virtual machine waits no longer for the request.
 */
export interface DiskObject {
  /** Bytes, when the disk is made. */
  readonly size: number;
  /** Fills `into`, at most 1 MiB, with what is at `offset`. */
  read(
    offset: number,
    into: Uint8Array<ArrayBuffer>,
    signal: AbortSignal,
  ): Later;
  /** Stores `data`, at most 1 MiB. Without it the disk is read-only. */
  write?(
    offset: number,
    data: Uint8Array<ArrayBuffer>,
    signal: AbortSignal,
  ): Later;
  /** All writes that have ended are durable when it ends. */
  flush?(signal: AbortSignal): Later;
  /** What was there is no longer needed. */
  discard?(offset: number, length: number, signal: AbortSignal): Later;
  /** Zeros are to be read there. */
  writeZeroes?(offset: number, length: number, signal: AbortSignal): Later;
  /** The disk is to have another size from here on. */
  resize?(size: number): Later;
  close?(): Later;
}

/** One call's data at most; longer requests become several calls. */
const maxTransfer = 1 << 20;
/** Requests of one queue with the object at once: bounds their buffers. */
const maxConcurrent = 128;

/** Used up before anything else runs, so that all queues share it. */
const copies = new Copies();

/** The segments of one request, kept beyond its batch. */
class Segments {
  readonly #words: Uint32Array<ArrayBuffer>;
  /** Where the next copy goes on. */
  #at = 0;
  #skip = 0;

  constructor(client: BackingClient, first: number, count: number) {
    const { words, segments } = client.batch;
    const start = segments + first * SegmentWord.count;
    this.#words = words.slice(start, start + count * SegmentWord.count);
  }

  /** Copies the next `buffer.length` bytes; false when the memory has gone. */
  copy(
    client: BackingClient,
    buffer: Uint8Array<ArrayBuffer>,
    access: number,
  ): boolean {
    const words = this.#words;
    let position = 0;
    while (position < buffer.length) {
      const rest = words[this.#at + SegmentWord.length] - this.#skip;
      const length = Math.min(rest, buffer.length - position);
      copies.add(
        words[this.#at + SegmentWord.view],
        words[this.#at + SegmentWord.offset] + this.#skip,
        length,
        access,
        position,
      );
      position += length;
      this.#skip += length;
      if (length === rest) {
        this.#at += SegmentWord.count;
        this.#skip = 0;
      }
    }
    return copies.run(client.queue.memory, buffer);
  }
}

class ObjectQueue implements BackingQueue {
  readonly movesData = false;
  readonly endsByEvents = false;
  readonly #client: BackingClient;
  readonly #object: DiskObject;
  #running = 0;
  /** What waits for its turn: a request, begun by calling it. */
  readonly #waiting: (() => void)[] = [];

  constructor(client: BackingClient, object: DiskObject) {
    this.#client = client;
    this.#object = object;
  }

  get isCongested(): boolean {
    return this.#waiting.length > 0;
  }

  /** Runs `work` now or when there is room, and ends the request as it does. */
  #run(head: number, action: string, work: () => Promise<void>): void {
    const begin = async () => {
      this.#running++;
      let status: number = Status.OK;
      try {
        if (this.#client.isOpen(head)) {
          // The queue stopped while it waited for its turn.
          this.#client.signal.throwIfAborted();
          await work();
        }
      } catch (cause) {
        status = Status.IOERR;
        const reason = cause instanceof Error ? cause.message : String(cause);
        this.#client.report(
          new Vhost2Error("OP", `Cannot ${action}: ${reason}`, { cause }),
        );
      }
      this.#running--;
      this.#client.finish(head, status);
      this.#waiting.shift()?.();
    };
    if (this.#running < maxConcurrent) begin();
    else this.#waiting.push(begin);
  }

  #copy(
    head: number,
    segments: Segments,
    buffer: Uint8Array<ArrayBuffer>,
    access: number,
  ): boolean {
    // Expired while the object was at work: its memory is no longer ours.
    if (!this.#client.isOpen(head)) return false;
    if (segments.copy(this.#client, buffer, access)) return true;
    throw new Error("guest memory has gone");
  }

  read(
    head: number,
    offset: number,
    length: number,
    segmentFirst: number,
    segmentCount: number,
  ): void {
    const segments = new Segments(this.#client, segmentFirst, segmentCount);
    this.#run(head, `read ${length} bytes at ${offset}`, async () => {
      for (let done = 0; done < length; done += maxTransfer) {
        const size = Math.min(maxTransfer, length - done);
        const into = new Uint8Array(size);
        await this.#object.read(offset + done, into, this.#client.signal);
        if (into.length !== size) throw new Error("its buffer was taken away");
        if (!this.#copy(head, segments, into, toGuest)) return;
      }
    });
  }

  write(
    head: number,
    offset: number,
    length: number,
    segmentFirst: number,
    segmentCount: number,
    isDurable: boolean,
  ): void {
    const segments = new Segments(this.#client, segmentFirst, segmentCount);
    this.#run(head, `write ${length} bytes at ${offset}`, async () => {
      const { signal } = this.#client;
      for (let done = 0; done < length; done += maxTransfer) {
        // What has not begun need not be done before a stop.
        signal.throwIfAborted();
        const data = new Uint8Array(Math.min(maxTransfer, length - done));
        if (!this.#copy(head, segments, data, fromGuest)) return;
        await this.#object.write!(offset + done, data, signal);
      }
      if (isDurable) await this.#object.flush?.(signal);
    });
  }

  flush(head: number): void {
    this.#run(head, "flush", async () => {
      await this.#object.flush?.(this.#client.signal);
    });
  }

  discard(head: number, offset: number, length: number): void {
    this.#run(head, `discard ${length} bytes at ${offset}`, async () => {
      await this.#object.discard!(offset, length, this.#client.signal);
    });
  }

  writeZeroes(
    head: number,
    offset: number,
    length: number,
    _mayUnmap: boolean,
    isDurable: boolean,
  ): void {
    this.#run(head, `write ${length} zeros at ${offset}`, async () => {
      const { signal } = this.#client;
      await this.#object.writeZeroes!(offset, length, signal);
      if (isDurable) await this.#object.flush?.(signal);
    });
  }

  submit(): void {}

  close(): void {
    this.#waiting.length = 0;
  }
}

/** A disk in a user's object. */
export function objectBacking(object: DiskObject): Backing {
  let size = object.size;
  const isReadOnly = object.write === undefined;
  return {
    name: "object",
    get size() {
      return size;
    },
    isReadOnly,
    canDiscard: !isReadOnly && object.discard !== undefined,
    canWriteZeroes: !isReadOnly && object.writeZeroes !== undefined,
    openQueue: (client) => new ObjectQueue(client, object),
    async resize(wanted) {
      await object.resize?.(wanted);
      size = wanted;
    },
    close: () => object.close?.(),
  };
}
