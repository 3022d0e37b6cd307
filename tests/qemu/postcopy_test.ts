// A guest that writes and verifies is migrated by postcopy: it runs on the
// other side, on a back-end of ours, before its pages are there.
import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import { openUserfault } from "../../session/postcopy.ts";
import { test } from "../harness.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { BACKEND, startBackend } from "./backend.ts";
import { diskFile } from "./disk_file.ts";
import { type GuestOptions, startGuest } from "./guest.ts";
import { beginPostcopy, migrate } from "./migration.ts";

const MiB = 1 << 20;
const size = 16 * MiB;

const MIGRATED =
  "a guest under a verifying load is migrated by postcopy, and loses no block";
const DEAD =
  "a guest that dies before its pages are there leaves its back-end to the next one";

/** Why this machine cannot run the test; null if it can. */
function refusal(): string | null {
  if (BACKEND !== "vhost2") return "the storage daemon has no postcopy";
  try {
    core.descriptorClose(openUserfault());
    return null;
  } catch (error) {
    return (error as Error).message;
  }
}
const reason = refusal();
for (const [name, body] of [[MIGRATED, migrated], [DEAD, dead]] as const) {
  if (reason === null) test(name, body);
  else test.skip(name, reason);
}

async function migrated(): Promise<void> {
  using file = diskFile(3 * size);
  const disk = { file: file.path };
  const options = { disk, numQueues: 2, postcopy: true, verbose: true };
  await using here = await startBackend(options);
  await using there = await startBackend(options);
  const optionsOf = (socketPath: string): GuestOptions => ({
    cpus: 2,
    memoryMb: 256,
    backends: [here, there],
    disks: [{ id: "disk", socketPath, numQueues: 2 }],
    // What is in memory when the guest leaves, and what is on the disk, is
    // compared on the other side; two loads run all the time.
    script: `
      verify fill /dev/vda --size=${size} --generation=9
      dd if=/dev/urandom of=/tmp/memory bs=1M count=48 2>/dev/null
      sum=$(sha256sum </tmp/memory)
      load() {
        round=1
        while [ ! -e /tmp/enough ]; do
          verify mix /dev/vda --offset=$((${size} * $1)) --size=${size} \\
            --depth=64 --count=1500 --seed=$round
          round=$((round + 1))
        done
      }
      load 1 & one=$!
      load 2 & two=$!
      read line
      verify check /dev/vda --size=${size} --generation=9
      dd if=/tmp/memory of=/tmp/copy bs=1M 2>/dev/null
      [ "$sum" = "$(sha256sum </tmp/copy)" ] && echo "memory is the same"
      touch /tmp/enough
      wait $one
      wait $two
    `,
  });
  await using source = await startGuest(optionsOf(here.socketPath));
  await using destination = await startGuest({
    ...optionsOf(there.socketPath),
    incoming: true,
  });
  await source.waitFor(/^verify mix running/);
  await source.waitFor(/^verify mix running/);
  const { requestedPages } = await migrate(source, destination, {
    postcopy: true,
  });
  assert.ok(requestedPages > 0, "no page was asked for: it was no postcopy");
  await source[Symbol.asyncDispose]();
  await destination.waitFor(/^verify mix running/);
  destination.type("enough");
  await destination.waitFor(/^verify check ok/);
  await destination.waitFor(/^memory is the same/);
  assert.equal(await destination.exited, 0);
  assert.match(
    there.output(),
    /POSTCOPY_ADVISE[^]*POSTCOPY_LISTEN[^]*SET_MEM_TABLE[^]*POSTCOPY_END/,
  );
  assert.doesNotMatch(there.output(), /Cannot/);
  await there.stop();
  await here.stop();
}

async function dead(): Promise<void> {
  using file = diskFile(size);
  using folder = new TemporaryFolder();
  const options = { disk: { file: file.path }, postcopy: true };
  await using here = await startBackend(options);
  await using there = await startBackend(options);
  const optionsOf = (socketPath: string): GuestOptions => ({
    memoryMb: 256,
    backends: [here, there],
    disks: [{ id: "disk", socketPath }],
    script: `
      dd if=/dev/urandom of=/tmp/memory bs=1M count=64 2>/dev/null
      while true; do
        verify mix /dev/vda --depth=64 --count=20000
      done
    `,
  });
  {
    await using source = await startGuest(optionsOf(here.socketPath));
    await using destination = await startGuest({
      ...optionsOf(there.socketPath),
      incoming: true,
    });
    await source.waitFor(/^verify mix running/);
    // Most of its memory is missing: whoever works for it waits for pages.
    await beginPostcopy(source, destination, folder.path, 1 << 20);
    await destination[Symbol.asyncDispose]();
  }
  await using next = await startGuest({
    ...optionsOf(there.socketPath),
    script: "verify mix /dev/vda --depth=32 --count=1000",
  });
  await next.waitFor(/^verify mix ok/);
  assert.equal(await next.exited, 0);
  await there.stop();
}
