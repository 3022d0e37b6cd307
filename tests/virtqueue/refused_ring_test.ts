// What the core refuses of a ring is named.
import assert from "node:assert/strict";
import { VhostUserDevice } from "../../frontend/mod.ts";
import { test } from "../harness.ts";
import { type Guest, serving } from "./served.ts";

test("of a ring that is aligned for the guest and not in its file, the area is named", async () => {
  await serving({}, async ({ path, errors }) => {
    for (const packed of [false, true]) {
      await using guest: Guest = await VhostUserDevice.open({
        path,
        packed,
        queueSize: 8,
        // The 16 bytes of a descriptor are not aligned in memory then.
        regions: [{ size: 1 << 20, mmapOffset: 8 }],
      });
      const address = guest.vringAddress(0).descriptor.toString(16);
      const { message } = await errors.next();
      assert.match(message, /Cannot process queue 0: its descriptor area/);
      assert.ok(message.includes(`area at 0x${address}: EINVAL`), message);
    }
  });
});
