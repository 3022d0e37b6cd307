// Long requests on a memory disk: done in slices, so that nobody else waits.
import assert from "node:assert/strict";
import { memoryBacking } from "../../devices/mod.ts";
import { test } from "../harness.ts";
import {
  assertBytes,
  OK,
  pattern,
  range,
  ServedDisk,
  Type,
} from "./disk_guest.ts";

const MiB = 1 << 20;

test("a memory disk reads and writes megabytes at once as it does sectors", async () => {
  await using served = await ServedDisk.start({
    backing: memoryBacking(16 * MiB),
  });
  const { guest } = served;
  const data = pattern(5 * MiB + 512);
  assert.equal((await guest.write(8, data)).status, OK);
  const back = await guest.read(8, data.length);
  assert.deepEqual([back.status, back.written], [OK, data.length + 1]);
  assertBytes(back.data, data);
  assertBytes((await guest.read(8, 512)).data, data.subarray(0, 512));
  const zeroed = await guest.request(Type.WRITE_ZEROES, 0, {
    data: range(16, 4 * MiB / 512),
  });
  assert.equal(zeroed.status, OK);
  const after = await guest.read(8, data.length);
  data.fill(0, 4096, 4096 + 4 * MiB);
  assertBytes(after.data, data);
});

test("a short request on one queue overtakes the long one that came before on another", async () => {
  await using served = await ServedDisk.start(
    { backing: memoryBacking(64 * MiB), numQueues: 2 },
    { queueCount: 2 },
  );
  const { guest } = served;
  const order: string[] = [];
  const long = guest.request(Type.IN, 0, { size: 12 * MiB, queue: 0 })
    .then(() => order.push("long"));
  const short = guest.request(Type.IN, 0, { size: 512, queue: 1 })
    .then(() => order.push("short"));
  await Promise.all([long, short]);
  assert.deepEqual(order, ["short", "long"]);
});

test("a queue stops while long requests are in the works, and they end first", async () => {
  await using served = await ServedDisk.start({
    backing: memoryBacking(64 * MiB),
  });
  const { guest } = served;
  const answer = guest.request(Type.IN, 0, { size: 12 * MiB });
  // Its answer says that the queue has taken the long one too: what a stopping
  // queue finds in the ring it leaves there.
  await guest.request(Type.GET_ID, 0, { size: 20 });
  await guest.connection.getVringBase(0);
  guest.drivers[0].poll();
  assert.equal((await answer).status, OK);
});
