// Runs the test suites, shows what they say one after the other, and adds up
// what each reports. The last line is the total, alone: the counts of all.
import { spawn } from "node:child_process";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { BIN, DENO, ROOT } from "./setup.mjs";

/** A suite that has not ended after so many minutes never will. */
const LIMIT_MINUTES = 40;

/** @typedef {{ passed: number, failed: number, skipped: number }} Counts */
/** @typedef {{ command: string[], count: (output: string) => Counts, needsGuest: boolean }} Suite */

/** @type {Record<string, Suite>} */
export const SUITES = {
  zig: {
    command: [join(BIN, "zig"), "build", "test", "--summary", "all"],
    count: countZig,
    needsGuest: false,
  },
  deno: {
    command: [DENO, "task", "test"],
    count: countDeno,
    needsGuest: false,
  },
  node: {
    command: [DENO, "task", "test:node"],
    count: countNode,
    needsGuest: false,
  },
  qemu: {
    command: [DENO, "task", "qemu-test"],
    count: countDeno,
    needsGuest: true,
  },
};

/**
 * Runs suites and shows what they say, the sum last.
 *
 * @param {string[]} names of SUITES
 * @returns {Promise<number>} the exit code
 */
export async function runTests(names) {
  const lanes = lanesOf(names, availableParallelism()).map((suites) => {
    const output = new HeldOutput();
    return { suites, output, counts: runLane(suites, output) };
  });
  if (lanes.length > 1) {
    console.log("The guests' tests run beside the others, and are shown last.");
  }
  /** @type {Counts} */
  const total = { passed: 0, failed: 0, skipped: 0 };
  for (const { output, counts } of lanes) {
    output.show();
    add(total, await counts);
  }
  console.log(`\n${inWords(total)}`);
  return total.failed === 0 ? 0 : 1;
}

/**
 * Which suites run one after the other, and which of such lanes side by side:
 * the guests, which take as long as all else together, have a lane of their
 * own where there are processors for two.
 *
 * @param {string[]} names @param {number} processors
 */
export function lanesOf(names, processors) {
  if (processors < 2) return [names];
  const others = names.filter((name) => !SUITES[name].needsGuest);
  const guests = names.filter((name) => SUITES[name].needsGuest);
  return [others, guests].filter((lane) => lane.length > 0);
}

/** What one lane says: held until it is shown, from then on as it comes. */
export class HeldOutput {
  /** @type {{ text: string, to: { write(text: string): unknown } }[] | null} */
  #held = [];

