/**
 * PCI-vDPA with QEMU's own virtio devices, inside a guest with an IOMMU: Deno,
 * the back-end and the front-end, ours or QEMU, are all in the guest.
 */

import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { test } from "../harness.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { guestCache } from "./cache.ts";
import { startGuest } from "./guest.ts";
import { configureInterface, makeSubnet, tapMissing } from "./host_network.ts";
import { buildInitramfs } from "./initramfs.ts";
import { projectFiles, qemuFiles } from "./project_files.ts";

const properties = "disable-legacy=on,iommu_platform=on";

test(
  "QEMU's disks and cards pass through PCI-vDPA, behind an IOMMU",
  async () => {
    using folder = new TemporaryFolder();
    const disks = [folder.file("disk0"), folder.file("disk1")];
    for (const disk of disks) writeFileSync(disk, new Uint8Array(8 << 20));
    await using guest = await startGuest({
      memoryMb: 1536,
      lifetimeMs: 560_000,
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
  600,
);

const pairsName =
  "a card's two queue pairs pass through PCI-vDPA to a TAP interface of the host";
const missing = tapMissing();
if (missing !== null) test.skip(pairsName, missing);
else {
  test(pairsName, async () => {
    const { host, guest: own } = makeSubnet();
    const name = `vhost2q${randomBytes(3).toString("hex")}`;
    const scripts = "script=no,downscript=no";
    await using guest = await startGuest({
      memoryMb: 1536,
      isolated: [
        `virtio-net-pci,addr=6,netdev=n0,mq=on,vectors=6,romfile=,${properties}`,
      ],
      netdevs: [`tap,id=n0,ifname=${name},queues=2,${scripts}`],
      extras: {
        modules: ["vfio_iommu_type1", "vfio_pci"],
        files: projectFiles(["tests/qemu/vdpa_pairs_probe.ts"]),
      },
      script: `
export HOME=/tmp DENO_DIR=/tmp/deno NO_COLOR=1
cd /project
deno run --allow-all --no-check cli/main.ts bind 00:06.0
deno run --allow-all --no-check tests/qemu/vdpa_pairs_probe.ts \\
  0000:00:06.0 ${host} ${own}
`,
    });
    configureInterface(name, host);
    await guest.waitFor(/^pairs: 2, each answered by itself$/);
    await guest.waitFor(/^pairs: 2, each answered by itself$/);
    assert.equal(await guest.exited, 0);
  });
}

// As docs/transports.md has it. The inner QEMU is stopped and continued while
// its guest writes: from the first of these on its rings are relayed.
test(
  "a guest inside a guest uses a disk by PCI-vDPA, stopped and continued",
  async () => {
    using folder = new TemporaryFolder();
    const disk = folder.file("inner.img");
    writeFileSync(disk, new Uint8Array(64 << 20));
    const cache = guestCache();
    const inner = buildInitramfs(
      cache,
      `
      wait_disk vda
      make_fs vda
      for round in 1 2; do
        write_files vda 8 64; remount_fs vda; check_files vda
      done
      umount_fs vda
      `,
    );
    const files = new Map([
      ...projectFiles(),
      ...qemuFiles(),
      ["inner/kernel", { bytes: readFileSync(cache.kernel) }] as const,
      ["inner/initramfs", { bytes: inner }] as const,
    ]);
    await using guest = await startGuest({
      memoryMb: 3072,
      cpus: 2,
      lifetimeMs: 850_000,
      isolated: [
        `virtio-blk-pci,addr=6,drive=inner,page-per-vq=on,${properties}`,
      ],
      drives: [`if=none,id=inner,format=raw,file=${disk}`],
      extras: { modules: ["vfio_iommu_type1", "vfio_pci"], files },
      script: `
export HOME=/tmp DENO_DIR=/tmp/deno NO_COLOR=1
cd /project
vhost2() { deno run --allow-all --no-check cli/main.ts "$@"; }
vhost2 bind 0000:00:06.0
mkfifo /tmp/monitor.in /tmp/monitor.out
cat /tmp/monitor.out >/dev/null &
vhost2 vdpa 0000:00:06.0 --socket-path /tmp/disk.sock --verbose 2>/tmp/trace &
until [ -S /tmp/disk.sock ]; do usleep 50000; done
/usr/bin/qemu-system-x86_64 -m 512M \\
  -object memory-backend-memfd,id=memory,size=512M,share=on \\
  -machine memory-backend=memory \\
  -chardev socket,id=disk,path=/tmp/disk.sock \\
  -device vhost-user-blk-pci,chardev=disk,page-per-vq=on \\
  -nic none -display none -vga none -serial stdio -monitor pipe:/tmp/monitor \\
  -kernel /inner/kernel -initrd /inner/initramfs \\
  -append "console=ttyS0 quiet tsc=reliable no_timer_check mitigations=off" \\
  </dev/null | while read -r line; do
    echo "inner: $line"
    case "$line" in
    *written*) printf 'stop\\ncont\\n' >/tmp/monitor.in ;;
    esac
  done
echo "bases: $(grep -c '^.*GET_VRING_BASE' /tmp/trace)"
echo "notifiers: $(grep -c '<- 3 BACKEND_VRING_HOST_NOTIFIER_MSG ack=0' /tmp/trace)"
`,
    });
    const limit = { timeoutMs: 400_000 };
    const has = (pattern: RegExp) => guest.waitFor(pattern, limit);
    await has(/^inner: guest-up/);
    for (let round = 0; round < 2; round++) {
      await has(/^inner: vda: 8 checksums OK/);
    }
    await has(/^inner: guest-exit 0/);
    const [, bases] = await has(/^bases: (\d+)/);
    assert.ok(Number(bases) >= 3, `stopped ${bases} times`);
    const [, notifiers] = await has(/^notifiers: (\d+)/);
    assert.ok(Number(notifiers) > 0, "the guest kicks the device itself");
    assert.equal(await guest.exited, 0);
  },
  900,
);
