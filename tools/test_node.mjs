// `deno task test:node`: the tests of `deno task test`, transpiled, on Node.
//
//   node tools/test_node.mjs [FILTER...]   only files whose path has a FILTER
import { spawn } from "node:child_process";
import { mkdir, mkdtemp, rm } from "node:fs/promises";
import { join, sep } from "node:path";
import process from "node:process";
import { main, ROOT } from "./setup.mjs";
import { SetupError } from "./step.mjs";
import { transpile } from "./transpile.mjs";

await main(async () => {
  const filters = process.argv.slice(2).map((text) =>
    text.replace(/\.ts$/, "")
  );
  const dist = join(ROOT, "dist");
  await mkdir(dist, { recursive: true });
  // Its own folder for each run: two runs do not disturb each other.
  const folder = await mkdtemp(join(dist, "node-test-"));
  try {
    const files = (await transpile(folder)).filter((name) =>
      name.startsWith(`tests${sep}`) && name.endsWith("_test.js") &&
      !name.startsWith(join("tests", "qemu") + sep) &&
      (filters.length === 0 || filters.some((text) => name.includes(text)))
    );
    if (files.length === 0) throw new SetupError("Cannot find such tests");
    return await runNode(folder, files);
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
});

/** @param {string} folder @param {string[]} files @returns {Promise<number>} */
function runNode(folder, files) {
  const child = spawn(process.execPath, [
    "--enable-source-maps",
    "--test",
    "--test-reporter=spec",
    ...files,
  ], { cwd: folder, stdio: ["ignore", "inherit", "inherit"] });
  process.on("SIGINT", () => {});
  process.on("SIGTERM", () => child.kill("SIGTERM"));
  return new Promise((resolve, reject) => {
    child.on("error", reject);
    child.on("close", (code) => resolve(code ?? 1));
  });
}
