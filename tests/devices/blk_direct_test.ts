// A file disk past the host's page cache (O_DIRECT).
import assert from "node:assert/strict";
import {
  closeSync,
  constants,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { blkDevice, fileBacking, memoryBacking } from "../../devices/mod.ts";
import { test } from "../harness.ts";
import {
  assertBytes,
  type Framing,
  OK,
  pattern,
  ServedDisk,
  TemporaryFolder,
} from "./disk_guest.ts";

const diskSize = 4 << 20;

function makeDisk(folder: TemporaryFolder): string {
  const path = folder.file("disk");
  writeFileSync(path, "");
  truncateSync(path, diskSize);
  return path;
}

/** Whether the file system of temporary files has it. */
function hasDirect(): boolean {
  using folder = new TemporaryFolder();
  const path = makeDisk(folder);
  try {
    closeSync(openSync(path, constants.O_RDONLY | constants.O_DIRECT));
    return true;
  } catch {
    return false;
  }
}

const reason =
  "the file system of temporary files has no O_DIRECT: set TMPDIR to a folder on a disk";
const onDisk = hasDirect()
  ? test
  : (name: string, _body: () => Promise<void>) => test.skip(name, reason);

/** The open flags of this process's descriptor of a file. */
function flagsOf(path: string): number {
  for (const fd of readdirSync("/proc/self/fd")) {
    try {
      if (readlinkSync(`/proc/self/fd/${fd}`) !== path) continue;
      const info = readFileSync(`/proc/self/fdinfo/${fd}`, "utf8");
      return parseInt(/flags:\s*(\d+)/.exec(info)![1], 8);
    } catch {
      // The descriptor of the listing itself.
    }
  }
  throw new Error(`${path} is not open`);
}

const framings: Framing[] = ["apart", "together", "indirect"];

for (const framing of framings) {
  onDisk(
    `a direct disk reads back what was written, wherever it lies in guest memory, descriptors ${framing}`,
    async () => {
      using folder = new TemporaryFolder();
      const path = makeDisk(folder);
      await using served = await ServedDisk.start(
        { backing: fileBacking(path, { direct: true }) },
        { queueSize: 16384 },
      );
      assert.ok((flagsOf(path) & constants.O_DIRECT) !== 0);
      const { guest } = served;
      const size = 64 << 10;
      const data = pattern(size);
      assert.equal((await guest.write(8, data, framing)).status, OK);
      const read = await guest.read(8, size, framing);
      assert.equal(read.status, OK);
      assertBytes(read.data, data);
      assertBytes(readFileSync(path).subarray(4096, 4096 + size), data);
    },
  );
}

onDisk("a direct disk moves more than its copies hold at once", async () => {
  using folder = new TemporaryFolder();
  await using served = await ServedDisk.start({
    backing: fileBacking(makeDisk(folder), { direct: true }),
  });
  const { guest } = served;
  const data = pattern(3 << 20);
  assert.equal((await guest.write(8, data, "together")).status, OK);
  const read = await guest.read(8, data.length, "together");
  assert.equal(read.status, OK);
  assertBytes(read.data, data);
});

test("a disk's logical block is what its backing can serve, and no less", async () => {
  const backing = {
    ...memoryBacking(diskSize),
    size: diskSize,
    blockSize: 4096,
  } as const;
  await using disk = blkDevice({ backing });
  assert.equal(disk.size, diskSize);
  assert.throws(() => blkDevice({ backing, logicalBlockSize: 512 }), {
    code: "OPTION",
    message: /logicalBlockSize: 512 \(memory serves blocks of 4096\)/,
  });
});
