/**
 * One Worker, as the registering thread sees it: started, told, asked, ended.
 *
 * A Worker that has died leaves its native objects behind. They are released
 * here, when its thread has ended and can touch none of them any more, and
 * only then its calls are answered.
 *
 * @module
 */

import {
  MessageChannel,
  type MessagePort,
  receiveMessageOnPort,
  Worker,
} from "node:worker_threads";
import { core } from "../../ffi/core.ts";
import { check, errorFromMessage, Vhost2Error } from "../../ffi/errors.ts";
import { makeAccounts, releaseHeld } from "../../ffi/held.ts";
import { hostUrl } from "./host.ts";
import {
  type Answer,
  Control,
  type FromWorker,
  type ToWorker,
  type WorkerSetup,
} from "./messages.ts";

/** A Worker that takes no message for so long is ended. */
const unresponsiveMs = 10_000;
/** Between two looks whether its thread has ended. */
const threadPollMs = 2;
/** A thread that has not ended after so long is left alone (see `onLost`). */
const threadEndMs = 3_000;

/** What a Worker serves. */
export interface ThreadOptions {
  readonly module: string;
  readonly name: string;
  readonly options: unknown;
  /** What it says beside its answers. */
  onMessage(message: FromWorker): void;
  /**
   * It has ended without having been asked to, or cannot be reached and is
   * being ended. Its thread may still be at work: Deno cannot interrupt
   * JavaScript that does not return.
   */
  onLost(cause: Error): void;
  /**
   * The thread of a Worker that was lost has ended. What it held is in
   * `accounts` until this returns.
   */
  onDeath(cause: Error, accounts: SharedArrayBuffer): void;
}

type Omitted<T> = T extends unknown ? Omit<T, "call"> : never;
/** A message that is answered. */
export type Question = Omitted<Extract<ToWorker, { call: number }>>;

interface Pending {
  resolve(answer: Answer): void;
  reject(error: Error): void;
}

/**
 * The Worker's program: it imports the host from where this module was loaded,
 * whatever that is: a checkout, a package, an https URL.
 */
function program(): URL {
  // Not a literal import: `deno test` would check its types for each Worker.
  const code = `const host = ${JSON.stringify(hostUrl)};
await (await import(host)).serve();`;
  return new URL(`data:text/javascript,${encodeURIComponent(code)}`);
}

/** A running Worker. */
export class WorkerThread {
  /** Fulfilled when it serves; rejects when its module cannot be imported. */
  readonly ready: Promise<void>;
  /** Fulfilled when it has ended and all that it held is released. */
  readonly ended: Promise<void>;
  readonly #options: ThreadOptions;
  readonly #worker: Worker;
  readonly #port: MessagePort;
  readonly #wakeFd: number;
  readonly #accounts = makeAccounts();
  readonly #control = new Int32Array(new SharedArrayBuffer(Control.byteSize));
  readonly #pending = new Map<number, Pending>();
  readonly #watchdogs = new Set<ReturnType<typeof setTimeout>>();
  #nextCall = 1;
  #posted = 0;
  #cause: Error | undefined;
  #isEnding = false;
  #hasExited = false;
  #isOver = false;
  /** It has served: its death is not that of a start that failed. */
  wasReady = false;
  #becomeReady: () => void = () => {};
  #failReady: (error: Error) => void = () => {};

