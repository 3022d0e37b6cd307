/**
 * Where the checkout and its tools are, and child processes, for tests that
 * look at the project from outside.
 *
 * @module
 */

import { type ChildProcess, spawn } from "node:child_process";
import { mkdtempSync, realpathSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";

/** The checkout; a transpiled copy of the tests has links back to it. */
export const root: string = dirname(
  realpathSync(fileURLToPath(new URL("../../package.json", import.meta.url))),
);

/** One of the pinned tools. */
export function tool(name: "deno" | "zig" | "tsc"): string {
  const folder = join(root, "node_modules");
  // Not linked in .bin: `deno task` would mistake that for JavaScript.
  return name === "deno"
    ? join(folder, "deno", "deno")
    : join(folder, ".bin", name);
}

/** "x86_64" or "aarch64", as the libraries are named. */
export const architecture: string =
  ({ x64: "x86_64", arm64: "aarch64" } as Record<string, string>)[
    process.arch
  ] ?? process.arch;

/** Runs `body` with a new empty folder, which is gone afterwards. */
export async function withFolder<T>(
  body: (folder: string) => T | Promise<T>,
): Promise<T> {
  const folder = mkdtempSync(join(tmpdir(), "vhost2-packaging-"));
  try {
    return await body(folder);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

export interface RunOptions {
  readonly cwd?: string;
  /** Added to the environment; undefined takes a variable out. */
  readonly env?: Record<string, string | undefined>;
  /** Text given as standard input, which ends then. */
  readonly input?: string;
}

export interface Outcome {
  /** Exit code, or the signal's name. */
  readonly status: number | string;
  readonly stdout: string;
  readonly stderr: string;
}

/** A child that is given up after this long, in ms. */
const limitMs = 240_000;

/** A child process whose output is collected and can be waited for. */
export class Child {
  readonly process: ChildProcess;
  readonly finished: Promise<Outcome>;
  #stdout = "";
  #stderr = "";
  readonly #waiters = new Set<() => void>();

  constructor([program, ...args]: string[], options: RunOptions = {}) {
    const env: Record<string, string | undefined> = {
      ...process.env,
      NO_COLOR: "1",
    };
    for (const [name, value] of Object.entries(options.env ?? {})) {
      if (value === undefined) delete env[name];
      else env[name] = value;
    }
    const child = spawn(program, args, {
      cwd: options.cwd,
      env,
      stdio: ["pipe", "pipe", "pipe"],
    });
    this.process = child;
    child.stdout.setEncoding("utf8").on("data", (text: string) => {
      this.#stdout += text;
      this.#wake();
    });
    child.stderr.setEncoding("utf8").on("data", (text: string) => {
      this.#stderr += text;
    });
    // A child that ends early does not read what it was given.
    child.stdin.on("error", () => {});
    if (options.input !== undefined) child.stdin.end(options.input);
    const limit = setTimeout(() => child.kill("SIGKILL"), limitMs);
    this.finished = new Promise((resolve, reject) => {
      child.on("error", reject);
      child.on("close", (code, signal) => {
        resolve({
          status: signal ?? code ?? -1,
          stdout: this.#stdout,
          stderr: this.#stderr,
        });
      });
    });
    this.finished.catch(() => {}).finally(() => {
      clearTimeout(limit);
      this.#wake();
    });
  }

  #wake(): void {
    for (const waiter of this.#waiters) waiter();
  }

  /** Resolves with the first such line; rejects when the child ends before it. */
  async line(wanted: RegExp): Promise<string> {
    let waiter: () => void = () => {};
    const written = new Promise<string>((resolve) => {
      waiter = () => {
        const lines = this.#stdout.split("\n").slice(0, -1);
        const found = lines.find((line) => wanted.test(line));
        if (found !== undefined) resolve(found);
      };
    });
    const ended = this.finished.then<never>(({ status, stdout, stderr }) => {
      throw new Error(
        `Ended with ${status} before ${wanted}:\n${stdout}${stderr}`,
      );
    });
    this.#waiters.add(waiter);
    waiter();
    try {
      return await Promise.race([written, ended]);
    } finally {
      this.#waiters.delete(waiter);
    }
  }

  /**
   * Sends a signal. (`ChildProcess.kill` makes Deno report the signal as the
   * child's end even when the child handled it.)
   */
  signal(name: "SIGTERM"): void {
    if (this.process.pid !== undefined) process.kill(this.process.pid, name);
  }

  /** Ends the child's standard input and waits for its end. */
  async end(): Promise<Outcome> {
    this.process.stdin?.end();
    return await this.finished;
  }
}

/** Runs a program to its end. */
export function run(
  command: string[],
  options: RunOptions = {},
): Promise<Outcome> {
  return new Child(command, { input: "", ...options }).finished;
}

/** Runs a program that must succeed; returns its standard output. */
export async function succeed(
  command: string[],
  options: RunOptions = {},
): Promise<string> {
  const { status, stdout, stderr } = await run(command, options);
  if (status !== 0) {
    throw new Error(
      `${command.join(" ")} ended with ${status}:\n${stdout}${stderr}`,
    );
  }
  return stdout;
}
