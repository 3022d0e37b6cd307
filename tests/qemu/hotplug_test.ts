// Memory is plugged into a running guest, used for I/O, and taken out again.
import assert from "node:assert/strict";
import { test } from "../harness.ts";
import { BACKEND, startBackend } from "./backend.ts";
import { startGuest } from "./guest.ts";

const MiB = 1 << 20;
/** A whole number of the guest's memory blocks (128 MiB). */
const dimmMb = 256;
/** Pages that a few requests of `verify` take, of 64 KiB each. */
const bufferPages = 128;

/** How QEMU tells of the new region, and what decides that. */
const ways = [
  { how: "ADD_MEM_REG and REM_MEM_REG", postcopy: false },
  // PAGEFAULT excludes CONFIGURE_MEM_SLOTS: the whole table comes anew.
  { how: "a whole table by SET_MEM_TABLE", postcopy: true },
];

for (const { how, postcopy } of ways) {
  const name =
    `memory is hot-plugged during verified I/O, used for I/O and taken out: ${how}`;
  if (BACKEND === "vhost2") test(name, () => hotPlug(postcopy));
  else test.skip(name, "the storage daemon has its own ways");
}

async function hotPlug(postcopy: boolean): Promise<void> {
  await using backend = await startBackend({
    disk: { memory: 64 * MiB },
    numQueues: 2,
    postcopy,
  });
  await using guest = await startGuest({
    cpus: 2,
    memoryMb: 256,
    maxMemoryMb: 1024,
    backends: [backend],
    disks: [{ id: "disk", socketPath: backend.socketPath, numQueues: 2 }],
    // Movable, so that it can be taken out again; the kernel takes buffers of
    // programs from there first.
    script: `
      echo online_movable >/sys/devices/system/memory/auto_online_blocks
      total() { awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo; }
      free_movable() {
        awk '/zone +Movable/ { f = 1 } f && /pages free/ { print $3; exit }' \\
          /proc/zoneinfo
      }
      before=$(total)
      load() {
        taskset -c 1 verify mix /dev/vda --offset=${32 * MiB} --size=${
      8 * MiB
    } \\
          --depth=32 --count=$1 --seed=$2
      }
      load 12000 1 &
      under=$!
      read line
      for n in $(seq 1200); do
        [ $(total) -ge $((before + ${dimmMb} - 8)) ] && break
        usleep 50000
      done
      echo "added $(($(total) - before)) MiB"
      free=$(free_movable)
      verify mix /dev/vda --size=${32 * MiB} --depth=256 --count=6000 --seed=2 &
      new=$!
      # Its buffers are there once requests have been made in them.
      read line
      echo "movable pages used $((free - $(free_movable)))"
      wait $new
      wait $under
      load 12000 3 &
      under=$!
      read line
      wait $under
      for n in $(seq 1200); do
        [ $(total) -le $((before + 8)) ] && break
        usleep 50000
      done
      echo "left $(($(total) - before)) MiB"
      verify mix /dev/vda --size=${32 * MiB} --depth=64 --count=1500 --seed=4
      read line
    `,
  });
  await guest.waitFor(/^verify mix running/);
  await guest.addMemory("dimm", dimmMb);
  guest.type("plugged");
  const [, added] = await guest.waitFor(/^added (-?\d+) MiB/);
  assert.ok(Math.abs(Number(added) - dimmMb) <= 8, `${added} MiB came`);
  await guest.waitFor(/^verify mix running/);
  guest.type("running");
  const [, used] = await guest.waitFor(/^movable pages used (-?\d+)/);
  assert.ok(Number(used) >= bufferPages, `${used} pages of it were used`);
  await guest.waitFor(/^verify mix running/);
  assert.ok(await guest.removeMemory("dimm"), "the guest let it go");
  guest.type("unplugged");
  const [, left] = await guest.waitFor(/^left (-?\d+) MiB/);
  assert.ok(Math.abs(Number(left)) <= 8, `${left} MiB are left`);
  await guest.waitFor(/^verify mix ok/);
  guest.type("end");
  assert.equal(await guest.exited, 0);
  const verified = guest.lines.filter((line) => /^verify mix ok/.test(line));
  assert.equal(verified.length, 4);
  // The load ran before, during and after.
  const at = (pattern: RegExp) =>
    guest.lines.findIndex((line) => pattern.test(line));
  assert.ok(at(/^verify mix running/) < at(/^added/));
  assert.ok(at(/^added/) < at(/^verify mix ok/));
  assert.doesNotMatch(backend.output(), /Cannot/);
}
