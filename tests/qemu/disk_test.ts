// A Linux guest uses our disks: file systems, raw load on one and more queues,
// two guests at once.
import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import { readFileSync } from "node:fs";
import { test } from "../harness.ts";
import { BACKEND, startBackend } from "./backend.ts";
import { diskFile } from "./disk_file.ts";
import { type Guest, startGuest } from "./guest.ts";

const MiB = 1 << 20;

test("a guest reads back after a remount what it wrote to a file disk and a memory disk, and what the host wrote to a read-only one", async () => {
  using file = diskFile(32 * MiB);
  const content = randomBytes(4 * MiB);
  using image = diskFile(content);
  await using onFile = await startBackend({
    disk: { file: file.path },
    serial: "vhost2-file",
  });
  await using inMemory = await startBackend({ disk: { memory: 32 * MiB } });
  await using readOnly = await startBackend({
    disk: { file: image.path },
    readOnly: true,
  });
  await using guest = await startGuest({
    backends: [onFile, inMemory, readOnly],
    disks: [
      { id: "file", socketPath: onFile.socketPath },
      { id: "memory", socketPath: inMemory.socketPath },
      { id: "image", socketPath: readOnly.socketPath },
    ],
    script: `
      for disk in vda vdb; do
        make_fs $disk
        write_files $disk 20 100
        remount_fs $disk
        check_files $disk
        umount_fs $disk
      done
      verify discard /dev/vdb
      echo "serial $(cat /sys/block/vda/serial)"
      echo "read-only $(cat /sys/block/vda/ro) $(cat /sys/block/vdc/ro)"
      echo "content $(sha256sum </dev/vdc)"
    `,
  });
  await guest.waitFor(/^vda: 20 checksums OK/);
  await guest.waitFor(/^vdb: 20 checksums OK/);
  await guest.waitFor(/^verify discard ok/);
  const [, serial] = await guest.waitFor(/^serial (.*)/);
  if (BACKEND === "vhost2") assert.equal(serial, "vhost2-file");
  await guest.waitFor(/^read-only 0 1$/);
  const [, hash] = await guest.waitFor(/^content (\w+)/);
  assert.equal(hash, createHash("sha256").update(content).digest("hex"));
  assert.equal(await guest.exited, 0);
  await onFile.stop();
  // s_magic of the ext2 superblock, in the file on the host.
  assert.equal(readFileSync(file.path).readUInt16LE(1024 + 56), 0xef53);
});

test("a verified load holds on one queue and on each of four", async () => {
  using file = diskFile(32 * MiB);
  await using one = await startBackend({ disk: { memory: 32 * MiB } });
  await using four = await startBackend({
    disk: { file: file.path },
    numQueues: 4,
  });
  await using guest = await startGuest({
    cpus: 4,
    backends: [one, four],
    disks: [
      { id: "one", socketPath: one.socketPath },
      { id: "four", socketPath: four.socketPath, numQueues: 4 },
    ],
    // Requests go to the queue of the processor that submits them.
    script: `
      echo "queues $(queue_count vda) $(queue_count vdb)"
      verify_mix 4 32 1500 vda vdb
      verify bench /dev/vda --depth=32
      verify bench /dev/vdb --depth=32
    `,
  });
  await guest.waitFor(/^queues 1 4$/);
  assert.equal(await guest.exited, 0);
  const verified = guest.lines.filter((line) => /^verify mix ok/.test(line));
  assert.equal(verified.length, 8);
});

const TWO_GUESTS =
  "two guests use one target at once and see each other's data";
if (BACKEND === "vhost2") test(TWO_GUESTS, twoGuests);
else test.skip(TWO_GUESTS, "the storage daemon serves one connection");

async function twoGuests(): Promise<void> {
  using file = diskFile(16 * MiB);
  await using backend = await startBackend({ disk: { file: file.path } });
  const start = (own: number, other: number): Promise<Guest> =>
    startGuest({
      backends: [backend],
      disks: [{ id: "disk", socketPath: backend.socketPath }],
      script: `
        verify fill /dev/vda --offset=${own * 8 * MiB} --size=${8 * MiB} \\
          --seed=${own + 1}
        read line
        verify check /dev/vda --offset=${other * 8 * MiB} --size=${8 * MiB} \\
          --seed=${other + 1}
      `,
    });
  await using first = await start(0, 1);
  await using second = await start(1, 0);
  await first.waitFor(/^verify fill ok/);
  await second.waitFor(/^verify fill ok/);
  first.type("go");
  second.type("go");
  await first.waitFor(/^verify check ok/);
  await second.waitFor(/^verify check ok/);
  assert.deepEqual([await first.exited, await second.exited], [0, 0]);
}
