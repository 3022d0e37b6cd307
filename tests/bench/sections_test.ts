/**
 * The bench measures what it says: each section's first row, in turns so short
 * that its figures mean nothing.
 */

import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { NativeDisk } from "../../bench/native_disk.ts";
import { processorTime } from "../../bench/processes.ts";
import { chosen, type Figure, type Run } from "../../bench/section.ts";
import { sections } from "../../bench/sections/mod.ts";
import { test } from "../harness.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { eventually } from "../support/wait.ts";

const diskBytes = 8 << 20;
/** The native programs may have to be built first. */
const limitSeconds = 540;
/** A guest takes half a minute to start; its parts are tested in tests/qemu. */
const tooLong = ["guest"];

async function withRun(body: (run: Run) => Promise<void>): Promise<void> {
  using folder = new TemporaryFolder();
  const path = folder.file("disk.img");
  writeFileSync(path, new Uint8Array(diskBytes));
  await body({
    rounds: 1,
    runMs: 10,
    heapRequests: 10_000,
    diskBytes,
    file: () => path,
  });
}

function assertFigures(figures: readonly Figure[], columns: readonly string[]) {
  assert.equal(figures.length, columns.length);
  figures.forEach(({ value, unit }, i) => {
    assert.ok(Number.isFinite(value), `${columns[i]}: ${value}`);
    if (unit === "perSecond" || unit === "nanoseconds" || unit === "ratio") {
      assert.ok(value > 0, `${columns[i]}: ${value}`);
    }
  });
}

for (const section of sections) {
  const [first] = section.cases;
  const name = `bench: a row of "${section.name}" has a figure in each column`;
  const missing = tooLong.includes(section.name)
    ? "takes too long here: deno task bench guest"
    : section.missing?.() ?? null;
  if (missing !== null) {
    test.skip(name, missing);
    continue;
  }
  test(
    name,
    () =>
      withRun(async (run) => {
        assertFigures(await first.measure(run), section.columns);
      }),
    limitSeconds,
  );
}

test("bench: data that a disk returns is compared with what was written", async () => {
  const verify = sections.find(({ name }) => name === "verify")!;
  await withRun(async (run) => {
    const [requests, wrong] = await verify.cases[0].measure(run);
    assert.deepEqual([requests.value, wrong.value], [20_000, 0]);
  });
});

test(
  "bench: the native loop, which polls all the time, gets none while another disk is measured",
  async () => {
    const disk = await NativeDisk.start({ kind: "null", size: diskBytes });
    try {
      for (const _ of [1, 2]) {
        // A stop comes after the call that asks for it.
        await eventually(() => stateOf(disk.pid) === "T", "a suspended loop");
        const before = processorTime(disk.pid);
        const load = {
          operation: "read",
          requestBytes: 4096,
          depth: 1,
        } as const;
        const figures = disk.run({ ...load, requestCount: 1000, spins: true });
        assert.equal(figures.requests, 1000);
        assert.ok(processorTime(disk.pid) > before);
      }
    } finally {
      await disk.close();
    }
  },
  limitSeconds,
);

/** The letter of /proc/PID/stat. */
function stateOf(pid: number): string {
  const text = readFileSync(`/proc/${pid}/stat`, "utf8");
  return text.slice(text.lastIndexOf(")") + 2)[0];
}

test("bench: no two rows have the same name, and a filter chooses by it", () => {
  const names = sections.flatMap((section) =>
    section.cases.map((one) => `${section.name}: ${one.name}`)
  );
  assert.equal(new Set(names).size, names.length);
  for (const section of sections) {
    const last = section.cases.at(-1)!;
    assert.deepEqual(chosen(section, `${section.name}: ${last.name}`), [last]);
    assert.deepEqual(chosen(section, ""), section.cases);
    assert.deepEqual(chosen(section, "no such row"), []);
  }
});
