// When a write is durable as it completes (virtio 1.3, 5.2.6.2).
import assert from "node:assert/strict";
import { nullBacking } from "../../devices/mod.ts";
import { test } from "../harness.ts";
import { OK, pattern, ServedDisk } from "./disk_guest.ts";

const flushBit = 1n << 9n;
const wceBit = 1n << 11n;

for (
  const { knows, isDurable } of [
    { knows: 0n, isDurable: true },
    { knows: flushBit, isDurable: false },
    { knows: flushBit | wceBit, isDurable: false },
  ]
) {
  test(`a driver that knows features 0x${knows.toString(16)} finds its writes ${isDurable ? "durable" : "cached"}`, async () => {
    const seen: boolean[] = [];
    const inner = nullBacking(1 << 20);
    await using served = await ServedDisk.start({
      backing: {
        ...inner,
        size: inner.size,
        openQueue(client) {
          const queue = inner.openQueue(client);
          const write = queue.write.bind(queue);
          queue.write = (head, offset, length, first, count, durable) => {
            seen.push(durable);
            write(head, offset, length, first, count, durable);
          };
          return queue;
        },
      },
    }, { knows });
    assert.equal((await served.guest.write(0, pattern(512))).status, OK);
    assert.deepEqual(seen, [isDurable]);
  });
}
