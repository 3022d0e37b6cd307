/**
 * `deno task bench flame`: where the time of the hot paths goes, sampled by
 * perf, as flame graphs in docs/.
 *
 * V8 tells perf what it has compiled (a map file), and the core is one that has
 * its symbols and frame pointers; it is loaded by a copy of the project, since
 * the library beside the sources has neither.
 *
 * @module
 */

import { spawn, spawnSync } from "node:child_process";
import {
  cpSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { reads } from "../comparison.ts";
import { LoadGenerator } from "../generator.ts";
import type { Load } from "../load.ts";
import { type Disk, startOurs } from "../peers.ts";
import { buildNative, frontendCpu, isInstalled, root } from "../programs.ts";
import { draw } from "./svg.ts";
import { fold, parse, selfCounts } from "./stacks.ts";

interface Picture {
  readonly file: string;
  readonly title: string;
  readonly disk: Disk;
  readonly load: Load;
}

const pictures: Picture[] = [
  {
    file: "flame-null-disk.svg",
    title: "null disk, 4 KiB reads, depth 128, event loop in Deno",
    disk: { kind: "null", size: 2 ** 30 },
    load: { ...reads, depth: 128 },
  },
  {
    file: "flame-memory-disk.svg",
    title: "memory disk, 4 KiB reads, depth 128, event loop in Deno",
    disk: { kind: "memory", size: 256 << 20 },
    load: { ...reads, depth: 128 },
  },
];

const warmMs = 3000;
const sampleSeconds = 4;
const samplesPerSecond = 4999;
const topCount = 12;
const v8Flags = ["--perf-basic-prof", "--interpreted-frames-native-stack"];

/** A copy of what a back-end runs, with the core that has symbols. */
async function copyWithSymbols(): Promise<string> {
  const built = await buildNative("bench-profiled");
  mkdirSync(join(root, "dist"), { recursive: true });
  const copy = mkdtempSync(join(root, "dist", "flame-"));
  const leftOut = /^\.|^(dist|zig-out|node_modules|core-zig|docs|tests)$/;
  for (const name of readdirSync(root)) {
    if (leftOut.test(name)) continue;
    cpSync(join(root, name), join(copy, name), { recursive: true });
  }
  symlinkSync(join(root, "node_modules"), join(copy, "node_modules"));
  cpSync(join(built, "profiled"), join(copy, "zig-out", "lib"), {
    recursive: true,
  });
  return copy;
}

function perf(args: readonly string[]): string {
  const { status, stdout, stderr } = spawnSync("perf", args, {
    encoding: "utf8",
    maxBuffer: 2 ** 30,
  });
  if (status !== 0) throw new Error(`perf ${args[0]} failed: ${stderr}`);
  return stdout;
}

async function sample(picture: Picture, project: string): Promise<string> {
  const data = join(tmpdir(), `vhost2-${process.pid}.perf`);
  const peer = await startOurs({
    disk: picture.disk,
    runtime: "deno",
    // A log that comes with them goes where the copy goes.
    flags: [...v8Flags, `--logfile=${join(project, "v8.log")}`],
    project,
  });
  try {
    const generator = await LoadGenerator.open(peer.socketPath());
    if (picture.disk.kind === "memory") {
      generator.run({
        ...picture.load,
        operation: "write",
        isRandom: false,
        requestCount: picture.disk.size / 4096,
      });
    }
    generator.run({ ...picture.load, durationMs: warmMs });
    const recorder = spawn("perf", [
      ...["record", "-F", String(samplesPerSecond), "-g"],
      ...["-p", String(peer.pid), "-o", data],
      ...["--", "sleep", String(sampleSeconds)],
    ], { stdio: ["ignore", "ignore", "pipe"] });
    let said = "";
    recorder.stderr.setEncoding("utf8").on("data", (text) => said += text);
    const ended = new Promise((resolve) => recorder.once("close", resolve));
    generator.run({ ...picture.load, durationMs: sampleSeconds * 1000 });
    if (await ended !== 0) throw new Error(`perf record failed: ${said}`);
    const text = perf(["script", "-i", data, "-F", "comm,tid,ip,sym,dso"]);
    await generator.close();
    return text;
  } finally {
    await peer.stop();
    rmSync(data, { force: true });
    rmSync(`/tmp/perf-${peer.pid}.map`, { force: true });
  }
}

/** Draws all, and prints where most of the samples were. */
export async function drawFlames(): Promise<void> {
  if (!isInstalled("perf")) {
    throw new Error("perf is missing; run: apt-get install linux-perf");
  }
  const own = String(process.pid);
  spawnSync("taskset", ["-a", "-c", "-p", String(frontendCpu), own]);
  const project = await copyWithSymbols();
  try {
    for (const picture of pictures) {
      const tree = fold(parse(await sample(picture, project)));
      const file = join(root, "docs", picture.file);
      writeFileSync(file, draw(tree, picture.title));
      console.log(`\n${picture.title}: ${tree.count} samples, ${file}`);
      const top = [...selfCounts(tree)].sort((a, b) => b[1] - a[1]);
      for (const [name, count] of top.slice(0, topCount)) {
        const part = (count / tree.count * 100).toFixed(1);
        console.log(`${part.padStart(6)} %  ${name}`);
      }
    }
  } finally {
    rmSync(project, { recursive: true, force: true });
  }
}
