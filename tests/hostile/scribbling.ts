/** Garbage from another thread, while the device reads. */

import { Worker } from "node:worker_threads";
import { eventually } from "../support/wait.ts";
import type { RamRegion } from "../../frontend/mod.ts";

/** The words that the two threads share, and what the first one says. */
export const Scribbling = {
  state: 0,
  isReady: 1,
  pause: 0,
  run: 1,
  end: 2,
} as const;

/** The other thread; start it before descriptors are counted. */
export class ScribblingThread {
  readonly #control = new Int32Array(new SharedArrayBuffer(8));
  readonly #ended: Promise<unknown>;

  private constructor(
    region: RamRegion,
    ranges: readonly (readonly [number, number])[],
    seed: number,
  ) {
    const extension = import.meta.url.slice(import.meta.url.lastIndexOf("."));
    const url = new URL(`./scribble_worker${extension}`, import.meta.url);
    const { fd, size } = region;
    const workerData = { control: this.#control, fd, size, ranges, seed };
    const worker = new Worker(url, { workerData });
    this.#ended = new Promise((resolve, reject) => {
      worker.once("exit", resolve);
      worker.once("error", reject);
    });
  }

  /**
   * @param ranges byte offset and length of what is written over, aligned to 4
   */
  static async start(
    region: RamRegion,
    ranges: readonly (readonly [number, number])[],
    seed: number,
  ): Promise<ScribblingThread> {
    const thread = new ScribblingThread(region, ranges, seed);
    await eventually(
      () => Atomics.load(thread.#control, Scribbling.isReady) === 1,
      "the other thread has mapped the memory",
    );
    return thread;
  }

  run(): void {
    this.#tell(Scribbling.run);
  }

  pause(): void {
    this.#tell(Scribbling.pause);
  }

  async end(): Promise<void> {
    this.#tell(Scribbling.end);
    await this.#ended;
  }

  #tell(state: number): void {
    Atomics.store(this.#control, Scribbling.state, state);
    Atomics.notify(this.#control, Scribbling.state);
  }
}
