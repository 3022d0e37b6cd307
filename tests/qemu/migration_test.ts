// A guest that writes and verifies is migrated between two QEMUs, again and
// again, with our back-ends on both sides.
import assert from "node:assert/strict";
import { blkDevice, type DiskObject, registerTarget } from "../../mod.ts";
import { test } from "../harness.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { BACKEND, startBackend } from "./backend.ts";
import { diskFile } from "./disk_file.ts";
import { type Guest, type GuestOptions, startGuest } from "./guest.ts";
import { migrate } from "./migration.ts";

const MiB = 1 << 20;
const hops = 10;
const size = 4 * MiB;

/** A disk in memory whose requests are under way for a while. */
function slowDisk(bytes: Uint8Array): DiskObject {
  // Longer than a migration takes, mostly: what is read arrives in pages that
  // were sent already, and that nobody but us has written since.
  let turn = 0;
  const later = () =>
    new Promise((resolve) => setTimeout(resolve, 200 + turn++ * 137 % 600));
  return {
    size: bytes.length,
    async read(offset, into) {
      await later();
      into.set(bytes.subarray(offset, offset + into.length));
    },
    async write(offset, data) {
      await later();
      bytes.set(data, offset);
    },
    async flush() {},
  };
}

const NAME =
  `a guest under a verifying load on split and packed rings is migrated ${hops} times between two back-ends, and loses no block`;
if (BACKEND === "vhost2") test(NAME, pingPong, 600);
else test.skip(NAME, "the storage daemon logs no dirty pages");

async function pingPong(): Promise<void> {
  using split = diskFile(2 * size);
  using packed = diskFile(2 * size);
  // Each side has back-ends of its own, on the same files.
  const start = () =>
    Promise.all(
      [split, packed].map(({ path }) => startBackend({ disk: { file: path } })),
    );
  const sides = [await start(), await start()];
  using folder = new TemporaryFolder();
  const errors: string[] = [];
  const onError = (error: Error) => void errors.push(error.message);
  const slow = slowDisk(new Uint8Array(size));
  await using disk = blkDevice({ backing: slow, onError });
  const slowPaths = ["slow-0", "slow-1"].map((name) => folder.file(name));
  const serveSlow = (address: string) =>
    registerTarget({ transport: "vhost-user", address, onError, ...disk });
  await using _slowOne = await serveSlow(slowPaths[0]);
  await using _slowTwo = await serveSlow(slowPaths[1]);
  const optionsOf = (hop: number): GuestOptions => {
    const [one, two] = sides[hop % 2];
    return {
      memoryMb: 128,
      backends: sides.flat(),
      disks: [
        { id: "split", socketPath: one.socketPath },
        { id: "packed", socketPath: two.socketPath, packed: true },
        { id: "slow", socketPath: slowPaths[hop % 2] },
      ],
      lifetimeMs: 560_000,
      // The first half of each disk is written once and read at the end, the
      // second written and read all the time.
      script: `
        for disk in vda vdb; do
          verify fill /dev/$disk --size=${size} --generation=9
        done
        load() {
          round=1
          while [ ! -e /tmp/enough ]; do
            verify mix /dev/$1 --offset=${size} --size=${size} --depth=16 \\
              --count=1200 --seed=$round
            round=$((round + 1))
          done
        }
        load vda & one=$!
        load vdb & two=$!
        # Its requests are under way over any look at the log.
        while [ ! -e /tmp/enough ]; do
          verify mix /dev/vdc --depth=32 --count=200 --seed=7 >/tmp/slow ||
            { cat /tmp/slow; exit 1; }
        done & three=$!
        read line
        touch /tmp/enough
        wait $one
        wait $two
        wait $three
        for disk in vda vdb; do
          verify check /dev/$disk --size=${size} --generation=9
        done
      `,
    };
  };
  let guest: Guest = await startGuest(optionsOf(0));
  try {
    for (let hop = 1; hop <= hops; hop++) {
      const next = await startGuest({ ...optionsOf(hop), incoming: true });
      try {
        // In the midst of a round, which ends on the other side.
        await guest.waitFor(/^verify mix running/);
        const { passes } = await migrate(guest, next);
        assert.ok(passes >= 2, `${passes} passes: it was not live`);
      } catch (error) {
        await next[Symbol.asyncDispose]();
        throw error;
      }
      await guest[Symbol.asyncDispose]();
      guest = next;
    }
    await guest.waitFor(/^verify mix running/);
    guest.type("enough");
    const status = await guest.exited;
    if (status !== 0) throw guest.failure(`The guest ended with ${status}`);
    const checked = guest.lines.filter((line) => /^verify check ok/.test(line));
    assert.equal(checked.length, 2);
    assert.deepEqual(errors, []);
  } finally {
    await guest[Symbol.asyncDispose]();
    for (const backend of sides.flat()) await backend.stop();
  }
}
