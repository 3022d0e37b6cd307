/**
 * DPDK's testpmd, driven by its command line.
 *
 * @module
 */

import { type ChildProcess, spawn } from "node:child_process";
import { testpmdProgram } from "../../tests/support/testpmd.ts";

/** Packets that the one port has received and sent. */
export interface PortCounts {
  readonly received: number;
  readonly sent: number;
  /** Milliseconds, of any clock that goes on. */
  readonly time: number;
}

const prompt = "testpmd> ";

/** A running testpmd with one port. */
export class Testpmd {
  readonly process: ChildProcess;
  #output = "";
  #wake = () => {};

  private constructor(process: ChildProcess) {
    this.process = process;
    const take = (text: string) => {
      this.#output += text;
      this.#wake();
    };
    process.stdout!.setEncoding("utf8").on("data", take);
    // Apart: it would cut the prompt in two.
    process.stderr!.resume();
    process.once("close", () => this.#wake());
  }

  /**
   * The program has to be there (`testpmdProgram` is not null).
   *
   * Both of its threads on processor `cpu`; it needs neither huge pages nor a
   * network card.
   *
   * @param device the argument of `--vdev`
   */
  static async start(cpu: number, device: string): Promise<Testpmd> {
    // Unbuffered: what it prints is waited for.
    const child = spawn("stdbuf", [
      ...["--output=0", testpmdProgram!, "--lcores", `0@${cpu},1@${cpu}`],
      ...["--no-huge", "--no-pci"],
      ...["-m", "512", "--single-file-segments", "--no-telemetry"],
      ...["--file-prefix", `vhost2-${Math.random().toString(36).slice(2)}`],
      ...["--vdev", device, "--", "--interactive"],
      "--total-num-mbufs=16384",
    ], { stdio: ["pipe", "pipe", "pipe"] });
    const made = new Testpmd(child);
    await made.#until(prompt);
    return made;
  }

  /** What it prints, up to and with `text`. */
  async #until(text: string): Promise<string> {
    for (;;) {
      const at = this.#output.indexOf(text);
      if (at >= 0) {
        const end = at + text.length;
        const found = this.#output.slice(0, end);
        this.#output = this.#output.slice(end);
        return found;
      }
      if (this.process.exitCode !== null) {
        throw new Error(`dpdk-testpmd ended:\n${this.#output}`);
      }
      await new Promise<void>((resolve) => this.#wake = resolve);
    }
  }

  /** Gives a command and returns what it answers. */
  ask(command: string): Promise<string> {
    this.process.stdin!.write(`${command}\n`);
    return this.#until(prompt);
  }

  async counts(): Promise<PortCounts> {
    const text = await this.ask("show port stats 0");
    const time = performance.now();
    const field = (name: string) =>
      Number(new RegExp(`${name}-packets:\\s+(\\d+)`).exec(text)?.[1] ?? NaN);
    return { received: field("RX"), sent: field("TX"), time };
  }

  async stop(): Promise<void> {
    const ended = new Promise((resolve) => this.process.once("close", resolve));
    this.process.stdin!.write("quit\n");
    const limit = setTimeout(() => this.process.kill("SIGKILL"), 5000);
    await ended;
    clearTimeout(limit);
  }
}