  /** @param {string} text @param {{ write(text: string): unknown }} to */
  write(text, to = process.stdout) {
    if (this.#held === null) to.write(text);
    else this.#held.push({ text, to });
  }

  show() {
    for (const { text, to } of this.#held ?? []) to.write(text);
    this.#held = null;
  }
}

/**
 * @param {string[]} names @param {HeldOutput} output
 * @returns {Promise<Counts>} of all of them
 */
async function runLane(names, output) {
  /** @type {Counts} */
  const total = { passed: 0, failed: 0, skipped: 0 };
  for (const name of names) {
    const suite = SUITES[name];
    output.write(`\n=== ${name}\n`);
    const began = performance.now();
    const { text, status } = await runSuite(suite.command, output);
    const counts = suite.count(text);
    // A runner that crashed, or that ran nothing, did not report its failure.
    const ran = counts.passed + counts.failed + counts.skipped;
    if (counts.failed === 0 && (status !== "exit code 0" || ran === 0)) {
      output.write(
        ran === 0
          ? `${name}: no test was counted (${status})\n`
          : `${name}: the runner failed (${status})\n`,
      );
      counts.failed = 1;
    }
    const seconds = Math.round((performance.now() - began) / 1000);
    output.write(`=== ${name}: ${inWords(counts)} in ${seconds} s\n`);
    add(total, counts);
  }
  return total;
}

/** @param {Counts} total @param {Counts} counts */
function add(total, { passed, failed, skipped }) {
  total.passed += passed;
  total.failed += failed;
  total.skipped += skipped;
}

/** @param {Counts} counts */
function inWords({ passed, failed, skipped }) {
  return `${passed} passed, ${failed} failed, ${skipped} skipped`;
}

/**
 * Runs a command whose output goes to its lane and is returned as well.
 *
 * @param {string[]} command @param {HeldOutput} output
 * @returns {Promise<{ text: string, status: string }>}
 */
function runSuite([program, ...args], output) {
  return new Promise((resolve) => {
    const child = spawn(program, args, {
      cwd: ROOT,
      env: { ...process.env, NO_COLOR: "1" },
      stdio: ["ignore", "pipe", "pipe"],
      // Its own process group, so that its whole family can be ended.
      detached: true,
    });
    const end = (/** @type {NodeJS.Signals} */ signal) => {
      try {
        if (child.pid) process.kill(-child.pid, signal);
      } catch {
        // It has just ended.
      }
    };
    const stop = () => {
      end("SIGTERM");
      // When the suite of the other lane has been told too.
      setImmediate(() => process.exit(130));
    };
    process.once("SIGINT", stop).once("SIGTERM", stop);
    const limit = setTimeout(() => end("SIGKILL"), LIMIT_MINUTES * 60_000);
    let text = "";
    const take = (
      /** @type {import("node:stream").Readable} */ from,
      /** @type {NodeJS.WriteStream} */ to,
    ) => {
      from.setEncoding("utf8");
      from.on("data", (chunk) => {
        text += chunk;
        output.write(chunk, to);
      });
    };
    take(child.stdout, process.stdout);
    take(child.stderr, process.stderr);
    child.on("error", (error) => resolve({ text, status: error.message }));
    child.on("close", (code, signal) => {
      clearTimeout(limit);
      process.off("SIGINT", stop).off("SIGTERM", stop);
      const status = signal ? `ended by ${signal}` : `exit code ${code}`;
      resolve({ text, status });
    });
  });
}

/** `ok | 12 passed (3 steps) | 0 failed | 1 ignored (2s)`. @param {string} output */
export function countDeno(output) {
  const counts = { passed: 0, failed: 0, skipped: 0 };
  for (const line of output.split("\n")) {
    const found =
      /^\s*(?:ok|FAILED) \| (\d+) passed(?: \([^)]*\))? \| (\d+) failed(?: \([^)]*\))?(.*)$/
        .exec(line);
    if (!found) continue;
    counts.passed += Number(found[1]);
    counts.failed += Number(found[2]);
    const ignored = /\| (\d+) ignored/.exec(found[3]);
    if (ignored) counts.skipped += Number(ignored[1]);
  }
  return counts;
}

/** `# pass 12` of the tap reporter, or its like of the spec reporter. @param {string} output */
export function countNode(output) {
  const counts = { passed: 0, failed: 0, skipped: 0 };
  for (
    const [, kind, count] of output.matchAll(
      /^[#ℹ] (pass|fail|cancelled|skipped|todo) (\d+)$/gm,
    )
  ) {
    if (kind === "pass") counts.passed += Number(count);
    else if (kind === "fail" || kind === "cancelled") {
      counts.failed += Number(count);
    } else counts.skipped += Number(count);
  }
  return counts;
}

/**
 * `Build Summary: 5/5 steps succeeded; 31/33 tests passed; 2 skipped`, or with
 * `; 1 failed`. @param {string} output
 */
export function countZig(output) {
  const counts = { passed: 0, failed: 0, skipped: 0 };
  for (const line of output.split("\n")) {
    const found = /^Build Summary:.*?(\d+)\/(\d+) tests passed(.*)$/.exec(line);
    if (!found) continue;
    const skipped = Number(/(\d+) skipped/.exec(found[3])?.[1] ?? 0);
    counts.passed += Number(found[1]);
    counts.skipped += skipped;
    counts.failed += Number(found[2]) - Number(found[1]) - skipped;
  }
  return counts;
}
