/**
 * VFIO and the virtio PCI driver against QEMU's own devices, inside a guest
 * with an IOMMU: Deno and this project are in the guest's file system.
 */

import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { test } from "../harness.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { startGuest } from "./guest.ts";
import { projectFiles } from "./project_files.ts";

const properties = "disable-legacy=on,iommu_platform=on";

test("QEMU's virtio devices work by VFIO, behind an IOMMU", async () => {
  using folder = new TemporaryFolder();
  const disk = folder.file("disk");
  writeFileSync(disk, new Uint8Array(8 << 20));
  await using guest = await startGuest({
    memoryMb: 1536,
    isolated: [
      `virtio-rng-pci,addr=5,${properties}`,
      `virtio-blk-pci,addr=6,drive=disk,packed=on,${properties}`,
      `virtio-balloon-pci,addr=7,${properties}`,
    ],
    drives: [`if=none,id=disk,format=raw,file=${disk}`],
    extras: {
      modules: ["vfio_iommu_type1", "vfio_pci"],
      files: projectFiles(["tests/qemu/vfio_probe.ts"]),
    },
    script: `
export HOME=/tmp DENO_DIR=/tmp/deno NO_COLOR=1
cd /project
vhost2() { deno run --allow-all --no-check cli/main.ts "$@"; }
vhost2 bind 00:05.0
vhost2 bind 00:06.0
deno run --allow-all --no-check tests/qemu/vfio_probe.ts
vhost2 bind 00:06.0 --back
`,
  });
  const has = async (pattern: RegExp) => (await guest.waitFor(pattern))[0];
  await has(/^0000:00:05\.0: .* -> vfio-pci$/);
  await has(/^0000:00:06\.0: virtio-pci -> vfio-pci$/);
  await has(/^random: type 4, \d+ vectors, 100 different$/);
  await has(
    /^disk: packed false, isolated true, 16384 sectors, 0 of 100 wrong$/,
  );
  await has(
    /^disk: packed true, isolated true, 16384 sectors, 0 of 100 wrong$/,
  );
  await has(
    /0000:00:07\.0: it is bound to virtio-pci, not to vfio-pci: bind it/,
  );
  await has(/0000:00:1e\.0: there is no such device/);
  await has(/0000:00:05\.0: this process has it open already/);
  await has(/^0000:00:06\.0: vfio-pci -> virtio-pci$/);
  assert.equal(await guest.exited, 0);
}, 600);