  constructor(options: ThreadOptions) {
    this.#options = options;
    this.#wakeFd = check(core.eventfdCreate(), "Cannot wake a Worker");
    const { port1, port2 } = new MessageChannel();
    this.#port = port1;
    const workerData: WorkerSetup = {
      port: port2,
      wakeFd: this.#wakeFd,
      accounts: this.#accounts,
      control: this.#control.buffer as SharedArrayBuffer,
      module: options.module,
      name: options.name,
      options: options.options,
    };
    try {
      this.#worker = new Worker(program(), {
        workerData,
        transferList: [port2],
      });
    } catch (cause) {
      port1.close();
      core.descriptorClose(this.#wakeFd);
      throw new Vhost2Error(
        "OPTION",
        `Cannot start a Worker for ${options.module}: ${
          cause instanceof Error ? cause.message : cause
        }`,
        { cause },
      );
    }
    this.ready = new Promise((resolve, reject) => {
      this.#becomeReady = resolve;
      this.#failReady = reject;
    });
    this.ready.catch(() => {});
    port1.on("message", (message: FromWorker) => this.#take(message));
    this.#worker.on("error", (error) => this.#cause ??= error as Error);
    this.ended = new Promise((resolve) => {
      this.#worker.once("exit", () => resolve(this.#finish()));
    });
  }

  /** It serves no more, or is about to stop serving. */
  get isOver(): boolean {
    return this.#hasExited || this.#isEnding || this.#cause !== undefined;
  }

  /** Tells it something. */
  post(message: ToWorker): void {
    if (this.#isOver) return;
    this.#port.postMessage(message);
    this.#posted++;
    core.eventfdSignal(this.#wakeFd);
  }

  /**
   * Asks it for something that it answers. Rejects with the error that it
   * answers, or with CLOSED when it has died.
   */
  ask(question: Question): Promise<Answer> {
    if (this.#isOver) return Promise.reject(this.#gone());
    const call = this.#nextCall++;
    const answered = new Promise<Answer>((resolve, reject) => {
      this.#pending.set(call, { resolve, reject });
    });
    this.post({ ...question, call } as ToWorker);
    this.#expect(this.#posted);
    return answered;
  }

  #gone(): Vhost2Error {
    const cause = this.#cause;
    return new Vhost2Error(
      "CLOSED",
      `Cannot ask a Worker: it has ended${cause ? ` (${cause.message})` : ""}`,
      { cause },
    );
  }

  /** Ends the Worker if it has not taken `count` messages in time. */
  #expect(count: number): void {
    if (this.#hasExited) return;
    const timer = setTimeout(() => {
      this.#watchdogs.delete(timer);
      if (this.#isOver) return;
      if (Atomics.load(this.#control, Control.received) >= count) return;
      this.#cause ??= new Vhost2Error(
        "TIMEOUT",
        `Cannot reach a Worker: its device has kept it busy for ${
          unresponsiveMs / 1000
        } s`,
      );
      this.#worker.terminate();
    }, unresponsiveMs);
    timer.unref();
    this.#watchdogs.add(timer);
  }

  #take(message: FromWorker): void {
    switch (message.kind) {
      case "ready":
        this.wasReady = true;
        return this.#becomeReady();
      case "answer": {
        const pending = this.#pending.get(message.call);
        this.#pending.delete(message.call);
        return pending?.resolve(message.answer);
      }
      case "died":
        this.#cause ??= errorFromMessage(message.error);
        this.#worker.terminate();
        return;
      case "ended":
        this.#worker.terminate();
        return;
      default:
        this.#options.onMessage(message);
    }
  }

  /** The isolate has ended, or should have; its thread may be in the core. */
  async #finish(): Promise<void> {
    this.#hasExited = true;
    for (;;) {
      const left = receiveMessageOnPort(this.#port);
      if (left === undefined) break;
      this.#take(left.message);
    }
    this.#port.close();
    for (const timer of this.#watchdogs) clearTimeout(timer);
    this.#watchdogs.clear();
    const isLost = !this.#isEnding;
    if (isLost) {
      this.#cause ??= new Error("it was ended or has exited");
      this.#options.onLost(this.#cause);
    }
    const gone = this.#threadEnded().then(() => {
      // Nobody is asked any more; who was, is told when all is released.
      this.#isOver = true;
      if (isLost) this.#options.onDeath(this.#cause!, this.#accounts);
      releaseHeld(this.#accounts);
      core.descriptorClose(this.#wakeFd);
      this.#rejectAll();
    });
    let timer: ReturnType<typeof setTimeout> | undefined;
    const limit = new Promise<void>((resolve) => {
      timer = setTimeout(resolve, threadEndMs);
    });
    await Promise.race([gone, limit]);
    clearTimeout(timer);
    if (this.#isOver) return;
    // Stuck: what it may touch stays as it is until it ends after all.
    this.#isOver = true;
    this.#rejectAll();
  }

  async #threadEnded(): Promise<void> {
    const thread = Atomics.load(this.#control, Control.thread);
    while (thread !== 0 && core.threadIsAlive(thread) === 1) {
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, threadPollMs);
        // Stuck: the process need not wait for it.
        if (this.#isOver) timer.unref();
      });
    }
  }

  #rejectAll(): void {
    const gone = this.#gone();
    this.#failReady(this.#cause ?? gone);
    for (const { reject } of this.#pending.values()) reject(gone);
    this.#pending.clear();
  }

  /** Ends it: nothing runs in it any more. */
  async end(): Promise<void> {
    if (!this.#isOver && !this.#isEnding) {
      this.#isEnding = true;
      this.post({ kind: "end" });
      this.#expect(this.#posted);
    }
    await this.ended;
  }
}
