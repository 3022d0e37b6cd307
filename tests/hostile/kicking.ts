/** Kicks from another thread, without end. */

import { Worker } from "node:worker_threads";
import { eventually } from "../support/wait.ts";

/** Words that the two threads share. */
export const Kicking = {
  /** How many eventfds to signal; -1: end. */
  count: 0,
  /** How often all were signalled. */
  rounds: 1,
  /** 1 while the other thread touches no eventfd. */
  isIdle: 2,
} as const;

/** The other thread; it lives longer than the descriptors that are counted. */
export class Kicker {
  readonly #control = new Int32Array(new SharedArrayBuffer(12));
  readonly #fds: Int32Array;
  readonly #ended: Promise<unknown>;

  private constructor(capacity: number) {
    this.#fds = new Int32Array(new SharedArrayBuffer(4 * capacity));
    const extension = import.meta.url.slice(import.meta.url.lastIndexOf("."));
    const url = new URL(`./kick_worker${extension}`, import.meta.url);
    const workerData = { control: this.#control, fds: this.#fds };
    const worker = new Worker(url, { workerData });
    this.#ended = new Promise((resolve, reject) => {
      worker.once("exit", resolve);
      worker.once("error", reject);
    });
  }

  static async start(capacity: number): Promise<Kicker> {
    const kicker = new Kicker(capacity);
    await kicker.#whenIdle();
    return kicker;
  }

  get rounds(): number {
    return Atomics.load(this.#control, Kicking.rounds);
  }

  kick(fds: readonly number[]): void {
    this.#fds.set(fds);
    this.#tell(fds.length);
  }

  /** Afterwards the descriptors may be closed. */
  async pause(): Promise<void> {
    this.#tell(0);
    await this.#whenIdle();
  }

  async end(): Promise<void> {
    this.#tell(-1);
    await this.#ended;
  }

  #tell(count: number): void {
    Atomics.store(this.#control, Kicking.count, count);
    Atomics.notify(this.#control, Kicking.count);
  }

  async #whenIdle(): Promise<void> {
    await eventually(
      () => Atomics.load(this.#control, Kicking.isIdle) === 1,
      "the other thread is idle",
    );
  }
}
