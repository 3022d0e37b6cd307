// Back-ends that are killed in the middle of their work, and their guest, which
// notices a pause and nothing else.
import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { test } from "../harness.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { BACKEND } from "./backend.ts";
import { projectFolder } from "./cache.ts";
import { diskFile } from "./disk_file.ts";
import { type Guest, startGuest } from "./guest.ts";
import { type Format, lookAtInflight } from "./inflight_picture.ts";

const MiB = 1 << 20;
const KILLS = 20;
/** Requests that must be in flight when a back-end is killed. */
const IN_FLIGHT = 8;
/** Completions that each back-end makes before it is killed, at least. */
const COMPLETIONS = 20;

const NAME =
  `back-ends killed ${KILLS} times with requests in flight lose nothing and complete nothing twice`;
if (BACKEND === "vhost2") test(NAME, killed, 600);
else test.skip(NAME, "the storage daemon has no inflight region");

/** A back-end that takes the place of the one before. */
class Disk {
  readonly format: Format;
  readonly socketPath: string;
  readonly #filePath: string;
  #child: ChildProcess | undefined;
  #output = "";

  constructor(format: Format, socketPath: string, filePath: string) {
    this.format = format;
    this.socketPath = socketPath;
    this.#filePath = filePath;
  }

  async start(): Promise<void> {
    const project = projectFolder();
    const module = fileURLToPath(
      new URL("shuffling_disk.ts", import.meta.url),
    ).replace(/js$/, "ts");
    const child = spawn(join(project, "node_modules", "deno", "deno"), [
      ...["run", "--allow-all", "--no-prompt"],
      ...[module, this.socketPath, this.#filePath],
    ], { cwd: project, stdio: ["ignore", "pipe", "pipe"] });
    this.#child = child;
    this.#output = "";
    child.stderr!.on("data", (chunk) => this.#output += chunk);
    const [said] = await Promise.race([
      once(child.stdout!, "data"),
      once(child, "close"),
    ]);
    if (!String(said).includes("listening")) {
      throw new Error(`Back-end ended (${said}):\n${this.#output}`);
    }
  }

  /**
   * Kills the back-end at a moment at which it has enough requests in flight,
   * among them some that younger ones have overtaken.
   *
   * @returns how many requests were in flight
   */
  async kill(guest: Guest): Promise<number> {
    const child = this.#child!;
    const before = lookAtInflight(guest.pid, this.format)?.usedIndex ?? 0;
    const end = performance.now() + 60_000;
    for (;;) {
      // What a stopped process has done is what it would have been killed at.
      process.kill(child.pid!, "SIGSTOP");
      const picture = lookAtInflight(guest.pid, this.format);
      const done = ((picture?.usedIndex ?? before) - before) & 0x7fff;
      if (
        picture !== null && picture.inFlight >= IN_FLIGHT &&
        picture.isOutOfOrder && done >= COMPLETIONS
      ) {
        const closed = once(child, "close");
        process.kill(child.pid!, "SIGKILL");
        await closed;
        return picture.inFlight;
      }
      process.kill(child.pid!, "SIGCONT");
      if (performance.now() > end) {
        throw guest.failure(
          `Never ${IN_FLIGHT} requests in flight: ${JSON.stringify(picture)}`,
        );
      }
      await new Promise((resolve) => setTimeout(resolve, 7));
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    const child = this.#child;
    if (child === undefined || child.exitCode !== null) return;
    if (child.signalCode !== null) return;
    const closed = once(child, "close");
    process.kill(child.pid!, "SIGKILL");
    await closed;
  }
}

async function killed(): Promise<void> {
  using folder = new TemporaryFolder();
  using splitFile = diskFile(16 * MiB);
  using packedFile = diskFile(16 * MiB);
  await using split = new Disk("split", folder.file("split"), splitFile.path);
  await using packed = new Disk(
    "packed",
    folder.file("packed"),
    packedFile.path,
  );
  const disks = [split, packed];
  await Promise.all(disks.map((disk) => disk.start()));
  await using guest = await startGuest({
    cpus: 2,
    disks: disks.map(({ format, socketPath }) => ({
      id: format,
      socketPath,
      reconnectSeconds: 1,
      packed: format === "packed",
    })),
    script: `
      load() {
        seed=1
        while [ ! -e /tmp/enough ]; do
          verify mix $1 --size=${12 * MiB} --depth=32 --count=1000 \\
            --seed=$seed || return 1
          seed=$((seed + 1))
        done
      }
      for disk in vda vdb; do
        verify fill /dev/$disk --offset=${12 * MiB} --size=${4 * MiB}
      done
      echo loaded
      load /dev/vda & one=$!
      load /dev/vdb & other=$!
      read line
      touch /tmp/enough
      wait $one && wait $other || exit 1
      for disk in vda vdb; do
        verify check /dev/$disk --offset=${12 * MiB} --size=${4 * MiB}
      done
    `,
    lifetimeMs: 560_000,
  });
  await guest.waitFor(/^loaded$/);
  await guest.waitFor(/^verify mix running/);
  const found: number[] = [];
  for (let i = 0; i < KILLS; i++) {
    const inFlight = disks.map(async (disk) => {
      found.push(await disk.kill(guest));
      await disk.start();
    });
    await Promise.all(inFlight);
  }
  guest.type("enough");
  assert.equal(await guest.exited, 0);
  assert.equal(found.length, 2 * KILLS);
  assert.ok(found.every((count) => count >= IN_FLIGHT));
  const said = guest.lines.join("\n");
  assert.equal(said.match(/^verify check ok/gm)?.length, 2);
  // What Linux says of a head that comes back twice, or that it never gave.
  assert.doesNotMatch(said, /is not a head|out of range|I\/O error|FAILED/);
}
