/** The front-end against a back-end that is not ours. */

import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import {
  BlkClient,
  BlkFeature,
  BlkRequestType,
  BlkStatus,
  featureMask,
  ProtocolFeature,
  supportedFeatures,
  supportedProtocolFeatures,
  VhostUserDevice,
} from "../../frontend/mod.ts";
import { test } from "../harness.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";
import {
  StorageDaemon,
  storageDaemonMissing,
} from "../support/storage_daemon.ts";
import { TemporaryFolder } from "../support/temporary.ts";

const mebibyte = 1 << 20;
const missing = storageDaemonMissing();
const blkFeatures = supportedFeatures |
  featureMask(...Object.values(BlkFeature));

function pattern(size: number, seed: number): Uint8Array {
  const bytes = new Uint8Array(size);
  for (let i = 0; i < size; i++) bytes[i] = (i * 31 + (i >> 9) + seed) & 0xff;
  return bytes;
}

interface Setup {
  readonly daemon: StorageDaemon;
  readonly socketPath: string;
  /** The disk's file; 16 MiB. */
  readonly file: string;
}

/** A test against the storage daemon with a file. */
function daemonTest(
  name: string,
  body: (setup: Setup) => Promise<void>,
): void {
  if (missing !== null) return test.skip(name, missing);
  test(name, () => withoutDescriptorLeak(() => run(body)));
}

async function run(body: (setup: Setup) => Promise<void>): Promise<void> {
  const folder = new TemporaryFolder();
  const file = folder.file("disk");
  const socketPath = folder.file("socket");
  writeFileSync(file, new Uint8Array(16 * mebibyte));
  try {
    const daemon = await StorageDaemon.start(
      `driver=file,filename=${file},discard=unmap`,
      socketPath,
      4,
    );
    try {
      await body({ daemon, socketPath, file });
    } finally {
      await daemon.stop();
    }
  } finally {
    folder.remove();
  }
}

daemonTest(
  "data written through the ring is in the disk's file and is read back",
  async ({ socketPath, file }) => {
    const disk = await BlkClient.open({ path: socketPath });
    try {
      assert.equal(disk.size, 16 * mebibyte);
      assert.equal(disk.config.blockSize, 512);
      const data = pattern(mebibyte, 1);
      await disk.write(512, data);
      await disk.flush();
      const inFile = readFileSync(file).subarray(512, 512 + mebibyte);
      assert.ok(inFile.equals(data));
      assert.deepEqual(await disk.read(512, mebibyte), data);
      assert.deepEqual(
        await disk.read(512, 4096, { indirect: true }),
        data.slice(0, 4096),
      );
      assert.equal(await disk.getId(), "vhost_user_blk");
      assert.deepEqual(disk.device.queues[0].strays, []);
    } finally {
      await disk.close();
    }
  },
);

daemonTest("discard and write zeroes leave zeroes", async ({ socketPath }) => {
  const disk = await BlkClient.open({ path: socketPath });
  try {
    await disk.write(0, pattern(65536, 2));
    await disk.writeZeroes(4096, 4096);
    await disk.writeZeroes(8192, 4096, { unmap: true });
    await disk.discard(16384, 8192);
    const bytes = await disk.read(0, 65536);
    const expected = pattern(65536, 2);
    expected.fill(0, 4096, 12288);
    expected.fill(0, 16384, 24576);
    assert.deepEqual(bytes, expected);
  } finally {
    await disk.close();
  }
});

daemonTest(
  "requests on four queues run side by side",
  async ({ socketPath }) => {
    const disk = await BlkClient.open({
      path: socketPath,
      queueCount: 4,
      queueSize: 16,
      acksAll: true,
    });
    try {
      const offsets = Array.from({ length: 200 }, (_, i) => i * 4096);
      await Promise.all(
        offsets.map((offset) =>
          disk.write(offset, pattern(4096, offset >> 12))
        ),
      );
      const read = await Promise.all(
        offsets.map((offset, i) =>
          disk.read(offset, 4096, { indirect: i % 3 === 0 })
        ),
      );
      read.forEach((bytes, i) => assert.deepEqual(bytes, pattern(4096, i)));
      for (const queue of disk.device.queues) {
        assert.equal(queue.usedCount, 100);
        assert.equal(queue.freeDescriptors, 16);
      }
    } finally {
      await disk.close();
    }
  },
);

