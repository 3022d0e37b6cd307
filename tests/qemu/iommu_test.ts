// A Linux guest uses our disks through a virtual IOMMU: its driver's addresses
// are translated by QEMU, page by page, and taken back after each request.
import assert from "node:assert/strict";
import { test } from "../harness.ts";
import { BACKEND, startBackend } from "./backend.ts";
import { startGuest } from "./guest.ts";

const MiB = 1 << 20;

for (const iommu of ["strict", "passthrough"] as const) {
  const name =
    `a guest behind an IOMMU (${iommu}) verifies what it wrote, over split and packed rings, and goes on after a reset`;
  if (BACKEND === "vhost2") test(name, () => iommuGuest(iommu));
  else test.skip(name, "the storage daemon has no IOTLB");
}

async function iommuGuest(iommu: "strict" | "passthrough"): Promise<void> {
  await using split = await startBackend({ disk: { memory: 64 * MiB } });
  await using packed = await startBackend({
    disk: { memory: 64 * MiB },
    numQueues: 2,
  });
  await using guest = await startGuest({
    cpus: 2,
    iommu,
    backends: [split, packed],
    disks: [
      { id: "split", socketPath: split.socketPath, iommuPlatform: true },
      {
        id: "packed",
        socketPath: packed.socketPath,
        numQueues: 2,
        packed: true,
        iommuPlatform: true,
      },
    ],
    // The features that the driver took, lowest bit first: bit 33 is
    // ACCESS_PLATFORM, bit 34 is PACKED. A device behind the IOMMU is in one
    // of its groups.
    script: `
      for disk in vda vdb; do
        features=$(cat /sys/block/$disk/device/features)
        type=$(cat /sys/block/$disk/device/../iommu_group/type)
        echo "$disk platform $(echo $features | cut -c34)" \\
          "packed $(echo $features | cut -c35) type $type"
      done
      verify_mix 2 16 500 vda vdb
      make_fs vda
      write_files vda 10 64
      remount_fs vda
      check_files vda
      echo done
      read line
    `,
  });
  const type = iommu === "strict" ? "DMA" : "identity";
  for (let round = 0; round < 2; round++) {
    await guest.waitFor(new RegExp(`^vda platform 1 packed 0 type ${type}$`));
    await guest.waitFor(new RegExp(`^vdb platform 1 packed 1 type ${type}$`));
    await guest.waitFor(/^vda: 10 checksums OK/);
    await guest.waitFor(/^done$/);
    // What the first boot has mapped means nothing to the second.
    if (round === 0) await guest.reset();
  }
  guest.type("end");
  assert.equal(await guest.exited, 0);
  const verified = guest.lines.filter((line) => /^verify mix ok/.test(line));
  assert.equal(verified.length, 8);
  for (const backend of [split, packed]) {
    assert.doesNotMatch(backend.output(), /Cannot/);
  }
}
