// Runs the test suites one after the other, shows what they say, and adds up
// what each reports. The last line is the total, alone: the counts of all.
import { spawn } from "node:child_process";
import { join } from "node:path";
import process from "node:process";
import { BIN, DENO, ROOT } from "./setup.mjs";

/** A suite that has not ended after so many minutes never will. */
const LIMIT_MINUTES = 30;

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
 * @param {string[]} names of SUITES
 * @returns {Promise<number>} the exit code
 */
export async function runTests(names) {
  /** @type {Counts} */
  const total = { passed: 0, failed: 0, skipped: 0 };
  for (const name of names) {
    const suite = SUITES[name];
    console.log(`\n=== ${name}`);
    const began = performance.now();
    const { output, status } = await runShown(suite.command);
    const counts = suite.count(output);
    // A runner that crashed, or that ran nothing, did not report its failure.
    const ran = counts.passed + counts.failed + counts.skipped;
    if (counts.failed === 0 && (status !== "exit code 0" || ran === 0)) {
      console.log(
        ran === 0
          ? `${name}: no test was counted (${status})`
          : `${name}: the runner failed (${status})`,
      );
      counts.failed = 1;
    }
    const seconds = Math.round((performance.now() - began) / 1000);
    console.log(`=== ${name}: ${inWords(counts)} in ${seconds} s`);
    total.passed += counts.passed;
    total.failed += counts.failed;
    total.skipped += counts.skipped;
  }
  console.log(`\n${inWords(total)}`);
  return total.failed === 0 ? 0 : 1;
}

/** @param {Counts} counts */
function inWords({ passed, failed, skipped }) {
  return `${passed} passed, ${failed} failed, ${skipped} skipped`;
}

/**
 * Runs a command whose output is shown as it comes and returned as well.
 *
 * @param {string[]} command
 * @returns {Promise<{ output: string, status: string }>}
 */
function runShown([program, ...args]) {
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
      process.exit(130);
    };
    process.once("SIGINT", stop).once("SIGTERM", stop);
    const limit = setTimeout(() => end("SIGKILL"), LIMIT_MINUTES * 60_000);
    let output = "";
    const take = (
      /** @type {import("node:stream").Readable} */ from,
      /** @type {NodeJS.WriteStream} */ to,
    ) => {
      from.setEncoding("utf8");
      from.on("data", (chunk) => {
        output += chunk;
        to.write(chunk);
      });
    };
    take(child.stdout, process.stdout);
    take(child.stderr, process.stderr);
    child.on("error", (error) => resolve({ output, status: error.message }));
    child.on("close", (code, signal) => {
      clearTimeout(limit);
      process.off("SIGINT", stop).off("SIGTERM", stop);
      const status = signal ? `ended by ${signal}` : `exit code ${code}`;
      resolve({ output, status });
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
