/**
 * A child process that is spoken to by lines.
 *
 * @module
 */

import { type ChildProcess, spawn } from "node:child_process";
import process from "node:process";

/** A running program. */
export class Child {
  readonly #process: ChildProcess;
  readonly #lines: string[] = [];
  readonly #ended: Promise<void>;
  #wake = () => {};
  #hasEnded = false;

  constructor(command: readonly string[]) {
    const [program, ...args] = command;
    this.#process = spawn(program, args, {
      stdio: ["pipe", "pipe", "inherit"],
    });
    let rest = "";
    this.#process.stdout!.setEncoding("utf8").on("data", (text: string) => {
      const parts = (rest + text).split("\n");
      rest = parts.pop()!;
      this.#lines.push(...parts);
      this.#wake();
    });
    // Who has ended does not read what is written to it.
    this.#process.stdin!.on("error", () => {});
    this.#ended = new Promise((resolve) => {
      const end = () => {
        this.#hasEnded = true;
        this.#wake();
        resolve();
      };
      this.#process.once("close", end);
      this.#process.once("error", end);
    });
  }

  get pid(): number {
    return this.#process.pid!;
  }

  /** The next line that it writes. Throws when it has ended instead. */
  async line(): Promise<string> {
    while (this.#lines.length === 0) {
      if (this.#hasEnded) {
        throw new Error(
          `${this.#process.spawnfile} ended (${
            this.#process.exitCode ?? this.#process.signalCode
          }) before it answered`,
        );
      }
      await new Promise<void>((resolve) => this.#wake = resolve);
    }
    return this.#lines.shift()!;
  }

  /** Sends a line and returns the next one that comes. */
  ask(word: string): Promise<string> {
    this.#process.stdin!.write(`${word}\n`);
    return this.line();
  }

  /** It gets no processor time until `resume`. */
  suspend(): void {
    this.#signal("SIGSTOP");
  }

  resume(): void {
    this.#signal("SIGCONT");
  }

  /** Its own `kill` takes a process that was sent any signal for a dead one. */
  #signal(signal: "SIGSTOP" | "SIGCONT" | "SIGTERM" | "SIGKILL"): void {
    if (!this.#hasEnded) process.kill(this.pid, signal);
  }

  /** Fulfilled when it has ended. */
  async stop(signal: "SIGTERM" | "SIGKILL" = "SIGTERM"): Promise<void> {
    this.#signal(signal);
    // One that is suspended takes the signal only then.
    this.resume();
    await this.#ended;
  }

  get hasEnded(): boolean {
    return this.#hasEnded;
  }
}
