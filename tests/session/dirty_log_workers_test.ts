// The dirty log while queues are served by Workers: the threads that mark are
// not the one that swaps the log and answers the front-end.
import assert from "node:assert/strict";
import { Worker } from "node:worker_threads";
import { DirtyLog, VhostUserDevice } from "../../frontend/mod.ts";
import { blkDevice, memoryBacking, registerTarget } from "../../mod.ts";
import { test } from "../harness.ts";
import { blkHeader } from "../hostile/world.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { within } from "../support/wait.ts";
import { allocatePages, formats, type Guest, ramSize } from "./logged.ts";

// The runtime keeps descriptors and a thread from its first Worker on.
const first = new Worker(new URL("data:text/javascript,"));
await new Promise((resolve) => first.once("exit", resolve));

const page = 0x1000n;
const perQueue = 16;

/** Reads a page of the disk into each page of a queue's, all at once. */
async function read(guest: Guest, queue: number, pages: bigint): Promise<void> {
  const header = guest.ram.allocate(16);
  guest.ram.write(header, blkHeader(0));
  const status = allocatePages(guest, 1);
  const asked = Array.from(
    { length: perQueue },
    (_, i) =>
      guest.queues[queue].submitChain([
        { address: header, length: 16, isWritable: false },
        {
          address: pages + BigInt(i) * page,
          length: Number(page),
          isWritable: true,
        },
        { address: status, length: 1, isWritable: true },
      ], { indirect: true }),
  );
  await within(Promise.all(asked), `the reads of queue ${queue}`);
  guest.ram.free(header, 16);
  guest.ram.free(status, Number(page));
}

for (const { name, packed } of formats) {
  test(`${name}: Workers mark in the log that counts, and in no other after the reply`, async () => {
    await withoutDescriptorLeak(async () => {
      using folder = new TemporaryFolder();
      const path = folder.file("disk");
      await using disk = blkDevice({
        backing: memoryBacking(1 << 20),
        numQueues: 2,
      });
      await using _target = await registerTarget({
        transport: "vhost-user",
        address: path,
        workers: 2,
        ...disk,
      });
      await using guest: Guest = await VhostUserDevice.open({
        path,
        packed,
        ramSize,
        queueCount: 2,
      });
      const pages = [0, 1].map(() => allocatePages(guest, perQueue));
      const readAll = () =>
        Promise.all(pages.map((start, queue) => read(guest, queue, start)));
      const all = pages.flatMap((start) =>
        Array.from({ length: perQueue }, (_, i) => start + BigInt(i) * page)
      );
      // Before, nothing; then all of it, in whichever log it is.
      await readAll();
      await guest.startLog({ rings: false });
      let before: DirtyLog | undefined;
      for (let round = 0; round < 20; round++) {
        using log = new DirtyLog({ end: BigInt(ramSize) });
        await guest.connection.setLogBase(log);
        assert.ok(before?.bytes.every((byte) => byte === 0) ?? true);
        const reading = readAll();
        const next = new DirtyLog({ end: BigInt(ramSize) });
        await guest.connection.setLogBase(next);
        const taken = log.take();
        await reading;
        const marked = new Set([...taken, ...next.take()]);
        assert.deepEqual(all.filter((start) => !marked.has(start)), []);
        assert.deepEqual(log.take(), []);
        before?.close();
        before = next;
      }
      await guest.stopLog();
      before?.take();
      await readAll();
      assert.deepEqual(before?.take(), []);
      before?.close();
    });
  });
}
