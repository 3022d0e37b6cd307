// What is refused with a reason: XEN_MMAP and SET_VRING_ENDIAN
// (vhost-user-spec.md sections 1.2 and 1.4).

import assert from "node:assert/strict";
import {
  FrontendRequest as Request,
  ProtocolFeature,
  RefusedError,
} from "../../frontend/mod.ts";
import { featureMask } from "../../mod.ts";
import { singleMemoryRegion } from "../../protocol/memory_payloads.ts";
import { test } from "../harness.ts";
import { assertWorks, withGuest } from "./served.ts";

for (
  const [name, reason] of [
    ["XEN_MMAP", /XEN_MMAP\) was not offered: .*not from a Xen domain/],
    ["CROSS_ENDIAN", /CROSS_ENDIAN\) was not offered: .*little-endian/],
  ] as const
) {
  test(`${name} is not offered, and refused with a reason when it is acked`, async () => {
    const feature = featureMask(ProtocolFeature[name]);
    await withGuest({ errorsExpected: true }, async (guest, { errors }) => {
      const { connection } = guest;
      assert.equal(await connection.getProtocolFeatures() & feature, 0n);
      await assert.rejects(
        connection.setProtocolFeatures(guest.protocolFeatures | feature, {
          ack: true,
        }),
        RefusedError,
      );
      assert.match((await errors.next()).message, reason);
      // What was agreed on before still holds.
      await guest.activate();
      await guest.startQueue(0);
      await assertWorks(guest);
    });
  });
}

test("XEN_MMAP: a region in its format is refused by its size", async () => {
  await withGuest({ errorsExpected: true }, async (guest, { errors }) => {
    const { description, fd } = guest.ram.regions[0];
    const payload = singleMemoryRegion.encode(
      { ...description, xen: { flags: 1, domid: 0 } },
      { xenMmap: true },
    );
    const ack = await guest.connection.acknowledged(
      Request.ADD_MEM_REG,
      payload,
      { fds: [fd] },
    );
    assert.notEqual(ack, 0n);
    assert.match((await errors.next()).message, /ADD_MEM_REG: .*48/);
  });
});

test("SET_VRING_ENDIAN is refused, little-endian too, and the connection stays", async () => {
  await withGuest({ errorsExpected: true }, async (guest, { errors }) => {
    for (const num of [0, 1]) {
      await assert.rejects(
        guest.connection.exchange(Request.SET_VRING_ENDIAN, { index: 0, num }, {
          ack: true,
        }),
        RefusedError,
      );
      assert.match(
        (await errors.next()).message,
        /SET_VRING_ENDIAN needs CROSS_ENDIAN, which is not negotiated/,
      );
    }
    await guest.activate();
    await guest.startQueue(0);
    await assertWorks(guest);
  });
});
