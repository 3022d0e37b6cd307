// IN_ORDER on the driver's side (virtio 1.3, 2.7.9 and 2.8.8), against used
// elements written here as any device may write them.
import assert from "node:assert/strict";
import {
  featureMask,
  GuestRam,
  PackedDriver,
  SplitDriver,
  VirtioFeature,
} from "../../frontend/mod.ts";
import { usedFlags } from "../../driver/packed_layout.ts";
import { test } from "../harness.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";

const options = {
  features: featureMask(VirtioFeature.VERSION_1, VirtioFeature.IN_ORDER),
  usesCalls: false,
};

type Device = { use(id: number, length: number, chains: number): void };

function splitDevice(driver: SplitDriver): Device {
  let index = 0;
  const { ram, ring, queueSize } = driver;
  const used = ram.bytes(ring.addresses.used, 6 + 8 * queueSize);
  const view = new DataView(used.buffer, used.byteOffset);
  return {
    use(id, length, chains) {
      const offset = 4 + 8 * (index % queueSize);
      view.setUint32(offset, id, true);
      view.setUint32(offset + 4, length, true);
      index += chains;
      view.setUint16(2, index & 0xffff, true);
    },
  };
}

function packedDevice(driver: PackedDriver): Device {
  return {
    // The driver's position is where the next used descriptor belongs.
    use(id, length) {
      const position = driver.usedPosition;
      const flags = usedFlags(position);
      driver.ring.setDescriptor(position & 0x7fff, {
        address: 0n,
        length,
        id,
        flags,
      });
    },
  };
}

const kinds = [
  {
    name: "split",
    make(ram: GuestRam, queueSize: number) {
      const driver = new SplitDriver(ram, { ...options, queueSize });
      return { driver, device: splitDevice(driver) };
    },
  },
  {
    name: "packed",
    make(ram: GuestRam, queueSize: number) {
      const driver = new PackedDriver(ram, { ...options, queueSize });
      return { driver, device: packedDevice(driver) };
    },
  },
];

for (const { name, make } of kinds) {
  test(`one used element of a ${name} ring completes the requests before it, as written completely`, async () => {
    await withoutDescriptorLeak(async () => {
      using ram = new GuestRam([{ size: 1 << 20 }]);
      const { driver, device } = make(ram, 8);
      const ids: number[] = [];
      driver.onUsed = ({ id }) => void ids.push(id);
      for (let lap = 0; lap < 7; lap++) {
        const send = (writable: number[]) =>
          driver.submit({ readable: [Uint8Array.of(1)], writable });
        const requests = [send([3, 4]), send([]), send([5]), send([6])];
        // In the order in which they were made available. Each lap fills the
        // ring; a packed chain has its id in its last descriptor.
        const heads = driver instanceof PackedDriver
          ? [2, 3, 5, 7].map((slot) => driver.ring.descriptor(slot).id)
          : [0, 3, 4, 6];
        assert.equal(driver.freeDescriptors, 0);
        device.use(heads[2], 2, 3);
        assert.equal(driver.poll(), 3);
        assert.deepEqual(ids.splice(0), heads.slice(0, 3));
        const first = await Promise.all(requests.slice(0, 3));
        assert.deepEqual(first.map(({ written }) => written), [7, 0, 2]);
        assert.equal(driver.freeDescriptors, 6);
        device.use(heads[3], 6, 1);
        assert.equal(driver.poll(), 1);
        assert.equal((await requests[3]).written, 6);
        ids.length = 0;
      }
      assert.deepEqual(driver.strays, []);
      driver.close();
    });
  });

  test(`a used element of a ${name} ring that ends no run breaks it`, async () => {
    await withoutDescriptorLeak(async () => {
      using ram = new GuestRam([{ size: 1 << 20 }]);
      const { driver, device } = make(ram, 8);
      const request = driver.submit({ writable: [4] });
      device.use(5, 0, 1);
      driver.poll();
      await assert.rejects(request, {
        code: "RING",
        message: /head 5 is not in flight/,
      });
      driver.close();
    });
  });
}

test("a used index that ends within a run breaks the ring", async () => {
  await withoutDescriptorLeak(async () => {
    using ram = new GuestRam([{ size: 1 << 20 }]);
    const { driver, device } = kinds[0].make(ram, 8);
    const requests = [1, 2].map(() => driver.submit({ writable: [4] }));
    device.use(1, 0, 1);
    driver.poll();
    for (const request of requests) {
      await assert.rejects(request, /ends before head 1/);
    }
    driver.close();
  });
});

test("with IN_ORDER descriptors are taken in the order of the table, over its end", async () => {
  await withoutDescriptorLeak(async () => {
    using ram = new GuestRam([{ size: 1 << 20 }]);
    const driver = new SplitDriver(ram, { ...options, queueSize: 8 });
    const device = splitDevice(driver);
    let next = 0;
    for (let i = 0; i < 30; i++) {
      const parts = 1 + i % 3;
      const request = driver.submit({
        writable: Array.from({ length: parts }, () => 4),
      });
      const head = next;
      const table = ram.bytes(driver.ring.addresses.descriptor, 128);
      const view = new DataView(table.buffer, table.byteOffset);
      for (let part = 0; part < parts; part++, next = (next + 1) % 8) {
        if (part + 1 === parts) continue;
        assert.equal(view.getUint16(16 * next + 14, true), (next + 1) % 8);
      }
      device.use(head, 0, 1);
      driver.poll();
      assert.equal((await request).written, 0);
    }
    driver.close();
  });
});
