// A Linux guest whose queues are served by Workers.
import assert from "node:assert/strict";
import { test } from "../harness.ts";
import { startBackend } from "./backend.ts";
import { diskFile } from "./disk_file.ts";
import { startGuest } from "./guest.ts";

const MiB = 1 << 20;

test("a guest's verified load holds on four queues over two Workers, of a file disk and a memory disk", async () => {
  using file = diskFile(32 * MiB);
  const queues = { numQueues: 4, workers: 2 };
  await using onFile = await startBackend({
    disk: { file: file.path },
    ...queues,
  });
  await using inMemory = await startBackend({
    disk: { memory: 32 * MiB },
    ...queues,
  });
  await using guest = await startGuest({
    cpus: 4,
    backends: [onFile, inMemory],
    disks: [
      { id: "file", socketPath: onFile.socketPath, numQueues: 4 },
      { id: "memory", socketPath: inMemory.socketPath, numQueues: 4 },
    ],
    // Requests go to the queue of the processor that submits them.
    script: `
      echo "queues $(queue_count vda) $(queue_count vdb)"
      verify_mix 4 32 1500 vda vdb
    `,
  });
  await guest.waitFor(/^queues 4 4$/);
  assert.equal(await guest.exited, 0);
  const verified = guest.lines.filter((line) => /^verify mix ok/.test(line));
  assert.equal(verified.length, 8);
  // A clean end, with nothing on stderr but what it always prints.
  await onFile.stop();
  await inMemory.stop();
  assert.doesNotMatch(onFile.output() + inMemory.output(), /Cannot|Error/);
});
