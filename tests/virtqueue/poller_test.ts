/** Who gets turns when: the queues of an isolate and its event loop. */

import assert from "node:assert/strict";
import { blocking } from "../../ffi/blocking.ts";
import { activate, deactivate } from "../../virtqueue/poller.ts";
import { test } from "../harness.ts";

/** Turns that a queue which always has work gets during `ticks` immediates. */
async function turnsIn(ticks: number): Promise<number> {
  let turns = 0;
  const queue = {
    pollMicroseconds: 50,
    turn: () => ++turns > 0,
    rest: () => true,
  };
  activate(queue);
  try {
    for (let i = 0; i < ticks; i++) {
      await new Promise<void>((resolve) => setImmediate(resolve));
    }
  } finally {
    deactivate(queue);
  }
  return turns;
}

test("a queue that is always busy has many turns for one of the event loop, which goes on", async () => {
  assert.ok(await turnsIn(20) > 40);
});

test("while a request waits for JavaScript, the event loop has its turn between two looks", async () => {
  const done = blocking.add(() => true);
  try {
    const turns = await turnsIn(20);
    assert.ok(turns > 0 && turns <= 21, `${turns} turns`);
  } finally {
    done();
  }
});
