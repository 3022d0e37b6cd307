// frontend/ against somebody else's back-ends: QEMU's storage daemon and DPDK's
// vhost.
import assert from "node:assert/strict";
import { closeSync, ftruncateSync, openSync, readFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import {
  BlkClient,
  hasFeature,
  supportedFeatures,
  VhostUserDevice,
  VirtioFeature,
} from "../../frontend/mod.ts";
import { pattern } from "../devices/disk_guest.ts";
import { Random } from "../hostile/random.ts";
import { testpmdMissing, testpmdProgram } from "../support/testpmd.ts";
import { test } from "../harness.ts";
import { within } from "../support/wait.ts";
import type { Guest } from "../virtqueue/served.ts";
import { opened, startPeer } from "./peer.ts";

const diskSize = 8 << 20;

test("a disk of QEMU's storage daemon holds what frontend/ writes, direct and indirect", async () => {
  let image = "";
  await using peer = await startPeer((socketPath, folder) => {
    image = join(folder, "disk");
    const fd = openSync(image, "w");
    ftruncateSync(fd, diskSize);
    closeSync(fd);
    return [
      "qemu-storage-daemon",
      ...["--blockdev", `node-name=disk,driver=file,filename=${image}`],
      "--export",
      "type=vhost-user-blk,id=export,node-name=disk,writable=on," +
      `num-queues=2,addr.type=unix,addr.path=${socketPath}`,
    ];
  });
  const disk = await opened(() =>
    BlkClient.open({
      path: peer.socketPath,
      queueCount: 2,
      ramSize: 16 << 20,
    })
  );
  assert.equal(disk.size, diskSize);
  const random = new Random(1);
  const expected = new Uint8Array(diskSize);
  for (let round = 0; round < 8; round++) {
    const indirect = round % 2 === 0;
    await Promise.all(Array.from({ length: 24 }, async (_, i) => {
      // Places of their own, so that their order does not matter.
      const size = 512 * (1 + random.below(64));
      const offset = i * (diskSize / 24 & ~0xffff) + 512 * random.below(16);
      const data = pattern(size, 100 * round + i);
      expected.set(data, offset);
      await disk.write(offset, data, { indirect });
      const back = await disk.read(offset, size, { indirect: !indirect });
      assert.deepEqual(back, data);
    }));
    // Where a stop ended, a start goes on.
    for (const queue of [0, 1]) {
      const base = await disk.device.stopQueue(queue);
      await disk.device.startQueue(queue, { base });
    }
  }
  await disk.flush();
  await disk.close();
  assert.deepEqual(new Uint8Array(readFileSync(image)), expected);
});

/** VIRTIO_NET_F_MRG_RXBUF. */
const mergeable = 1n << 15n;
/** struct virtio_net_hdr with num_buffers. */
const headerBytes = 12;

/** Frames through DPDK's vhost and back: its one port forwards to itself. */
async function exchange(packed: boolean, features: bigint): Promise<void> {
  await using peer = await startPeer((socketPath) => [
    testpmdProgram!,
    ...["--no-huge", "--no-pci", "--no-telemetry", "-m", "256"],
    ...["--lcores", "0@0,1@0", `--file-prefix=vhost2-${process.pid}`],
    ...["--vdev", `net_vhost0,iface=${socketPath},queues=1`],
    ...["--", "--forward-mode=io", "--total-num-mbufs=2048"],
  ]);
  await using guest: Guest = await opened(() =>
    VhostUserDevice.open({
      path: peer.socketPath,
      packed,
      features: features | mergeable,
      queueCount: 2,
      queueSize: 64,
      ramSize: 8 << 20,
    })
  );
  assert.equal(hasFeature(guest.features, VirtioFeature.RING_PACKED), packed);
  const random = new Random(2);
  let sent = 0;
  for (let round = 0; round < 12; round++) {
    const [receiver, sender] = guest.queues;
    // The ring ends within some burst; it has 64 descriptors.
    const count = 1 + random.below(30);
    const received = Array.from(
      { length: count },
      () => receiver.submit({ writable: [headerBytes + 1600] }),
    );
    const frames = Array.from({ length: count }, () => {
      const frame = pattern(headerBytes + 14 + random.below(1500), sent++);
      // No offloads.
      return frame.fill(0, 0, headerBytes);
    });
    const indirect = hasFeature(
      guest.features,
      VirtioFeature.RING_INDIRECT_DESC,
    ) && round % 3 === 0;
    const all = Promise.all(frames.map((frame) =>
      sender.submit({
        readable: round % 2 === 0
          ? [frame]
          : [frame.subarray(0, headerBytes), frame.subarray(headerBytes)],
        indirect,
      })
    ));
    await within(all, `round ${round}: frames are taken`);
    const back = await within(
      Promise.all(received),
      `round ${round}: frames are back`,
    );
    assert.deepEqual(
      back.map(({ data, written }) => data[0].slice(headerBytes, written)),
      frames.map((frame) => frame.slice(headerBytes)),
    );
    if (round % 4 !== 3) continue;
    // Where a stop ended, a start goes on, packed positions included.
    for (const queue of [0, 1]) await guest.stopQueue(queue);
    for (const queue of [0, 1]) await guest.startQueue(queue);
  }
}

const inOrder = 1n << 35n;
for (const packed of [false, true]) {
  for (const features of [supportedFeatures & ~inOrder, supportedFeatures]) {
    const order = features & inOrder ? "with IN_ORDER" : "in any order";
    const name = `DPDK's vhost returns the frames that frontend/ sends, ${
      packed ? "packed" : "split"
    } ${order}`;
    if (testpmdProgram !== null) test(name, () => exchange(packed, features));
    else test.skip(name, testpmdMissing);
  }
}
