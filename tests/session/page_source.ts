/** The machine that a guest comes from: fills the pages that are waited for. */

import { Worker } from "node:worker_threads";
import { eventually } from "../support/wait.ts";

export const pageSize = 4096;

/** Words that the two threads share. */
export const SourceWord = {
  /** The userfaultfd to serve; -1: none. */
  fd: 0,
  /** 1: that userfaultfd is being read; 0: none is; -1: not there yet. */
  isServing: 1,
  /** Pages of that userfaultfd filled. */
  filled: 2,
} as const;

/** What the guest has in the page at `address`. */
export function pageAt(address: bigint): Uint8Array<ArrayBuffer> {
  const seed = Number((address / BigInt(pageSize)) & 0xffn) | 1;
  return Uint8Array.from({ length: pageSize }, (_, i) => (seed * (i + 3)) >> 2);
}

/**
 * Fills missing pages in a thread of its own: this one sleeps when the
 * back-end, which is in this process too, touches one. One thread for a whole
 * file of tests, as descriptors are counted and a runtime closes those of its
 * threads when it likes.
 */
export class PageSource {
  readonly #control = new Int32Array(new SharedArrayBuffer(12));

  constructor() {
    this.#control[SourceWord.fd] = -1;
    this.#control[SourceWord.isServing] = -1;
    const extension = import.meta.url.slice(import.meta.url.lastIndexOf("."));
    const url = new URL(`./page_source_worker${extension}`, import.meta.url);
    const worker = new Worker(url, { workerData: this.#control });
    worker.once("error", (error) => {
      throw error;
    });
    worker.unref();
  }

  /** Serves a userfaultfd, from here on the source's; fulfilled when it does. */
  async serve(fd: number): Promise<void> {
    Atomics.store(this.#control, SourceWord.filled, 0);
    await this.#set(fd);
  }

  /** Closes the userfaultfd. */
  async stop(): Promise<void> {
    await this.#set(-1);
  }

  async #set(fd: number): Promise<void> {
    Atomics.store(this.#control, SourceWord.fd, fd);
    Atomics.notify(this.#control, SourceWord.fd);
    const wanted = fd < 0 ? 0 : 1;
    await eventually(
      () => Atomics.load(this.#control, SourceWord.isServing) === wanted,
      "the page source serves, or has stopped",
    );
  }

  /** Pages filled since `serve`. */
  get filled(): number {
    return Atomics.load(this.#control, SourceWord.filled);
  }
}
