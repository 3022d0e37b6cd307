/** How figures come about and are written. */

import assert from "node:assert/strict";
import { inTurns, median, medianOf, medianRatio } from "../../bench/measure.ts";
import { processorTime, resident } from "../../bench/processes.ts";
import { format, row } from "../../bench/table.ts";
import process from "node:process";
import { test } from "../harness.ts";

test("bench: a median is the middle, or between the two in the middle", () => {
  assert.equal(median([9, 1, 5]), 5);
  assert.equal(median([4, 1, 3, 2]), 2.5);
  // By value, not by letters.
  assert.equal(median([10, 9, 100]), 10);
});

test("bench: what is compared is measured in turns, each of them first as often", async () => {
  const order: string[] = [];
  const thing = (name: string) => () => order.push(name);
  const found = await inTurns([thing("a"), thing("b")], 4);
  assert.equal(order.join(""), "abbaabba");
  // The figures stay in the order of the things.
  assert.deepEqual(found, [[1, 2], [4, 3], [5, 6], [8, 7]]);
  order.length = 0;
  await inTurns([thing("a"), thing("b"), thing("c")], 3);
  assert.equal(order.join(""), "abcbcacab");
});

test("bench: a ratio is the median of the rounds' ratios, not of the medians'", () => {
  const found = [[1, 1], [10, 5], [3, 1]];
  assert.equal(medianOf(found, 0), 3);
  assert.equal(medianOf(found, 1), 1);
  assert.equal(medianRatio(found, 0, 1), 2);
});

test("bench: figures have their units", () => {
  assert.equal(format({ value: 2_210_000, unit: "perSecond" }), "2.21 M/s");
  assert.equal(format({ value: 26_400, unit: "perSecond" }), "26 k/s");
  assert.equal(format({ value: 18_500, unit: "nanoseconds" }), "18.5 us");
  assert.equal(format({ value: 26, unit: "nanoseconds" }), "26.0 ns");
  assert.equal(format({ value: 179.1e6, unit: "bytes" }), "179.1 MB");
  assert.equal(format({ value: -0.002, unit: "bytes" }), "-0.002 B");
  assert.equal(format({ value: 0.6, unit: "ratio" }), "0.60x");
  const one = { name: "row", goal: ">= 1x", measure: () => Promise.reject() };
  const text = row(one, [{ value: 0.015, unit: "percent" }]);
  assert.match(text, /^row +0\.0[12] % +goal: >= 1x$/);
});

test("bench: memory and processor time are those of the process", () => {
  const { anon, file } = resident(process.pid);
  assert.ok(anon > 1e6 && file > 1e6, `${anon} ${file}`);
  const before = processorTime(process.pid);
  const end = performance.now() + 20;
  while (performance.now() < end);
  const spent = processorTime(process.pid) - before;
  assert.ok(spent > 0, `${spent}`);
});
