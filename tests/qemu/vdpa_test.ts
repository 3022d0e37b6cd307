/**
 * PCI-vDPA with QEMU's own virtio devices, inside a guest with an IOMMU: Deno,
 * the back-end and our front-end are all in the guest.
 */

import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { test } from "../harness.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { startGuest } from "./guest.ts";
import { projectFiles } from "./project_files.ts";

const properties = "disable-legacy=on,iommu_platform=on";

test(
  "QEMU's disks and cards pass through PCI-vDPA, behind an IOMMU",
  async () => {
    using folder = new TemporaryFolder();
    const disks = [folder.file("disk0"), folder.file("disk1")];
    for (const disk of disks) writeFileSync(disk, new Uint8Array(8 << 20));
    await using guest = await startGuest({
      memoryMb: 1536,
      isolated: [
        // With queue resets and a page for each notification, and without.
        `virtio-blk-pci,addr=6,drive=d0,packed=on,page-per-vq=on,num-queues=2,${properties}`,
        `virtio-blk-pci,addr=7,drive=d1,queue_reset=off,num-queues=2,${properties}`,
        `virtio-net-pci,addr=8,id=nic0,netdev=n0,mac=52:54:00:00:00:01,romfile=,${properties}`,
        `virtio-net-pci,addr=9,id=nic1,netdev=n1,mac=52:54:00:00:00:02,romfile=,queue_reset=off,${properties}`,
      ],
      drives: disks.map((file, i) =>
        `if=none,id=d${i},format=raw,file=${file}`
      ),
      netdevs: ["hubport,id=n0,hubid=0", "hubport,id=n1,hubid=0"],
      extras: {
        modules: ["vfio_iommu_type1", "vfio_pci"],
        files: projectFiles(["tests/qemu/vdpa_probe.ts"]),
      },
      script: `
export HOME=/tmp DENO_DIR=/tmp/deno NO_COLOR=1
cd /project
for device in 06 07 08 09; do
  deno run --allow-all --no-check cli/main.ts bind 00:$device.0
done
deno run --allow-all --no-check tests/qemu/vdpa_probe.ts
`,
    });
    const has = async (pattern: RegExp) => (await guest.waitFor(pattern))[0];
    const right = "16384 sectors, wrong 0,0,0,0,0,0";
    await has(
      new RegExp(
        `^0000:00:06.0: packed false, ${right}, .*logged true, calls true$`,
      ),
    );
    await has(
      new RegExp(`^0000:00:06.0: packed true, ${right}, .*logged true`),
    );
    await has(
      /^0000:00:06.0: host notifier, 0 wrong, 0 kicks relayed, true$/,
    );
    await has(
      new RegExp(`^0000:00:07.0: packed false, ${right}, .*logged true`),
    );
    await has(
      /^net: 52:54:00:00:00:01 52:54:00:00:00:02, link true, 0 wrong$/,
    );
    await has(/^net: pull the cable$/);
    await guest.qmp("set_link", { name: "nic0", up: false });
    await has(/^net: link false$/);
    assert.equal(await guest.exited, 0);
  },
  300,
);
