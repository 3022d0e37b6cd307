/** A command device behind Workers, for one test. */

import assert from "node:assert/strict";
import { readdirSync } from "node:fs";
import { Worker } from "node:worker_threads";
import type { VhostUserDevice } from "../../frontend/mod.ts";
import type { DeviceModule } from "../../mod.ts";
import { eventually, within } from "../support/wait.ts";
import { type ServeOptions, serving } from "./served.ts";
import type { Served } from "./served.ts";
import { type CommandOptions, Word } from "./worker_device.ts";

// The runtime keeps descriptors and a thread from its first Worker on.
const first = new Worker(new URL("data:text/javascript,"));
await new Promise((resolve) => first.once("exit", resolve));

const extension = import.meta.url.slice(import.meta.url.lastIndexOf("."));
/** URL of the module with the device. */
export const moduleUrl: string =
  new URL(`./worker_device${extension}`, import.meta.url).href;

/** What a test has in hand. */
export interface WorkerWorld extends Served {
  readonly words: Int32Array;
  /** Fulfilled when a word has reached a value. */
  reached(word: number, value: number): Promise<void>;
}

/** The device's module. */
export function commandModule(
  words: SharedArrayBuffer,
  options: Partial<CommandOptions> = {},
): DeviceModule {
  return {
    module: moduleUrl,
    name: "commandDevice",
    options: { words, ...options } satisfies CommandOptions,
    sharedBytes: 8,
  };
}

/** Threads of this process now. */
export function threadCount(): number {
  return readdirSync("/proc/self/task").length;
}

/** `serving`, in two Workers unless told otherwise. */
export async function servingInWorkers(
  options: ServeOptions & { readonly device?: never } & {
    readonly command?: Partial<CommandOptions>;
  },
  body: (world: WorkerWorld) => Promise<void>,
): Promise<void> {
  const shared = new SharedArrayBuffer(Word.byteSize);
  const words = new Int32Array(shared);
  await serving({
    module: commandModule(shared, options.command),
    workers: 2,
    ...options,
  }, (served) =>
    body({
      ...served,
      words,
      reached: (word, value) =>
        eventually(
          () => Atomics.load(words, word) >= value,
          () => `word ${word} is ${value}, not ${words[word]}`,
        ),
    }));
}

/** Sends a command; the words that it is answered with. */
export async function ask(
  guest: VhostUserDevice,
  command: string,
  index = 0,
): Promise<string> {
  const { written, data } = await within(
    guest.queues[index].submit({
      readable: [new TextEncoder().encode(command)],
      writable: [64],
    }),
    command,
  );
  return new TextDecoder().decode(data[0].subarray(0, written));
}

/** Sends a command that is not answered, or not soon. */
export function send(
  guest: VhostUserDevice,
  command: string,
  index = 0,
): Promise<{ written: number }> {
  const answered = guest.queues[index].submit({
    readable: [new TextEncoder().encode(command)],
    writable: [64],
  });
  answered.catch(() => {});
  return answered;
}

let sequence = 0;

/** The queue works: words that nobody sent before come back. */
export async function assertServes(
  guest: VhostUserDevice,
  index = 0,
): Promise<void> {
  const word = `word-${sequence++}-on-${index}`;
  assert.equal(await ask(guest, `echo ${word}`, index), word);
}
