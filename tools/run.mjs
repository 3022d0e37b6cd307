// What `npm run demo` and `npm test` call: set up what is missing, then run.
//
//   node tools/run.mjs demo
//   node tools/run.mjs test [zig] [deno] [node] [qemu]
import { spawn } from "node:child_process";
import process from "node:process";
import {
  buildCore,
  DENO,
  installPackages,
  main,
  prepareGuest,
  preparePeers,
  ROOT,
} from "./setup.mjs";
import { SetupError } from "./step.mjs";
import { runTests, SUITES } from "./test.mjs";

await main(async () => {
  const [command, ...args] = process.argv.slice(2);
  if (command === "demo") {
    await installPackages();
    await buildCore();
    await prepareGuest();
    return await denoTask("demo", args);
  }
  if (command === "test") {
    const names = Object.keys(SUITES);
    const unknown = args.find((name) => !names.includes(name));
    if (unknown !== undefined) {
      throw new SetupError(
        `Cannot run the tests "${unknown}": there are ${names.join(", ")}`,
      );
    }
    const wanted = args.length === 0 ? names : args;
    await installPackages();
    await buildCore();
    if (wanted.some((name) => SUITES[name].needsGuest)) {
      await prepareGuest();
      await preparePeers();
    }
    return await runTests(wanted);
  }
  throw new SetupError("Usage: node tools/run.mjs demo | test [SUITE...]");
});

/** @param {string} name @param {string[]} args @returns {Promise<number>} */
function denoTask(name, args) {
  const child = spawn(DENO, ["task", "--quiet", name, ...args], {
    cwd: ROOT,
    stdio: "inherit",
  });
  // Ctrl-C reaches the child too; it ends first, in its own way.
  process.on("SIGINT", () => {});
  process.on("SIGTERM", () => child.kill("SIGTERM"));
  return new Promise((resolve, reject) => {
    child.on("error", reject);
    child.on("close", (code, signal) => {
      if (signal) console.error(`The task "${name}" was ended by ${signal}`);
      resolve(code ?? 1);
    });
  });
}
