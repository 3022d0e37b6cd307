/**
 * How the core comes into a process: only its own build, once for all
 * isolates, and for good (DESIGN sections 3 and 8).
 */

import assert from "node:assert/strict";
import {
  copyFileSync,
  cpSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { isNode, test } from "../harness.ts";
import {
  architecture,
  type Outcome,
  root,
  run,
  tool,
  withFolder,
} from "../packaging/project.ts";

/** The checkout, or its transpiled copy. */
const here = fileURLToPath(new URL("../../", import.meta.url));
const extension = import.meta.url.endsWith(".ts") ? ".ts" : ".js";
const library = `libvhost2-${architecture}.so`;

type Source = "file" | "embedded";

/** Copies ffi/ and one form of the core: a project of its own. */
function copyFfi(folder: string, source: Source): void {
  const target = join(folder, "ffi");
  mkdirSync(target);
  for (const name of readdirSync(join(here, "ffi"))) {
    if (name.endsWith(extension)) {
      copyFileSync(join(here, "ffi", name), join(target, name));
    }
  }
  if (source === "embedded") {
    mkdirSync(join(target, "embedded"));
    const name = join("ffi", "embedded", architecture + extension);
    copyFileSync(join(here, name), join(folder, name));
  } else {
    const lib = join("zig-out", "lib");
    mkdirSync(join(folder, lib), { recursive: true });
    copyFileSync(join(root, lib, library), join(folder, lib, library));
  }
  if (isNode) {
    writeFileSync(join(folder, "package.json"), '{ "type": "module" }\n');
    symlinkSync(join(root, "node_modules"), join(folder, "node_modules"));
  }
}

/** Runs `scripts.main` in a child of this runtime; `EXT` is the extension. */
async function runScripts(
  folder: string,
  scripts: { readonly main: string; readonly worker?: string },
): Promise<Outcome> {
  for (const [name, text] of Object.entries(scripts)) {
    writeFileSync(
      join(folder, name + extension),
      text.replaceAll("EXT", extension),
    );
  }
  const runtime = isNode ? [] : ["run", "--allow-all", "--no-config"];
  return await run(
    [process.execPath, ...runtime, join(folder, `main${extension}`)],
    { cwd: folder },
  );
}

for (const source of ["file", "embedded"] as const) {
  test(`a core of another build is refused (${source})`, async () => {
    await withFolder(async (folder) => {
      copyFfi(folder, source);
      const load = `import { core } from "./ffi/coreEXT";
        console.log(core.coreHash());`;
      const good = await runScripts(folder, { main: load });
      assert.equal(good.status, 0, good.stderr);

      const path = join(folder, "ffi", `abi.gen${extension}`);
      const hash = Number(good.stdout);
      const text = readFileSync(path, "utf8");
      const other = text.replace(`abiHash = ${hash}`, `abiHash = ${hash + 1}`);
      assert.notEqual(other, text);
      writeFileSync(path, other);
      const bad = await runScripts(folder, { main: load });
      assert.notEqual(bad.status, 0);
      assert.equal(bad.stdout, "");
      assert.ok(
        bad.stderr.includes(
          `Cannot use the core: it is of another build (hash ${hash}, ` +
            `expected ${hash + 1}); run "deno task build"`,
        ),
        bad.stderr,
      );
    });
  });
}

test("a stale abi.gen.ts fails zig build abi-check", async () => {
  await withFolder(async (folder) => {
    for (const name of ["build.zig", "core-zig"]) {
      cpSync(join(root, name), join(folder, name), { recursive: true });
    }
    mkdirSync(join(folder, "ffi"));
    const path = join(folder, "ffi", "abi.gen.ts");
    // With a cache of its own: one shared with the checkout would mix up two
    // trees of the same relative paths.
    const check = () =>
      run([tool("zig"), "build", "abi-check"], { cwd: folder });
    const text = readFileSync(join(root, "ffi", "abi.gen.ts"), "utf8");
    writeFileSync(path, text);
    const fresh = await check();
    assert.equal(fresh.status, 0, fresh.stderr);

    // As if a parameter had become wider in Zig and nobody had built.
    const stale = text.replace('parameters: ["u32"', 'parameters: ["f64"');
    assert.notEqual(stale, text);
    writeFileSync(path, stale);
    const { status, stderr } = await check();
    assert.notEqual(status, 0);
    assert.match(stderr, /abi\.gen\.ts/);
  });
});

const mapInWorker = `
  import { parentPort } from "node:worker_threads";
  import { layouts } from "./ffi/abi.genEXT";
  import { core } from "./ffi/coreEXT";
  import { GuestMemory } from "./ffi/guest_memoryEXT";
  const size = 65536;
  const fd = core.memfdCreate(size);
  const memory = new GuestMemory();
  memory.prepare("replace", [
    { gpa: 0n, uva: 0n, size: BigInt(size), mmapOffset: 0n, source: { fd } },
  ]);
  memory.commit();
  memory.views[memory.regions[0].viewFirst][0] = 42;
  const info = new DataView(new ArrayBuffer(layouts.RegionInfo.byteSize));
  core.memoryRegions(memory.handle, info, 1);
  const address = info.getBigUint64(layouts.RegionInfo.address, true);
  parentPort.postMessage({ fd, size, address, handle: memory.handle });
`;

const faultInMain = `
  import { readFileSync, truncateSync } from "node:fs";
  import process from "node:process";
  import { Worker } from "node:worker_threads";
  const worker = new Worker(new URL("./workerEXT", import.meta.url));
  const exited = new Promise((resolve) => worker.once("exit", resolve));
  const { fd, size, address, handle } = await new Promise((resolve, reject) => {
    worker.once("message", resolve);
    worker.once("error", reject);
  });
  await worker.terminate();
  await exited;
  const isMapped = () =>
    /libvhost2|memfd:vhost2-[0-9a-f]{32} /.test(
      readFileSync("/proc/self/maps", "utf8"),
    );
  console.log("mapped", isMapped());
  // The binder alone: this isolate has not loaded the core.
  const name = "Deno" in globalThis ? "./ffi/denoEXT" : "./ffi/nodeEXT";
  const { binding } = await import(name);
  const bytes = new Uint8Array(binding.view(address, size));
  console.log("before", bytes[0]);
  truncateSync("/proc/self/fd/" + fd, 0);
  console.log("after", bytes[0], bytes[size - 1]);
  const { core } = await import("./ffi/coreEXT");
  const { constants } = await import("./ffi/abi.genEXT");
  console.log("faulted", core.memoryState(handle) === constants.memoryFaulted);
  process.exit(0);
`;

for (const source of ["file", "embedded"] as const) {
  test(`a core that only a Worker has loaded handles a SIGBUS after the Worker's end (${source})`, async () => {
    await withFolder(async (folder) => {
      copyFfi(folder, source);
      const { status, stdout, stderr } = await runScripts(folder, {
        main: faultInMain,
        worker: mapInWorker,
      });
      assert.equal(
        stdout,
        "mapped true\nbefore 42\nafter 0 0\nfaulted true\n",
        `${status}: ${stderr}`,
      );
      assert.equal(status, 0, stderr);
    });
  });
}

const workerCount = 4;
const rounds = 50;

/** Each round is a library that nobody has loaded yet; all start at once. */
const loadTogether = `
  import { parentPort, workerData } from "node:worker_threads";
  const name = "Deno" in globalThis ? "./ffi/denoEXT" : "./ffi/nodeEXT";
  const { binding } = await import(name);
  const [waiting, round] = [0, 1];
  const state = new Int32Array(workerData);
  const fds = [];
  for (let i = 0; i < ${rounds}; i++) {
    const bytes = new Uint8Array(100_000).fill(i);
    if (Atomics.add(state, waiting, 1) === ${workerCount - 1}) {
      Atomics.store(state, waiting, 0);
      Atomics.add(state, round, 1);
      Atomics.notify(state, round);
    } else Atomics.wait(state, round, i);
    fds.push(binding.createMemfd(bytes));
  }
  await import("./ffi/coreEXT");
  parentPort.postMessage(fds);
  // Stays, so that all are there when they are counted.
  parentPort.on("message", () => parentPort.close());
`;

const countCores = `
  import { readFileSync } from "node:fs";
  import process from "node:process";
  import { Worker } from "node:worker_threads";
  const workers = [];
  const workerData = new SharedArrayBuffer(8);
  for (let i = 0; i < ${workerCount}; i++) {
    workers.push(
      new Worker(new URL("./workerEXT", import.meta.url), { workerData }),
    );
  }
  const found = await Promise.all(workers.map((worker) =>
    new Promise((resolve, reject) => {
      worker.on("error", reject);
      worker.on("message", resolve);
    })));
  await import("./ffi/coreEXT");
  const shared = found[0].filter((fd, i) =>
    fd >= 0 && found.every((fds) => fds[i] === fd)
  );
  console.log("memfds", new Set(shared).size);
  const inodes = readFileSync("/proc/self/maps", "utf8").split("\\n")
    .filter((line) => /memfd:vhost2-[0-9a-f]{32} /.test(line))
    .map((line) => line.split(/\\s+/)[4]);
  console.log("cores", new Set(inodes).size);
  process.exit(0);
`;

test("Workers that load the embedded core at the same time share one", async () => {
  await withFolder(async (folder) => {
    copyFfi(folder, "embedded");
    const { status, stdout, stderr } = await runScripts(folder, {
      main: countCores,
      worker: loadTogether,
    });
    assert.equal(
      stdout,
      `memfds ${rounds}\ncores 1\n`,
      `${status}: ${stderr}`,
    );
  });
});
