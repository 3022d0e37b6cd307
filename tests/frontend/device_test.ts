/** The front-end's device against a back-end of this library. */

import assert from "node:assert/strict";
import { blkDevice, memoryBacking } from "../../devices/blk/mod.ts";
import {
  BlkClient,
  BlkRequestType,
  BlkStatus,
  encodeBlkHeader,
  featureMask,
  hasFeature,
  ProtocolFeature,
  supportedFeatures,
  supportedProtocolFeatures,
  VhostUserDevice,
  VirtioFeature,
} from "../../frontend/mod.ts";
import { registerTarget } from "../../mod.ts";
import { test } from "../harness.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";
import { withSocketPath } from "../support/temporary.ts";
import { Signal } from "../support/wait.ts";

const mebibyte = 1 << 20;

async function withDisk(
  body: (path: string, disk: ReturnType<typeof blkDevice>) => Promise<void>,
): Promise<void> {
  await withoutDescriptorLeak(() =>
    withSocketPath(async (path) => {
      const disk = blkDevice({
        backing: memoryBacking(4 * mebibyte),
        numQueues: 2,
      });
      const target = await registerTarget({
        transport: "vhost-user",
        address: path,
        features: disk.features,
        queueCount: disk.queueCount,
        device: disk.device,
      });
      try {
        await body(path, disk);
      } finally {
        await target.unregister();
        await disk.close();
      }
    })
  );
}

test("a guest resets the device and starts it again", async () => {
  await withDisk(async (path) => {
    const disk = await BlkClient.open({ path, queueCount: 2 });
    try {
      await disk.write(4096, new Uint8Array(512).fill(3));
      for (let i = 0; i < 3; i++) {
        await disk.device.reset();
        assert.equal(disk.device.isStarted(0), false);
        await disk.device.start();
        assert.equal((await disk.read(4096, 512))[511], 3);
        assert.equal(await disk.device.connection.getStatus(), 15);
      }
    } finally {
      await disk.close();
    }
  });
});

test("a config change reaches the front-end", async () => {
  await withDisk(async (path, served) => {
    const disk = await BlkClient.open({ path });
    try {
      const changed = new Signal();
      let count = 0;
      disk.device.onConfigChange = () => {
        count++;
        changed.notify();
      };
      await served.resize(8 * mebibyte);
      await changed.until(() => count === 1, "a config change");
      await disk.refreshConfig();
      assert.equal(disk.size, 8 * mebibyte);
    } finally {
      await disk.close();
    }
  });
});

test("memory comes and goes while queues run", async () => {
  await withDisk(async (path) => {
    const disk = await BlkClient.open({ path, queueSize: 16, ramSize: 65536 });
    try {
      const { device } = disk;
      await assert.rejects(disk.read(0, mebibyte), { code: "MEMORY" });
      const region = device.ram.addRegion({ size: 2 * mebibyte });
      await device.addRegion(region);
      assert.equal((await disk.read(0, mebibyte)).length, mebibyte);
      await device.removeRegion(region);
      device.ram.removeRegion(region);
      assert.equal((await disk.read(0, 4096)).length, 4096);
    } finally {
      await disk.close();
    }
  });
});

test("without PROTOCOL_FEATURES the rings run without being enabled", async () => {
  await withDisk(async (path) => {
    const device = await VhostUserDevice.open({
      path,
      features: supportedFeatures &
        ~featureMask(VirtioFeature.PROTOCOL_FEATURES),
    });
    try {
      assert.equal(device.protocolFeatures, 0n);
      const { data } = await device.queues[0].submit({
        readable: [encodeBlkHeader(BlkRequestType.IN, 0n)],
        writable: [512, 1],
        initial: 0xff,
      });
      assert.deepEqual(data[0], new Uint8Array(512));
      assert.equal(data[1][0], BlkStatus.OK);
    } finally {
      await device.close();
    }
  });
});

test("ring addresses are sent in the space that was negotiated", async () => {
  await withDisk(async (path) => {
    const disk = await BlkClient.open({
      path,
      protocolFeatures: supportedProtocolFeatures |
        featureMask(ProtocolFeature.GPA_ADDRESSES),
    });
    try {
      const { device } = disk;
      const isGpa = hasFeature(
        device.protocolFeatures,
        ProtocolFeature.GPA_ADDRESSES,
      );
      const { descriptor } = device.queues[0].ring.addresses;
      assert.equal(
        device.vringAddress(0).descriptor as bigint,
        isGpa ? descriptor : device.ram.toUva(descriptor) as bigint,
      );
      await disk.read(0, 512);
    } finally {
      await disk.close();
    }
  });
});
