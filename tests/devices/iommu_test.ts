// A disk behind an IOMMU, on the event loop and in Workers.
import assert from "node:assert/strict";
import { BlkClient, type VhostUserDeviceOptions } from "../../frontend/mod.ts";
import { blkDevice, memoryBacking, registerTarget } from "../../mod.ts";
import { test } from "../harness.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { within } from "../support/wait.ts";
import { assertBytes, pattern } from "./disk_guest.ts";

const MiB = 1 << 20;
const kinds = [
  ["split", false, "strict"],
  ["split", false, "passthrough"],
  ["packed", true, "strict"],
] as const;

async function withDisk(
  options: VhostUserDeviceOptions & { readonly packed: boolean },
  workers: number,
  body: (client: BlkClient) => Promise<void>,
): Promise<void> {
  using folder = new TemporaryFolder();
  const path = folder.file("socket");
  const errors: string[] = [];
  const onError = (error: Error) => void errors.push(error.message);
  await using disk = blkDevice({
    backing: memoryBacking(MiB),
    numQueues: 2,
    onError,
  });
  await using _target = await registerTarget({
    transport: "vhost-user",
    address: path,
    ...disk,
    workers,
    onError,
  });
  const client = await BlkClient.open({
    path,
    queueCount: 2,
    queueSize: 32,
    ramSize: 4 * MiB,
    ...options,
  });
  try {
    await body(client);
  } finally {
    await client.close();
  }
  assert.deepEqual(errors, []);
}

for (const [name, packed, mode] of kinds) {
  for (const workers of [0, 2]) {
    test(`a disk behind a ${mode} IOMMU, ${name} rings, ${workers} Workers: what is read is what was written`, async () => {
      await withDisk({ packed, iommu: { mode } }, workers, async (client) => {
        const blocks = Array.from({ length: 60 }, (_, i) => pattern(4096, i));
        await within(
          Promise.all(blocks.map((data, i) => client.write(i * 4096, data))),
          "writes",
        );
        const read = await within(
          Promise.all(blocks.map((_, i) => client.read(i * 4096, 4096))),
          "reads",
        );
        read.forEach((data, i) => assertBytes(data, blocks[i]));
        // Everything is asked for again, the rings' pages too.
        await client.device.iommu!.invalidate(0n, (1n << 64n) - 1n);
        assertBytes(
          await within(client.read(4096, 4096), "a read"),
          blocks[1],
        );
      });
    });
  }
}
