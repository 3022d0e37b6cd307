// A migration of a guest behind an IOMMU: the log is of guest memory, whatever
// the addresses in the rings are.

import assert from "node:assert/strict";
import { logPageSize } from "../../frontend/mod.ts";
import { virtqueueProtocolFeatures } from "../../mod.ts";
import { test } from "../harness.ts";
import { echo, formats, pageOf, withIommu } from "./iommu_guest.ts";

/** Where nothing of the guest's memory is. */
const base = 0x5_0000_0000n;

for (const { name, packed } of formats) {
  test(`${name}: behind an IOMMU the pages marked are those of guest memory`, async () => {
    const protocolFeatures = virtqueueProtocolFeatures;
    await withIommu({ packed, protocolFeatures }, async (guest) => {
      await guest.start();
      const log = await guest.startLog({ buffers: true, rings: false });
      const { ram, iommu } = guest;
      // Two pages that are neighbours for the device and nowhere else.
      const second = ram.allocate(logPageSize, logPageSize);
      ram.allocate(logPageSize, logPageSize);
      const first = ram.allocate(logPageSize, logPageSize);
      iommu.mapAt(base, first, logPageSize);
      iommu.mapAt(base + BigInt(logPageSize), second, logPageSize);
      const readable = ram.allocate(logPageSize, logPageSize);
      iommu.mapAt(base + 0x10_0000n, readable, logPageSize);
      log.take();
      await guest.queues[0].submitChain([
        { address: base + 0x10_0000n, length: 200, isWritable: false },
        { address: base + 4000n, length: 200, isWritable: true },
      ]);
      assert.deepEqual(
        log.take(),
        [first, second].sort((a, b) => Number(a - b)),
      );
    });
  });

  test(`${name}: behind an IOMMU a ring is marked where it is in guest memory`, async () => {
    const protocolFeatures = virtqueueProtocolFeatures;
    // The parts of a ring are in pages of their own, none of them page 0.
    const guest = {
      regions: [{ gpa: 0x20_0000n, size: 1 << 20 }],
      queueSize: 256,
    };
    await withIommu({ packed, protocolFeatures, guest }, async (guest) => {
      await guest.start();
      const log = await guest.startLog({ buffers: false, rings: true });
      const { descriptor, used } = guest.queues[0].ring.addresses;
      log.take();
      await echo(guest);
      const written = pageOf(packed ? descriptor : used);
      assert.ok(log.isDirty(written), `0x${written.toString(16)} is marked`);
    });
  });
}
