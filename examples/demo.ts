// The demo: a Linux guest in QEMU on two disks that this process serves, one in
// memory and one a file. The guest makes file systems, writes, reads back after
// a remount and verifies; then this process says what it served.
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import {
  type Blk,
  blkDevice,
  fileBacking,
  memoryBacking,
  registerTarget,
  type Target,
} from "vhost2";
import { type Guest, startGuest } from "../tests/qemu/guest.ts";

const MiB = 1 << 20;
const diskSize = 64 * MiB;

const FILE_COUNT = 24;
const FILE_KIB = 512;

/** What the guest does with each disk; the functions are its initramfs's. */
const SCRIPT = `
  echo "Linux $(uname -r), up after $(cut -d. -f1 /proc/uptime) s"
  for disk in vda vdb; do
    echo "$disk: $(($(cat /sys/block/$disk/size) / 2048)) MiB, queues: $(queue_count $disk)"
    make_fs $disk
    write_files $disk ${FILE_COUNT} ${FILE_KIB}
    remount_fs $disk
    check_files $disk
    umount_fs $disk
  done
  for disk in vda vdb; do
    verify mix /dev/$disk --depth=32 --count=4000 \\
      | sed "s/^verify mix ok: .* blocks, /$disk: random load verified by crc32c: /"
    verify bench /dev/$disk --depth=32 --count=20000 \\
      | sed "s/^verify bench ok/$disk/"
  done
`;

interface DemoDisk {
  readonly name: string;
  readonly description: string;
  readonly socketPath: string;
  readonly disk: Blk;
  readonly target: Target;
}

async function serve(
  name: string,
  description: string,
  socketPath: string,
  disk: Blk,
): Promise<DemoDisk> {
  const target = await registerTarget({
    transport: "vhost-user",
    address: socketPath,
    ...disk,
  });
  return { name, description, socketPath, disk, target };
}

/** What a disk has served, for people. */
function served({ name, disk }: DemoDisk, seconds: number): string {
  const counts = disk.statistics.snapshot();
  const inMiB = (bytes: number) => `${(bytes / MiB).toFixed(0)} MiB`;
  return `${name}  ${counts.requests} requests: ` +
    `${counts.reads} reads (${inMiB(counts.readBytes)}), ` +
    `${counts.writes} writes (${inMiB(counts.writtenBytes)}), ` +
    `${counts.flushes} flushes, ${counts.ioErrors} errors; ` +
    `${
      Math.round(counts.requests / seconds)
    } requests/s over the whole run, the guest's boot included`;
}

/**
 * Runs the demo and tells its story.
 *
 * @returns the exit code: 0 when the guest verified everything
 */
export async function runDemo(): Promise<number> {
  console.log(
    "A Linux guest on two disks. Every request is answered by TypeScript in this process.\n",
  );
  const folder = mkdtempSync(join(tmpdir(), "vhost2-demo-"));
  const disks: DemoDisk[] = [];
  try {
    const file = join(folder, "disk.img");
    writeFileSync(file, "");
    truncateSync(file, diskSize);
    disks.push(
      await serve(
        "vda",
        "64 MiB in memory",
        join(folder, "memory.sock"),
        blkDevice({ backing: memoryBacking(diskSize), numQueues: 2 }),
      ),
      await serve(
        "vdb",
        "64 MiB in a file, by io_uring",
        join(folder, "file.sock"),
        blkDevice({
          backing: fileBacking(file),
          numQueues: 2,
        }),
      ),
    );
    console.log("The disks, each a vhost-user-blk device:");
    for (const { name, description, socketPath } of disks) {
      console.log(`  ${name}  ${description}, at ${socketPath}`);
    }
    console.log("\nThe guest, in QEMU without KVM (about 15 s):");
    const began = performance.now();
    const status = await runGuest(disks, began);
    const seconds = (performance.now() - began) / 1000;
    console.log("\nWhat this process served:");
    for (const disk of disks) console.log(`  ${served(disk, seconds)}`);
    console.log(
      status === 0
        ? "\nEverything that the guest read back was what it had written."
        : `\nThe guest's check failed with exit status ${status}.`,
    );
    return status;
  } finally {
    for (const { target, disk } of disks) {
      await target.unregister();
      await disk.close();
    }
    rmSync(folder, { recursive: true, force: true });
  }
}

async function runGuest(
  disks: readonly DemoDisk[],
  began: number,
): Promise<number> {
  await using guest: Guest = await startGuest({
    cpus: 2,
    disks: disks.map(({ name, socketPath }) => ({
      id: name,
      socketPath,
      numQueues: 2,
    })),
    script: SCRIPT,
    onLine: (line) => {
      // The kernel's own last words are no part of the story, nor is a marker
      // that tests wait for.
      if (/^\[ *\d+\.\d+\]|^verify mix running/.test(line)) return;
      const seconds = ((performance.now() - began) / 1000).toFixed(1);
      console.log(`  ${seconds.padStart(5)} s  ${line}`);
    },
  });
  return await guest.exited;
}

if (import.meta.main) process.exitCode = await runDemo();
