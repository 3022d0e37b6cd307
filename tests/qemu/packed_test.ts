// A Linux guest uses our disks over packed virtqueues.
import assert from "node:assert/strict";
import { test } from "../harness.ts";
import { BACKEND, startBackend } from "./backend.ts";
import { startGuest } from "./guest.ts";

const MiB = 1 << 20;
const NAME =
  "a guest verifies what it wrote over packed rings, and goes on after a reset";
if (BACKEND === "vhost2") test(NAME, packedGuest);
else test.skip(NAME, "the storage daemon has no packed rings");

async function packedGuest(): Promise<void> {
  await using one = await startBackend({ disk: { memory: 64 * MiB } });
  await using four = await startBackend({
    disk: { memory: 64 * MiB },
    numQueues: 4,
  });
  await using guest = await startGuest({
    cpus: 4,
    backends: [one, four],
    disks: [
      { id: "one", socketPath: one.socketPath, packed: true },
      { id: "four", socketPath: four.socketPath, numQueues: 4, packed: true },
    ],
    // The features that the driver took, lowest bit first: bit 34 is PACKED.
    script: `
      for disk in vda vdb; do
        echo "$disk packed $(cut -c35 /sys/block/$disk/device/features)"
      done
      verify_mix 4 32 1000 vda vdb
      make_fs vda
      write_files vda 10 64
      remount_fs vda
      check_files vda
      echo done
      read line
    `,
  });
  for (let round = 0; round < 2; round++) {
    await guest.waitFor(/^vda packed 1$/);
    await guest.waitFor(/^vdb packed 1$/);
    await guest.waitFor(/^vda: 10 checksums OK/);
    await guest.waitFor(/^done$/);
    // What the first boot has used of the rings, the second begins anew.
    if (round === 0) await guest.reset();
  }
  guest.type("end");
  assert.equal(await guest.exited, 0);
  const verified = guest.lines.filter((line) => /^verify mix ok/.test(line));
  assert.equal(verified.length, 16);
}
