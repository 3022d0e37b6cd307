// The command is killed under load and started again: its guest notices a
// pause, and nothing else.
import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { BlkClient } from "../../frontend/mod.ts";
import { test } from "../harness.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { Signal, within } from "../support/wait.ts";
import { Command } from "./command.ts";

const blockSize = 4096;
const workers = 32;
const kills = 3;
/** Requests between two kills. */
const requestsPerLife = 200;

/** Writes to its block and reads back, until it is told to stop. */
class Worker {
  /** What was last written and completed. */
  version = 0;
  requests = 0;
  readonly #client: BlkClient;
  readonly #offset: number;
  readonly #completed: () => void;

  constructor(client: BlkClient, index: number, completed: () => void) {
    this.#client = client;
    this.#offset = index * blockSize;
    this.#completed = completed;
  }

  block(): Uint8Array<ArrayBuffer> {
    const words = new Uint32Array(blockSize / 4);
    words.fill(this.#offset + this.version);
    return new Uint8Array(words.buffer);
  }

  async run(isWanted: () => boolean): Promise<void> {
    while (isWanted()) {
      this.version++;
      await this.#client.write(this.#offset, this.block());
      this.#done();
      const found = await this.#client.read(this.#offset, blockSize);
      this.#done();
      assert.deepEqual(found, this.block(), `block at ${this.#offset}`);
    }
  }

  #done(): void {
    this.requests++;
    this.#completed();
  }
}

for (const packed of [false, true]) {
  const format = packed ? "packed" : "split";
  test(
    `a disk killed with SIGKILL under load loses and doubles nothing (${format} ring)`,
    () =>
      withoutDescriptorLeak(async () => {
        using folder = new TemporaryFolder();
        const path = folder.file("socket");
        const file = folder.file("disk");
        writeFileSync(file, new Uint8Array(1 << 20));
        const start = async () => {
          const words = ["blk", "--socket-path", path, "--blk-file", file];
          const command = new Command(words);
          await within(command.printed(/listening/), "the command's start");
          return command;
        };
        let command = await start();
        try {
          const client = await BlkClient.open({ path, packed, recovers: true });
          const progress = new Signal();
          let isWanted = true;
          const all = Array.from(
            { length: workers },
            (_, i) => new Worker(client, i, () => progress.notify()),
          );
          const running = all.map((worker) => worker.run(() => isWanted));
          // A failure ends the test, not the process.
          const failed = Promise.all(running);
          failed.catch(() => progress.notify());
          const requests = () => all.reduce((sum, w) => sum + w.requests, 0);
          for (let life = 0; life <= kills; life++) {
            const goal = requests() + requestsPerLife;
            await progress.until(() => requests() >= goal, "requests complete");
            if (life === kills) break;
            command.signal("SIGKILL");
            await command.ended;
            command = await start();
            await within(client.device.reconnect(), "the reconnect");
          }
          isWanted = false;
          await within(failed, "the last requests");
          const [driver] = client.device.queues;
          assert.deepEqual(driver.strays, [], "no head came back twice");
          assert.equal(driver.usedCount, requests());
          assert.equal(driver.inFlight, 0);
          await client.close();
          command.signal("SIGTERM");
          assert.equal(await command.ended, 0);
          const bytes = readFileSync(file);
          all.forEach((worker, i) =>
            assert.deepEqual(
              new Uint8Array(
                bytes.subarray(i * blockSize, (i + 1) * blockSize),
              ),
              worker.block(),
            )
          );
        } finally {
          await command[Symbol.asyncDispose]();
        }
      }),
    120,
  );
}
