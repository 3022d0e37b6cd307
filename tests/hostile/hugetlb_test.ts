// Guest memory in huge pages (hugetlbfs), as QEMU has it with
// memory-backend-file or hugetlb=on.

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import process from "node:process";
import { binding, core } from "../../ffi/core.ts";
import { check } from "../../ffi/errors.ts";
import type { VhostUserDevice } from "../../frontend/mod.ts";
import { virtqueueProtocolFeatures } from "../../mod.ts";
import { test } from "../harness.ts";
import {
  assertGone,
  assertWorks,
  opened,
  type Served,
  serving,
} from "../session/served.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { within } from "../support/wait.ts";

const huge = 2 << 20;
const pages = 2;
const size = pages * huge;

/** Why this machine cannot run these tests; null if it can. */
function refusal(): string | null {
  const memory = readFileSync("/proc/meminfo", "utf8");
  const read = (name: string) =>
    Number(new RegExp(`${name}:\\s+(\\d+)`).exec(memory)?.[1] ?? 0);
  if (read("Hugepagesize") * 1024 !== huge || read("HugePages_Free") < pages) {
    return "no huge pages of 2 MiB are free; as root: echo 8 > /proc/sys/vm/nr_hugepages";
  }
  return process.getuid?.() === 0
    ? null
    : "hugetlbfs is mounted by root only; run the tests as root";
}
const reason = refusal();

/** A file of huge pages, mapped here as the front-end has it. */
class HugeFile implements Disposable {
  readonly fd: number;
  readonly bytes: Uint8Array<ArrayBuffer>;
  readonly #address = new BigUint64Array(1);

  constructor(folder: TemporaryFolder) {
    const mount = (program: string, ...words: string[]) => {
      const { status, stderr } = spawnSync(program, words);
      assert.equal(status, 0, String(stderr));
    };
    mount("mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "none", folder.path);
    try {
      const path = folder.file("memory");
      writeFileSync(path, "");
      const name = new TextEncoder().encode(path);
      this.fd = check(core.fileOpen(name, name.length, 1), "Cannot open");
    } finally {
      // The open file stays.
      mount("umount", "-l", folder.path);
    }
    check(core.memfdResize(this.fd, size), "Cannot resize");
    check(core.mapShared(this.fd, size, this.#address), "Cannot map");
    this.bytes = new Uint8Array(binding.view(this.#address[0], size));
  }

  [Symbol.dispose](): void {
    core.descriptorClose(this.fd);
    if (this.bytes.buffer.transfer === undefined) return;
    this.bytes.buffer.transfer();
    core.unmap(this.#address[0], size);
  }
}

interface World extends Served {
  readonly guest: VhostUserDevice;
  readonly file: HugeFile;
  /** Guest address of the huge pages. */
  readonly gpa: bigint;
  /** Has the device copy within the huge pages. */
  copy(from: number, to: number, length: number): Promise<void>;
}

/** A test with rings in small pages, and data in huge ones. */
function hugeTest(
  name: string,
  body: (world: World) => Promise<void>,
  options: { readonly errorsExpected?: boolean } = {},
): void {
  if (reason !== null) return test.skip(name, reason);
  test(name, async () => {
    using folder = new TemporaryFolder();
    using file = new HugeFile(folder);
    const regions = [{ size: 1 << 20 }, { size }];
    await serving({
      ...options,
      queueCount: 1,
      protocolFeatures: virtqueueProtocolFeatures,
    }, (served) =>
      opened(served, { queueCount: 1, regions }, async (guest) => {
        const region = guest.ram.regions[1];
        // The number keeps its place in the table, and leads here.
        check(core.descriptorReplace(file.fd, region.fd), "Cannot replace");
        await guest.start();
        const { gpa } = region;
        await body({
          ...served,
          guest,
          file,
          gpa,
          async copy(from, to, length) {
            const written = await within(
              guest.queues[0].submitChain([
                {
                  address: gpa + BigInt(from),
                  length,
                  isWritable: false,
                },
                { address: gpa + BigInt(to), length, isWritable: true },
              ]),
              "the copy",
            );
            assert.equal(written, length);
          },
        });
      }));
  });
}

hugeTest(
  "a region in huge pages is read and written, also across them",
  async (world) => {
    const { file, recording, copy } = world;
    const words = Uint8Array.from({ length: 8192 }, (_, i) => i * 7);
    file.bytes.set(words, 0x1234);
    // From one huge page into both.
    await copy(0x1234, huge - 4096, words.length);
    assert.deepEqual(
      file.bytes.subarray(huge - 4096, huge + 4096),
      words,
    );
    const [, region] = recording.devices[0].memory;
    assert.equal(region.view.length, size);
    assert.deepEqual(region.view.subarray(0x1234, 0x1234 + 8192), words);
  },
);

hugeTest(
  "what is written in huge pages is logged by pages of 4 KiB",
  async (world) => {
    const { guest, gpa, copy } = world;
    const log = await guest.startLog({ rings: false });
    await copy(0, huge - 4096, 8192);
    const first = gpa + BigInt(huge - 4096);
    assert.deepEqual(log.take(), [first, first + 4096n]);
    await guest.stopLog();
  },
);

hugeTest(
  "huge pages that are taken away cost their device, and nobody else anything",
  async (world) => {
    const { guest, file, gpa, recording, errors } = world;
    const { view } = recording.devices[0].memory[1];
    view[huge] = 1;
    await opened(world, { queueCount: 1 }, async (bystander) => {
      await bystander.start();
      check(core.memfdResize(file.fd, huge), "Cannot shrink");
      guest.queues[0].submitChain([
        { address: gpa + BigInt(huge + 5), length: 64, isWritable: false },
        { address: gpa, length: 64, isWritable: true },
      ]).catch(() => {});
      assert.match((await errors.next()).message, /took guest memory away/);
      await within(guest.connection.closed, "the end of the connection");
      await recording.completed("deviceDestroy");
      assertGone(view);
      await assertWorks(bystander);
    });
  },
  { errorsExpected: true },
);

hugeTest(
  "a region in huge pages that is removed leaves no view and no mapping",
  async (world) => {
    const { guest, recording } = world;
    const { view } = recording.devices[0].memory[1];
    view.fill(5, huge, huge + 10);
    guest.ram.removeRegion(guest.ram.regions[1]);
    await guest.sendMemory();
    await assertWorks(guest);
    assertGone(view);
    assert.equal(recording.devices[0].memory.length, 1);
    assert.equal(world.file.bytes[huge + 9], 5);
  },
);
