/**
 * `deno task bench [FILTER]`: one table, each row measured in the same run and
 * in turns with QEMU's storage daemon.
 *
 * The load generator runs here, on processor 0; the back-ends on processor 1,
 * or, for the rows "one processor", on 0 too.
 *
 * @module
 */

import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { logRates } from "./dirty_log.ts";
import { type Load, LoadGenerator } from "./load.ts";
import { compare } from "./measure.ts";
import {
  type Disk,
  hasStorageDaemon,
  type Peer,
  residentKilobytes,
  type Service,
  startOurs,
  startStorageDaemon,
} from "./peers.ts";
import { formatRates } from "./formats.ts";
import { guestRates } from "./guest.ts";
import { netRates } from "./net.ts";

const GiB = 2 ** 30;
const rounds = 5;
const runMs = 1000;

interface Row {
  readonly name: string;
  readonly disk: Disk;
  readonly service?: Service;
  readonly load: Load;
  readonly isOneCpu?: boolean;
  /** Quote the latency, not the rate. */
  readonly isLatency?: boolean;
}

function rows(file: string): Row[] {
  const read = {
    operation: "read",
    requestBytes: 4096,
    isRandom: true,
  } as const;
  const nullDisk: Disk = { kind: "null", size: GiB };
  const fileDisk: Disk = { kind: "file", path: file };
  return [
    ...[1, 32, 128].map((depth) => ({
      name: `null disk, 4 KiB reads, depth ${depth}`,
      disk: nullDisk,
      load: { ...read, depth, spins: true },
    })),
    ...[32, 128].map((depth) => ({
      name: `null disk, depth ${depth}, driver sleeps`,
      disk: nullDisk,
      load: { ...read, depth },
    })),
    {
      name: "null disk, latency at depth 1",
      disk: nullDisk,
      load: { ...read, depth: 1 },
      isLatency: true,
    },
    {
      name: "null disk, latency at depth 1, one processor",
      disk: nullDisk,
      load: { ...read, depth: 1 },
      isLatency: true,
      isOneCpu: true,
    },
    ...[1, 32, 128].map((depth) => ({
      name: `null disk, depth ${depth}, Worker`,
      disk: nullDisk,
      service: { workers: 1 },
      load: { ...read, depth, spins: true },
    })),
    ...(["sleeps", "spins"] as const).map((how) => ({
      name: `null disk, latency at depth 1, Worker ${how}`,
      disk: nullDisk,
      service: { workers: 1, pollMicroseconds: how === "spins" ? 200 : 0 },
      load: { ...read, depth: 1 },
      isLatency: true,
    })),
    ...[0, 1].map((workers) => ({
      name: `memory disk, 4 KiB reads, depth 32${workers ? ", Worker" : ""}`,
      disk: { kind: "memory" as const, size: GiB / 4 },
      service: { workers },
      load: { ...read, depth: 32, spins: true },
    })),
    ...(["read", "write"] as const).flatMap((operation) =>
      [1, 32, 128].map((depth) => ({
        name: `cached file, 4 KiB ${operation}s, depth ${depth}`,
        disk: fileDisk,
        load: { ...read, operation, depth, spins: true },
      }))
    ),
  ];
}

const columns = [48, 14, 14, 8];

function print(...cells: string[]): void {
  console.log(
    cells.map((cell, i) =>
      i === 0 ? cell.padEnd(columns[0]) : cell.padStart(columns[i])
    ).join(" "),
  );
}

function show(value: number, isLatency: boolean): string {
  return isLatency
    ? `${(value / 1000).toFixed(1)} us`
    : value >= 1e6
    ? `${(value / 1e6).toFixed(2)} M/s`
    : `${(value / 1e3).toFixed(0)} k/s`;
}

async function withPeers<T>(
  row: Pick<Row, "disk" | "service" | "isOneCpu">,
  body: (ours: LoadGenerator, theirs: LoadGenerator) => T | Promise<T>,
): Promise<T> {
  const cpu = row.isOneCpu ? 0 : 1;
  const peers: Peer[] = [];
  const loads: LoadGenerator[] = [];
  try {
    peers.push(await startOurs(row.disk, cpu, 1, row.service));
    peers.push(await startStorageDaemon(row.disk, cpu));
    for (const peer of peers) {
      loads.push(await LoadGenerator.open(peer.socketPath));
    }
    return await body(loads[0], loads[1]);
  } finally {
    for (const load of loads) await load.close();
    for (const peer of peers) await peer.stop();
  }
}

async function measure(row: Row): Promise<void> {
  const isLatency = row.isLatency ?? false;
  await withPeers(row, (ours, theirs) => {
    const once = (generator: LoadGenerator) => () => {
      const figures = generator.run({ ...row.load, durationMs: runMs });
      if (figures.errors > 0) throw new Error(`${figures.errors} I/O errors`);
      return isLatency ? figures.p50 : figures.perSecond;
    };
    // One unmeasured run each: caches, and what V8 compiles.
    ours.run({ ...row.load, durationMs: runMs });
    theirs.run({ ...row.load, durationMs: runMs });
    const { a, b, ratio } = compare(once(ours), once(theirs), rounds);
    print(
      row.name,
      show(a, isLatency),
      show(b, isLatency),
      `${ratio.toFixed(2)}x`,
    );
  });
}

