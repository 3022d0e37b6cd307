// A Worker that fills the pages which a userfaultfd tells of.
import { workerData } from "node:worker_threads";
import { eventLoop } from "../../ffi/event_loop.ts";
import { PageFaults } from "../../frontend/page_faults.ts";
import { pageAt, SourceWord } from "./page_source.ts";

const control = workerData as Int32Array<ArrayBuffer>;
// Its descriptors come before the first count, and stay.
eventLoop.ref();
for (;;) {
  Atomics.store(control, SourceWord.isServing, 0);
  Atomics.wait(control, SourceWord.fd, -1);
  const fd = Atomics.load(control, SourceWord.fd);
  if (fd < 0) continue;
  const faults = new PageFaults(fd, (address, faults) => {
    // Before: who waits may look as soon as it is woken.
    Atomics.add(control, SourceWord.filled, 1);
    faults.fill(address, pageAt(address));
  });
  Atomics.store(control, SourceWord.isServing, 1);
  while (Atomics.load(control, SourceWord.fd) === fd) eventLoop.wait(20_000);
  faults.close();
}
