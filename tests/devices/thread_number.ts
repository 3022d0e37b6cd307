// A Worker that tells the number of its thread, and ends.
import { workerData } from "node:worker_threads";
import { core } from "../../ffi/core.ts";

Atomics.store(
  new Int32Array(workerData as SharedArrayBuffer),
  0,
  core.threadId(),
);