daemonTest(
  "an error is the request's own and the disk goes on",
  async ({ socketPath }) => {
    const disk = await BlkClient.open({ path: socketPath });
    try {
      await assert.rejects(disk.read(16 * mebibyte, 512), {
        name: "BlkError",
        code: "OP",
        status: BlkStatus.IOERR,
        message: `Cannot read 512 bytes at ${16 * mebibyte}: I/O error`,
      });
      const unknown = await disk.request(99, 0n, [], 0);
      assert.equal(unknown.status, BlkStatus.UNSUPP);
      await assert.rejects(disk.read(100, 512), { code: "OPTION" });
      await disk.read(0, 512);
    } finally {
      await disk.close();
    }
  },
);

daemonTest(
  "queues stop and start singly, and go on where they were",
  async ({ socketPath }) => {
    const disk = await BlkClient.open({ path: socketPath, queueCount: 2 });
    try {
      const { device } = disk;
      for (let i = 0; i < 5; i++) await disk.read(0, 512, { queue: 0 });
      const base = await device.stopQueue(0);
      assert.equal(base, 5);
      const held = disk.read(0, 512, { queue: 0 });
      await disk.read(0, 512, { queue: 1 });
      assert.equal(device.queues[0].inFlight, 1);
      await device.startQueue(0);
      assert.equal((await held).length, 512);
      assert.equal(device.queues[0].usedCount, 6);
    } finally {
      await disk.close();
    }
  },
);

for (
  const [what, protocolFeatures] of [
    [
      "SET_MEM_TABLE",
      featureMask(
        ProtocolFeature.CONFIG,
        ProtocolFeature.MQ,
        ProtocolFeature.REPLY_ACK,
      ),
    ],
    ["ADD_MEM_REG", supportedProtocolFeatures],
    ["SET_MEM_TABLE without acks", featureMask(ProtocolFeature.CONFIG)],
  ] as const
) {
  daemonTest(
    `memory in several regions, by ${what}`,
    async ({ socketPath }) => {
      const disk = await BlkClient.open({
        path: socketPath,
        protocolFeatures,
        regions: [
          { size: mebibyte, gpa: 0n },
          { size: mebibyte, gpa: 1n << 32n, mmapOffset: 8192 },
        ],
      });
      try {
        const { ram, queues } = disk.device;
        const [first, second] = ram.regions;
        const header = ram.allocate(16, 16, first);
        const data = ram.allocate(8192, 16, second);
        const status = ram.allocate(1, 1, first);
        await disk.write(4096, pattern(8192, 3));
        ram.write(header, Uint8Array.of(0, 0, 0, 0, 0, 0, 0, 0, 8));
        const written = await queues[0].submitChain([
          { address: header, length: 16, isWritable: false },
          { address: data, length: 8192, isWritable: true },
          { address: status, length: 1, isWritable: true },
        ]);
        assert.equal(written, 8193);
        assert.deepEqual(ram.read(data, 8192), pattern(8192, 3));
      } finally {
        await disk.close();
      }
    },
  );
}

daemonTest(
  "a back-end that dies ends requests and the device",
  async ({ socketPath, daemon }) => {
    const disk = await BlkClient.open({ path: socketPath });
    await disk.device.stopQueue(0);
    const request = disk.read(0, 512);
    await daemon.stop();
    await disk.device.connection.closed;
    await disk.close();
    await assert.rejects(request, { code: "CLOSED" });
  },
);

daemonTest(
  "a device that has fewer queues than wanted is refused without a trace",
  async ({ socketPath }) => {
    await assert.rejects(
      VhostUserDevice.open({ path: socketPath, queueCount: 5 }),
      { code: "OPTION", message: "Cannot use 5 queues: the device has 4" },
    );
  },
);

daemonTest("a request header may be split anywhere", async ({ socketPath }) => {
  const device = await VhostUserDevice.open({
    path: socketPath,
    features: blkFeatures,
  });
  try {
    const header = new Uint8Array(16);
    header[0] = BlkRequestType.IN;
    const { written, data } = await device.queues[0].submit({
      readable: [header.subarray(0, 3), header.subarray(3)],
      writable: [100, 412, 1],
      initial: 0xff,
    });
    assert.equal(written, 513);
    assert.equal(data[2][0], BlkStatus.OK);
  } finally {
    await device.close();
  }
});