/** Data that was written is what is read: no rate of a liar is worth much. */
async function verify(file: string): Promise<void> {
  const disks: Disk[] = [
    { kind: "memory", size: 64 << 20 },
    { kind: "file", path: file },
  ];
  for (const disk of disks) {
    for (const packed of [false, true]) {
      const peer = await startOurs(disk, 1);
      const generator = await LoadGenerator.open(peer.socketPath, { packed });
      const { requests, errors } = generator.run({
        operation: "write",
        depth: 64,
        requestBytes: 4096,
        requestCount: 10_000,
        isRandom: true,
        verifies: true,
      });
      await generator.close();
      await peer.stop();
      const what = `${disk.kind} disk, ${packed ? "packed" : "split"}`;
      if (errors > 0) throw new Error(`${what}: ${errors} wrong blocks`);
      console.log(`${what}: ${requests} requests, data verified`);
    }
  }
}

/** Bytes by which the heap has grown per request, over 10^7 requests. */
async function heapGrowth(): Promise<void> {
  const peer = await startOurs({ kind: "null", size: GiB }, 1);
  const generator = await LoadGenerator.open(peer.socketPath);
  const load = {
    operation: "read",
    depth: 128,
    requestBytes: 4096,
    isRandom: true,
    spins: true,
  } as const;
  generator.run({ ...load, requestCount: 2_000_000 });
  const before = Number(await peer.ask("heap"));
  const { requests } = generator.run({ ...load, requestCount: 10_000_000 });
  const after = Number(await peer.ask("heap"));
  await generator.close();
  await peer.stop();
  console.log(
    `null disk: heap grew by ${after - before} bytes in ${requests} requests, ${
      ((after - before) / requests).toFixed(4)
    } bytes each (after collection)`,
  );
}

/** Memory of a process with 100 disks, a front-end connected to each. */
async function idleDisks(count: number): Promise<void> {
  const peer = await startOurs({ kind: "null", size: GiB }, 1, count);
  const folder = join(peer.socketPath, "..");
  const generators = [];
  for (let i = 0; i < count; i++) {
    generators.push(
      await LoadGenerator.open(join(folder, `${i}.sock`), { queueSize: 128 }),
    );
  }
  await peer.ask("heap");
  const { anon, file } = residentKilobytes(peer.pid);
  for (const generator of generators) await generator.close();
  await peer.stop();
  console.log(
    `${count} idle disks in one process: ${
      ((anon + file) / 1024).toFixed(0)
    } MB (RssAnon ${(anon / 1024).toFixed(0)}, RssFile ${
      (file / 1024).toFixed(0)
    })`,
  );
}

const filter = process.argv[2] ?? "";
if (!hasStorageDaemon()) {
  console.error(
    "Cannot compare: qemu-storage-daemon is missing; run: apt-get install qemu-utils",
  );
  process.exit(1);
}
spawnSync("taskset", ["-a", "-c", "-p", "0", String(process.pid)]);
const folder = mkdtempSync(join(tmpdir(), "vhost2-bench-"));
try {
  const file = join(folder, "disk.img");
  spawnSync("dd", ["if=/dev/zero", `of=${file}`, "bs=1M", "count=256"]);
  print("", "vhost2", "storage daemon", "ratio");
  for (const row of rows(file)) {
    if (row.name.includes(filter)) await measure(row);
  }
  if ("packed beside split".includes(filter)) {
    print("", "packed", "split", "ratio");
    for (const row of await formatRates(rounds, runMs)) {
      const { name, packed, split, ratio } = row;
      print(
        name,
        show(packed, false),
        show(split, false),
        `${ratio.toFixed(2)}x`,
      );
    }
  }
  if ("dirty log".includes(filter)) {
    print("", "no log", "log, off", "logging: ratio");
    for (const row of await logRates(rounds, runMs)) {
      print(
        row.name,
        show(row.without, false),
        show(row.negotiated, false),
        `${row.ratio.toFixed(2)}x`,
      );
    }
  }
  if ("guest".includes(filter)) {
    for (const { name, ours, theirs } of await guestRates(rounds)) {
      print(
        name,
        show(ours, false),
        show(theirs, false),
        `${(ours / theirs).toFixed(2)}x`,
      );
    }
  }
  let hasFrames = false;
  for await (const row of netRates(filter, rounds)) {
    if (!hasFrames) print("frames", "vhost2", "DPDK vhost", "ratio");
    hasFrames = true;
    const { name, ours, theirs, ratio } = row;
    print(name, show(ours, false), show(theirs, false), `${ratio.toFixed(2)}x`);
  }
  if (filter === "" || filter === "verify") {
    console.log();
    await verify(file);
  }
  if (filter === "") {
    await heapGrowth();
    await idleDisks(100);
  }
} finally {
  rmSync(folder, { recursive: true, force: true });
}
