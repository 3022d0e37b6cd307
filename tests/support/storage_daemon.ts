/** QEMU's storage daemon: a vhost-user-blk back-end that is not ours. */

import { type ChildProcess, spawn, spawnSync } from "node:child_process";
import { Events, within } from "./wait.ts";

const program = "qemu-storage-daemon";

/** Why the daemon cannot be used; null if it can. */
export function storageDaemonMissing(): string | null {
  const found = spawnSync(program, ["--version"]);
  return found.status === 0
    ? null
    : `${program} is missing (Debian: apt-get install qemu-system-common)`;
}

/** A running daemon that exports one disk. */
export class StorageDaemon {
  readonly #child: ChildProcess;
  readonly #lines: Events<string>;
  readonly #exited: Promise<void>;

  private constructor(child: ChildProcess, lines: Events<string>) {
    this.#child = child;
    this.#lines = lines;
    this.#exited = new Promise((resolve) =>
      child.once("close", () => resolve())
    );
  }

  /**
   * Starts it and awaits that it listens.
   *
   * @param blockdev options of the block device, without a node name
   * @param socketPath where to listen
   */
  static async start(
    blockdev: string,
    socketPath: string,
    queueCount = 1,
  ): Promise<StorageDaemon> {
    const child = spawn(program, [
      "--blockdev",
      `${blockdev},node-name=disk`,
      "--export",
      `vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=${queueCount},addr.type=unix,addr.path=${socketPath}`,
      "--chardev",
      "stdio,id=monitor",
      "--monitor",
      "chardev=monitor",
    ], { stdio: ["pipe", "pipe", "inherit"] });
    const lines = new Events<string>();
    let rest = "";
    child.stdout!.setEncoding("utf8");
    child.stdout!.on("data", (text: string) => {
      const parts = (rest + text).split("\n");
      rest = parts.pop()!;
      for (const line of parts) lines.push(line);
    });
    child.once("error", (error) => lines.push(`{"error": "${error.message}"}`));
    child.once("close", (code) => lines.push(`{"error": "ended: ${code}"}`));
    const daemon = new StorageDaemon(child, lines);
    try {
      // Commands are answered once all options, the export too, are in place.
      await daemon.command("qmp_capabilities");
    } catch (error) {
      await daemon.stop();
      throw error;
    }
    return daemon;
  }

  /** A monitor command; rejects when it failed. */
  async command(
    execute: string,
    parameters: Record<string, unknown> = {},
  ): Promise<void> {
    const text = JSON.stringify({ execute, arguments: parameters });
    this.#child.stdin!.write(`${text}\n`);
    const answer = await this.#lines.find((line) =>
      line.includes(`"return"`) || line.includes(`"error"`)
    );
    if (answer.includes(`"error"`)) throw new Error(`${execute}: ${answer}`);
  }

  /** Ends the daemon and awaits its end. */
  async stop(): Promise<void> {
    this.#child.kill("SIGKILL");
    await within(this.#exited, `end of ${program}`);
  }
}
