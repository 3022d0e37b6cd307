// What `npm test` does with its suites.

import assert from "node:assert/strict";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { test } from "../harness.ts";
import { toolsFolder } from "./tools_folder.ts";

interface Runner {
  lanesOf(names: string[], processors: number): string[][];
  HeldOutput: new () => {
    write(text: string, to: { write(text: string): unknown }): void;
    show(): void;
  };
  countDeno(output: string): unknown;
  countNode(output: string): unknown;
  countZig(output: string): unknown;
}

const runner: Runner = await import(
  pathToFileURL(join(toolsFolder(), "test.mjs")).href
);

test("the guests' tests run beside the others where there are two processors", () => {
  const all = ["zig", "deno", "node", "qemu"];
  const { lanesOf } = runner;
  assert.deepEqual(lanesOf(all, 1), [all]);
  assert.deepEqual(lanesOf(all, 2), [["zig", "deno", "node"], ["qemu"]]);
  assert.deepEqual(lanesOf(["qemu"], 2), [["qemu"]]);
  assert.deepEqual(lanesOf(["node", "deno"], 8), [["node", "deno"]]);
});

test("what a lane says is held until it is shown, and then told as it comes", () => {
  const said: string[] = [];
  const to = (name: string) => ({
    write: (text: string) => said.push(`${name}: ${text}`),
  });
  const output = new runner.HeldOutput();
  output.write("one", to("out"));
  output.write("two", to("err"));
  assert.deepEqual(said, []);
  output.show();
  output.write("three", to("out"));
  output.show();
  assert.deepEqual(said, ["out: one", "err: two", "out: three"]);
});

test("the counts of each runner are read off what it says", () => {
  assert.deepEqual(
    runner.countDeno("ok | 12 passed (3 steps) | 0 failed | 1 ignored (2s)\n"),
    { passed: 12, failed: 0, skipped: 1 },
  );
  assert.deepEqual(
    runner.countDeno("FAILED | 68 passed | 1 failed (18m49s)\n"),
    { passed: 68, failed: 1, skipped: 0 },
  );
  assert.deepEqual(
    runner.countNode(
      "ℹ pass 5\nℹ fail 1\nℹ cancelled 2\nℹ skipped 3\nℹ todo 4\n",
    ),
    { passed: 5, failed: 3, skipped: 7 },
  );
  assert.deepEqual(
    runner.countZig(
      "Build Summary: 4/5 steps succeeded; 31/34 tests passed; 2 skipped; 1 failed\n",
    ),
    { passed: 31, failed: 1, skipped: 2 },
  );
});
