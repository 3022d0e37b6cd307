/**
 * A thread that runs loads, for back-ends in this process: as a worker it is
 * the driver's side of a ring, on the processor that back-ends have elsewhere.
 *
 * @module
 */

import { spawnSync } from "node:child_process";
import {
  isMainThread,
  parentPort,
  Worker,
  workerData,
} from "node:worker_threads";
import { layouts } from "../ffi/abi.gen.ts";
import { core } from "../ffi/core.ts";
import { check } from "../ffi/errors.ts";
import {
  type Load,
  loadConfig,
  type LoadFigures,
  loadFigures,
  type LoadPlace,
} from "./load.ts";
import { backendCpu } from "./programs.ts";

interface Answer {
  readonly code: number;
  readonly out: BigUint64Array;
}

/** A running thread. */
export class DriverThread {
  // The number goes along: a thread that begins on the other processor alone
  // counts no more than that one.
  readonly #worker = new Worker(new URL(import.meta.url), {
    workerData: { cpu: backendCpu },
  });

  /** Resolves when the load is done; this thread serves it meanwhile. */
  async run(load: Load, place: LoadPlace): Promise<LoadFigures> {
    const config = new Uint8Array(loadConfig(load, place).buffer);
    const answer = new Promise<Answer>((resolve) => {
      this.#worker.once("message", resolve);
    });
    this.#worker.postMessage(config);
    const { code, out } = await answer;
    check(code, `Cannot run a load of depth ${load.depth}`);
    const figures = loadFigures(out);
    if (figures.errors > 0) throw new Error(`${figures.errors} I/O errors`);
    return figures;
  }

  async end(): Promise<void> {
    await this.#worker.terminate();
  }
}

if (!isMainThread) {
  const thread = String(core.threadId());
  spawnSync("taskset", ["-c", "-p", String(workerData.cpu), thread]);
  parentPort!.on("message", (config: Uint8Array<ArrayBuffer>) => {
    const out = new BigUint64Array(layouts.LoadResult.byteSize / 8);
    const code = core.loadRun(config, out);
    parentPort!.postMessage({ code, out } satisfies Answer);
  });
}
