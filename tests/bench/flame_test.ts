/** Flame graphs: from perf's text to a picture. */

import assert from "node:assert/strict";
import { draw } from "../../bench/flame/svg.ts";
import { fold, parse, selfCounts } from "../../bench/flame/stacks.ts";
import { test } from "../harness.ts";

const text = `deno  1234 
\tffffffff01 do_syscall_64+0x1 ([kernel.kallsyms])
\t    7f0012 ring.chain.add__anon_1858+0x12 (/x/libvhost2-x86_64.so)
\t    7f0034 JS:*turn file:///x/virtqueue.ts:10:2 (/tmp/perf-1.map)
\t    7f0056 [unknown] (/x/deno)

deno  1234 
\t    7f0078 JS:*'#begin file:///x/requests.ts:1:1 (/tmp/perf-1.map)
\t    7f0034 JS:+turn file:///x/virtqueue.ts:10:2 (/tmp/perf-1.map)
\t    7f0056 [unknown] (/x/deno)

deno  1235 
\t    7f00ab [unknown] (/tmp/perf-1.map)
\t    7f00ac JS:~ file:///x/a.ts:1:1 (/tmp/perf-1.map)
\t    7f00ad std::vec::Vec<T>::push (inlined) (/x/deno)
\t    7f0056 [unknown] (/x/deno)`;

test("flame: stacks are read from the outermost frame, with names that say what they are", () => {
  assert.deepEqual([...parse(text)], [
    [
      "(deno)",
      "turn virtqueue.ts",
      "ring.chain.add",
      "do_syscall_64 [kernel]",
    ],
    ["(deno)", "turn virtqueue.ts", "#begin requests.ts"],
    [
      "(deno)",
      "std::vec::Vec<T>::push (inlined)",
      "(anonymous) a.ts",
      "(generated code)",
    ],
  ]);
});

test("flame: samples with the same callers are counted together", () => {
  const root = fold([["a", "b"], ["a", "b", "c"], ["a"], ["a", "a", "c"]]);
  assert.equal(root.count, 4);
  const a = root.callees.get("a")!;
  assert.equal(a.count, 4);
  assert.equal(a.callees.get("b")!.count, 2);
  // A function that calls itself is one frame.
  assert.deepEqual([...a.callees.keys()], ["b", "c"]);
  assert.deepEqual(
    [...selfCounts(root)].sort(),
    [["a", 1], ["b", 1], ["c", 2]],
  );
});

test("flame: a frame is as wide as its part, and lies above its caller", () => {
  const svg = draw(fold([["a", "b<T>"], ["a"], ["c"], ["c"]]), 'of & "it"');
  assert.match(svg, /^<svg [^>]*xmlns=/);
  assert.match(svg, /of &amp; &quot;it&quot;/);
  const placed = new Map(
    [...svg.matchAll(
      /<title>(.*?): ([\d.]+) %<\/title><rect x="([\d.]+)" y="(\d+)" width="([\d.]+)"/g,
    )].map(([, name, ...rest]) => [name, rest.map(Number)]),
  );
  const [allPart, allLeft, allTop, allWidth] = placed.get("all")!;
  const [aPart, aLeft, aTop, aWidth] = placed.get("a")!;
  const [, bLeft, bTop, bWidth] = placed.get("b&lt;T&gt;")!;
  assert.deepEqual([allPart, aPart], [100, 50]);
  assert.ok(Math.abs(aWidth * 2 - allWidth) < 1);
  assert.ok(Math.abs(bWidth * 2 - aWidth) < 1);
  assert.ok(bTop < aTop && aTop < allTop);
  assert.ok(allLeft === aLeft && aLeft === bLeft);
  assert.ok(placed.get("c")![1] > aLeft + aWidth - 1);
});
