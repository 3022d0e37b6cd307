/**
 * Random valid traffic, and the model that says what each request must come
 * back with.
 *
 * @module
 */

import assert from "node:assert/strict";
import type { QueueDriver } from "../../frontend/mod.ts";
import type { Request } from "../../mod.ts";
import type { Random } from "../hostile/random.ts";

/** What the device answers to `input`, if it has room for `room` bytes. */
function answerTo(input: Uint8Array, room: number): Uint8Array<ArrayBuffer> {
  const sum = input.reduce(
    (total, byte) => (total + byte) & 0xff,
    input.length,
  );
  const length = input.length % (room + 1);
  return Uint8Array.from({ length }, (_, i) => (sum + 7 * i) & 0xff);
}

/** Some turns of the event loop. */
export async function turns(count: number): Promise<void> {
  for (let i = 0; i < count; i++) {
    await new Promise((resolve) => setImmediate(resolve));
  }
}

/** Answers at once or some turns of the event loop later, in any order. */
export function answering(random: Random) {
  return (request: Request): number | Promise<number> => {
    const answer = answerTo(request.read(), request.writableBytes);
    if (random.once(3)) return request.write(answer);
    return turns(random.below(4)).then(() => request.write(answer));
  };
}

/** One request, checked against the model. */
export async function send(
  driver: QueueDriver,
  random: Random,
  canIndirect: boolean,
): Promise<void> {
  const limit = Math.min(driver.queueSize, 6);
  const indirect = canIndirect && random.once(2);
  const parts = 1 + random.below(indirect ? 8 : limit);
  const readableParts = random.below(parts + 1);
  const readable = Array.from(
    { length: readableParts },
    () => random.bytes(1 + random.below(90)),
  );
  const writable = Array.from(
    { length: parts - readableParts },
    () => 1 + random.below(90),
  );
  const input = new Uint8Array(readable.flatMap((bytes) => [...bytes]));
  const room = writable.reduce((sum, length) => sum + length, 0);
  const expected = answerTo(input, room);
  const { written, data } = await driver.submit({
    readable,
    writable,
    indirect,
    initial: 0xee,
    kick: !random.once(3),
  });
  assert.equal(written, expected.length);
  const all = data.flatMap((bytes) => [...bytes]);
  assert.deepEqual(all.slice(0, written), [...expected]);
  assert.ok(all.slice(written).every((byte) => byte === 0xee));
}
