// A Worker that signals eventfds as fast as it can, whenever it is given some.
import { workerData } from "node:worker_threads";
import { core } from "../../ffi/core.ts";
import { Kicking } from "./kicking.ts";

const { control, fds } = workerData as {
  control: Int32Array<ArrayBuffer>;
  fds: Int32Array;
};
for (;;) {
  const count = Atomics.load(control, Kicking.count);
  if (count < 0) break;
  Atomics.store(control, Kicking.isIdle, count === 0 ? 1 : 0);
  if (count === 0) {
    Atomics.wait(control, Kicking.count, 0);
    continue;
  }
  for (let i = 0; i < count; i++) core.eventfdSignal(fds[i]);
  Atomics.add(control, Kicking.rounds, 1);
}
