/**
 * Runs loads in a thread of its own, where the back-end is in this process.
 *
 * @module
 */

import { parentPort } from "node:worker_threads";
import { layouts } from "../ffi/abi.gen.ts";
import { core } from "../ffi/core.ts";

parentPort!.on("message", (config: Uint8Array<ArrayBuffer>) => {
  const out = new BigUint64Array(layouts.LoadResult.byteSize / 8);
  const code = core.loadRun(config, out);
  parentPort!.postMessage({ code, out });
});
