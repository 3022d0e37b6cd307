/**
 * `deno task ok`: formatting, lint, types, examples in the documentation,
 * import direction, stale generated bindings, words that do not stay.
 *
 * @module
 */

import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";

const zig = "node_modules/.bin/zig";
const folders = [
  "mod.ts",
  "protocol",
  "transports",
  "session",
  "virtqueue",
  "devices",
  "driver",
  "pci",
  "frontend",
  "ffi/errors.ts",
];

const checks: { name: string; command: string[] }[] = [
  { name: "format", command: ["deno", "fmt", "--check", "--quiet"] },
  {
    name: "Zig format",
    command: [zig, "fmt", "--check", "core-zig", "bench", "tests", "build.zig"],
  },
  { name: "lint", command: ["deno", "lint", "--quiet"] },
  {
    name: "types",
    command: ["deno", "check", "--quiet", "mod.ts", "**/*.ts"],
  },
  {
    name: "examples in the documentation",
    command: ["deno", "test", "--quiet", "--allow-all", "--doc", ...folders],
  },
  {
    name: "import direction",
    command: [
      "deno",
      "test",
      "--quiet",
      "--allow-all",
      "tests/architecture_test.ts",
    ],
  },
  { name: "stale bindings", command: [zig, "build", "abi-check"] },
];

/** Role names and notes to ourselves that must not be committed. */
function findWords(): string[] {
  const files = execFileSync("git", ["ls-files", "*.ts", "*.zig", "*.mjs"], {
    encoding: "utf8",
  }).trim().split("\n").filter((file) => file !== "tools/ok.ts");
  const words = /\b(master|slave|TODO|FIXME|XXX)\b/;
  return files.flatMap((file) =>
    readFileSync(file, "utf8").split("\n").flatMap((line, i) =>
      words.test(line) ? [`${file}:${i + 1}: ${line.trim()}`] : []
    )
  );
}

/** Examples make folders for their sockets, and end without a word. */
const scratch = mkdtempSync(join(tmpdir(), "vhost2-ok-"));
let failed = 0;
for (const { name, command: [program, ...args] } of checks) {
  const began = performance.now();
  try {
    execFileSync(program === "deno" ? process.execPath : program, args, {
      encoding: "utf8",
      stdio: ["ignore", "pipe", "pipe"],
      env: { ...process.env, NO_COLOR: "1", TMPDIR: scratch },
    });
    console.log(
      `ok      ${name} (${Math.round(performance.now() - began)} ms)`,
    );
  } catch (error) {
    failed++;
    const { stdout, stderr } = error as { stdout: string; stderr: string };
    console.log(`FAILED  ${name}\n${stdout}${stderr}`);
  }
}
rmSync(scratch, { recursive: true, force: true });
const words = findWords();
if (words.length > 0) {
  failed++;
  console.log(`FAILED  words\n${words.join("\n")}`);
} else console.log("ok      words");
process.exitCode = failed === 0 ? 0 : 1;
