/**
 * The command in a process of its own, in the runtime of the tests.
 *
 * @module
 */

import { type ChildProcess, spawn } from "node:child_process";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { isNode } from "../harness.ts";

// In Node the tests are transpiled, and the command with them.
const extension = import.meta.url.endsWith(".js") ? "js" : "ts";
const main = fileURLToPath(
  new URL(`../../cli/main.${extension}`, import.meta.url),
);

/** A running command. */
export class Command {
  readonly child: ChildProcess;
  /** Settles when the process has ended: its exit code, or its signal. */
  readonly ended: Promise<number | string>;
  stdout = "";
  stderr = "";
  readonly #lookers = new Set<() => void>();

  /** `stdio`: what its descriptors 3 and up are. */
  constructor(words: readonly string[], stdio: readonly number[] = []) {
    const start = isNode ? [main] : ["run", "--allow-all", "--no-prompt", main];
    this.child = spawn(process.execPath, [...start, ...words], {
      stdio: ["ignore", "pipe", "pipe", ...stdio],
      env: { ...process.env, NO_COLOR: "1" },
    });
    const { stdout, stderr } = this.child;
    stdout!.setEncoding("utf8");
    stderr!.setEncoding("utf8");
    stdout!.on("data", (text) => {
      this.stdout += text;
      this.#look();
    });
    stderr!.on("data", (text) => {
      this.stderr += text;
      this.#look();
    });
    this.ended = new Promise((resolve, reject) => {
      this.child.on("error", reject);
      this.child.on("close", (code, signal) => {
        resolve(code ?? signal ?? "");
        this.#look();
      });
    });
  }

  #look(): void {
    for (const look of [...this.#lookers]) look();
  }

  /** Fulfilled once it has printed what matches; rejects when it ends first. */
  async printed(pattern: RegExp): Promise<void> {
    let hasEnded = false;
    const end = this.ended.then(() => {
      hasEnded = true;
    });
    while (!pattern.test(this.stdout + this.stderr)) {
      if (hasEnded) {
        throw new Error(`It ended without ${pattern}: ${this.stderr}`);
      }
      let look = () => {};
      const printed = new Promise<void>((resolve) => look = resolve);
      this.#lookers.add(look);
      await Promise.race([printed, end]);
      this.#lookers.delete(look);
    }
  }

  /**
   * Sends a signal. Not by `child.kill`: after that Deno reports the signal as
   * the end's cause, even of a process that handled it and exited.
   */
  signal(name: "SIGTERM" | "SIGINT" | "SIGKILL"): void {
    const { pid, exitCode, signalCode } = this.child;
    if (pid !== undefined && exitCode === null && signalCode === null) {
      process.kill(pid, name);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.signal("SIGKILL");
    await this.ended;
  }
}

/** Runs a command to its end. */
export async function run(...words: string[]) {
  await using command = new Command(words);
  const code = await command.ended;
  return { code, stdout: command.stdout, stderr: command.stderr };
}
