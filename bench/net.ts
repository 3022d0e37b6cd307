/**
 * The network rows: DPDK's virtio_user as the front-end, this library and
 * DPDK's vhost driver as the back-ends, in turns. The front-end polls on
 * processor 0, the back-ends on processor 1.
 *
 * @module
 */

import { spawn } from "node:child_process";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { median } from "./measure.ts";
import { testpmdMissing, testpmdProgram } from "../tests/support/testpmd.ts";
import { Testpmd } from "./testpmd.ts";

/** As the back-end sees it; `loop`: it sends each frame back. */
export type Direction = "loop" | "receive" | "send";

interface Row {
  readonly name: string;
  readonly direction: Direction;
  readonly frameBytes: number;
  /** More arguments of virtio_user's. */
  readonly driver: string;
}

const split = "";
const packed = ",packed_vq=1";
const plain = ",mrg_rxbuf=0,in_order=1,vectorized=1";
const rows: Row[] = [
  {
    name: "loop, 64 bytes, split",
    direction: "loop",
    frameBytes: 64,
    driver: split,
  },
  {
    name: "loop, 64 bytes, split, in order, not mergeable",
    direction: "loop",
    frameBytes: 64,
    driver: plain,
  },
  {
    name: "loop, 64 bytes, packed",
    direction: "loop",
    frameBytes: 64,
    driver: packed,
  },
  {
    name: "loop, 1500 bytes, split",
    direction: "loop",
    frameBytes: 1500,
    driver: split,
  },
  {
    name: "receive, 64 bytes, split",
    direction: "receive",
    frameBytes: 64,
    driver: split,
  },
  {
    name: "receive, 1500 bytes, split",
    direction: "receive",
    frameBytes: 1500,
    driver: split,
  },
  {
    name: "send, 64 bytes, split",
    direction: "send",
    frameBytes: 64,
    driver: split,
  },
  {
    name: "send, 1500 bytes, split",
    direction: "send",
    frameBytes: 1500,
    driver: split,
  },
];

const backendCpu = 1;
const frontendCpu = 0;
const settleMs = 300;
const runMs = 1000;

const sleep = (ms: number) =>
  new Promise<void>((resolve) => setTimeout(resolve, ms));

/** The back-end's part in a turn; it is idle between them. */
interface Backend {
  begin(): Promise<unknown>;
  end(): Promise<unknown>;
  stop(): Promise<void>;
}

async function startOurs(row: Row, path: string): Promise<Backend> {
  const here = dirname(fileURLToPath(import.meta.url));
  const flags = "Deno" in globalThis ? ["run", "--allow-all"] : [];
  const extension = import.meta.url.endsWith(".ts") ? "ts" : "js";
  const child = spawn("taskset", [
    ...["-c", String(backendCpu), process.execPath, ...flags],
    ...[join(here, `net_backend.${extension}`), path],
    ...[row.direction, String(row.frameBytes)],
  ], { stdio: ["ignore", "ignore", "inherit"] });
  while (!existsSync(path)) await sleep(20);
  // It sleeps where there is nothing to do.
  const nothing = () => Promise.resolve();
  return {
    begin: nothing,
    end: nothing,
    async stop() {
      const ended = new Promise((resolve) => child.once("close", resolve));
      child.kill("SIGKILL");
      await ended;
    },
  };
}

async function startDpdk(row: Row, path: string): Promise<Backend> {
  const device = `net_vhost0,iface=${path},queues=1`;
  const testpmd = await Testpmd.start(backendCpu, device);
  const mode = { loop: "macswap", receive: "rxonly", send: "txonly" };
  await testpmd.ask(`set txpkts ${row.frameBytes}`);
  await testpmd.ask(`set fwd ${mode[row.direction]}`);
  return {
    begin: () => testpmd.ask("start"),
    end: () => testpmd.ask("stop"),
    stop: () => testpmd.stop(),
  };
}

async function startFrontend(row: Row, path: string): Promise<Testpmd> {
  const device =
    `net_virtio_user0,path=${path},queues=1,queue_size=1024${row.driver}`;
  const testpmd = await Testpmd.start(frontendCpu, device);
  const mode = { loop: "io", receive: "txonly", send: "rxonly" };
  await testpmd.ask(`set txpkts ${row.frameBytes}`);
  await testpmd.ask(`set fwd ${mode[row.direction]}`);
  return testpmd;
}

/** Frames per second, at the front-end. */
async function run(
  row: Row,
  backend: Backend,
  frontend: Testpmd,
): Promise<number> {
  await backend.begin();
  await frontend.ask(row.direction === "loop" ? "start tx_first 16" : "start");
  await sleep(settleMs);
  const first = await frontend.counts();
  await sleep(runMs);
  const last = await frontend.counts();
  await frontend.ask("stop");
  await backend.end();
  const frames = row.direction === "receive"
    ? last.sent - first.sent
    : last.received - first.received;
  return frames / (last.time - first.time) * 1000;
}

/** One line of the table; rates in frames per second. */
export interface NetRates {
  readonly name: string;
  readonly ours: number;
  readonly theirs: number;
  readonly ratio: number;
}

/** Measures the rows whose name has `filter`. */
export async function* netRates(
  filter: string,
  rounds: number,
): AsyncGenerator<NetRates> {
  const chosen = rows.map((row) => ({ ...row, name: `net ${row.name}` }))
    .filter((row) => row.name.includes(filter));
  if (chosen.length > 0 && testpmdProgram === null) {
    console.error(`Cannot measure the network: ${testpmdMissing}`);
    return;
  }
  for (const row of chosen) yield await measure(row, rounds);
}

async function measure(row: Row, rounds: number): Promise<NetRates> {
  const folder = mkdtempSync(join(tmpdir(), "vhost2-bench-"));
  const running: { stop(): Promise<void> }[] = [];
  try {
    const turns: (() => Promise<number>)[] = [];
    for (const start of [startOurs, startDpdk]) {
      const path = join(folder, `${turns.length}.sock`);
      const backend = await start(row, path);
      running.unshift(backend);
      const frontend = await startFrontend(row, path);
      running.unshift(frontend);
      turns.push(() => run(row, backend, frontend));
    }
    const rates: [number, number][] = [];
    // The first, unmeasured, is for caches and what V8 compiles.
    for (let round = -1; round < rounds; round++) {
      const found: [number, number] = [0, 0];
      for (const i of round % 2 === 0 ? [0, 1] : [1, 0]) {
        found[i] = await turns[i]();
      }
      if (round >= 0) rates.push(found);
    }
    return {
      name: row.name,
      ours: median(rates.map(([ours]) => ours)),
      theirs: median(rates.map(([, theirs]) => theirs)),
      ratio: median(rates.map(([ours, theirs]) => ours / theirs)),
    };
  } finally {
    for (const one of running) await one.stop();
    rmSync(folder, { recursive: true, force: true });
  }
}
