/**
 * Web Streams of frames as an end: anything with `readable` and `writable`.
 *
 * @module
 */

import { Vhost2Error } from "../../../ffi/errors.ts";
import { Frames, maxFrameBytes, minFrameBytes } from "../frames.ts";
import type { EndPort, NetEnd, NetLink } from "./end.ts";

/** What a guest sends is written, what it is to get is read. */
export interface FrameStreams {
  readonly readable: ReadableStream<Uint8Array>;
  readonly writable: WritableStream<Uint8Array<ArrayBuffer>>;
}

/** Frames of the guest's that wait for the writable, at most. */
const backlog = 256;

class StreamPort implements EndPort {
  readonly #link: NetLink;
  readonly #writer: WritableStreamDefaultWriter<Uint8Array<ArrayBuffer>>;
  readonly #reader: ReadableStreamDefaultReader<Uint8Array>;
  readonly #closed: () => void;
  readonly #frame = new Frames(1);
  #waiting = 0;
  #isOpen = true;
  #isWritable = true;
  #ready: (() => void) | undefined;

  constructor(link: NetLink, streams: FrameStreams, closed: () => void) {
    this.#link = link;
    this.#closed = closed;
    this.#reader = streams.readable.getReader();
    this.#writer = streams.writable.getWriter();
    this.#read();
  }

  receive(frames: Frames): void {
    if (!this.#isWritable) return;
    for (let i = 0; i < frames.count; i++) {
      this.#waiting++;
      this.#writer.write(frames.at(i).slice()).then(this.#written, this.#fail);
    }
  }

  isCongested(): boolean {
    return this.#waiting >= backlog;
  }

  ready(): void {
    this.#ready?.();
  }

  close(): void {
    this.#isOpen = false;
    this.#ready?.();
    // The streams outlive the front-end: the next one goes on with them.
    this.#reader.releaseLock();
    this.#writer.releaseLock();
    this.#closed();
  }

  readonly #written = (): void => {
    this.#waiting--;
    if (this.#waiting < backlog / 2) this.#link.resume();
  };

  readonly #fail = (cause: unknown): void => {
    this.#waiting--;
    if (this.#isWritable && this.#isOpen) {
      this.#isWritable = false;
      this.#report("write", cause);
    }
    this.#link.resume();
  };

  #report(action: string, cause: unknown): void {
    this.#link.report(
      new Vhost2Error(
        "OP",
        `Cannot ${action} frames of ${this.#link.name}: ${cause}`,
        { cause },
      ),
    );
  }

  async #read(): Promise<void> {
    try {
      while (this.#isOpen) {
        const { done, value } = await this.#reader.read();
        if (done) return;
        await this.#send(value);
      }
    } catch (cause) {
      if (this.#isOpen) this.#report("read", cause);
    }
  }

  /** Waits for buffers of the guest's if need be. */
  async #send(frame: Uint8Array): Promise<void> {
    const { length } = frame;
    if (length < minFrameBytes || length > maxFrameBytes) {
      this.#link.drop(0, 1);
      return;
    }
    this.#frame.clear();
    this.#frame.add(frame);
    while (this.#isOpen && this.#link.send(this.#frame, 0) === 0) {
      await new Promise<void>((resolve) => this.#ready = resolve);
      this.#ready = undefined;
    }
  }
}

/**
 * An end made of two streams, for one front-end. Each chunk is a frame; a
 * writable that is slow makes the guest wait, and a guest that is slow the
 * readable.
 *
 * @example A card whose frames go through a TransformStream
 * ```ts
 * import { netDevice } from "vhost2";
 * const wire = new TransformStream<Uint8Array, Uint8Array>();
 * const nic = netDevice({ end: wire as never });
 * await nic.close();
 * ```
 */
export function streamEnd(streams: FrameStreams): NetEnd {
  let hasPort = false;
  return {
    name: "streams",
    offloads: 0,
    open(link) {
      if (hasPort) {
        throw new Vhost2Error(
          "IN_USE",
          `Cannot connect ${link.name}: the streams have a front-end`,
        );
      }
      hasPort = true;
      return new StreamPort(link, streams, () => hasPort = false);
    },
    async close() {
      await streams.readable.cancel().catch(() => {});
      await streams.writable.close().catch(() => {});
    },
  };
}
