// A Worker that writes garbage over parts of a file, and half of the time what
// was there before a moment later, so that who reads twice reads two things.
import { workerData } from "node:worker_threads";
import { binding, core } from "../../ffi/core.ts";
import { check } from "../../ffi/errors.ts";
import { Random } from "./random.ts";
import { Scribbling } from "./scribbling.ts";

const { control, fd, size, ranges, seed } = workerData as {
  control: Int32Array<ArrayBuffer>;
  fd: number;
  size: number;
  ranges: readonly (readonly [number, number])[];
  seed: number;
};
const random = new Random(seed);
const address = new BigUint64Array(1);
check(core.mapShared(fd, size, address), "Cannot map what to scribble on");
const words = new Uint32Array(binding.view(address[0], size));
Atomics.store(control, Scribbling.isReady, 1);
for (;;) {
  const state = Atomics.load(control, Scribbling.state);
  if (state === Scribbling.end) break;
  if (state === Scribbling.pause) {
    Atomics.wait(control, Scribbling.state, Scribbling.pause);
    continue;
  }
  const [start, length] = random.pick(ranges);
  const at = (start >> 2) + random.below(length >> 2);
  const before = Atomics.load(words, at);
  Atomics.store(
    words,
    at,
    random.once(2) ? random.word() : before ^ 1 << random.below(32),
  );
  if (random.once(2)) continue;
  for (let i = random.below(20); i > 0; i--) Atomics.load(words, at);
  Atomics.store(words, at, before);
}
core.unmap(address[0], size);
