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
import { join } from "node:path";
import { testpmdMissing, testpmdProgram } from "../../tests/support/testpmd.ts";
import { inTurns, medianOf, medianRatio } from "../measure.ts";
import { Testpmd } from "../network/testpmd.ts";
import {
  backendCpu,
  frontendCpu,
  ownRuntime,
  pinned,
  type Runtime,
  script,
} from "../programs.ts";
import type { Figure, Run, Section } from "../section.ts";

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

const rows: Row[] = ([
  ["loop, 64 bytes, split", "loop", 64, split],
  ["loop, 64 bytes, split, in order, not mergeable", "loop", 64, plain],
  ["loop, 64 bytes, packed", "loop", 64, packed],
  ["loop, 1500 bytes, split", "loop", 1500, split],
  ["receive, 64 bytes, split", "receive", 64, split],
  ["receive, 1500 bytes, split", "receive", 1500, split],
  ["send, 64 bytes, split", "send", 64, split],
  ["send, 1500 bytes, split", "send", 1500, split],
] as const).map(([name, direction, frameBytes, driver]) => ({
  name,
  direction,
  frameBytes,
  driver,
}));

const settleMs = 300;

const sleep = (ms: number) =>
  new Promise<void>((resolve) => setTimeout(resolve, ms));

/** The back-end's part in a turn; it is idle between them. */
interface Backend {
  begin(): Promise<unknown>;
  end(): Promise<unknown>;
  stop(): Promise<void>;
}

async function startOurs(
  row: Row,
  path: string,
  runtime: Runtime = ownRuntime,
): Promise<Backend> {
  const [program, ...args] = pinned(String(backendCpu), [
    ...await script("network/backend", runtime),
    ...[path, row.direction, String(row.frameBytes)],
  ]);
  const child = spawn(program, args, {
    stdio: ["ignore", "ignore", "inherit"],
  });
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

/** A loop whose frames were all dropped has ended: it is begun again. */
const attempts = 5;

/** Frames per second, at the front-end. */
async function once(
  row: Row,
  backend: Backend,
  frontend: Testpmd,
  runMs: number,
): Promise<number> {
  for (let attempt = 0; attempt < attempts; attempt++) {
    await backend.begin();
    await frontend.ask(
      row.direction === "loop" ? "start tx_first 16" : "start",
    );
    await sleep(settleMs);
    const first = await frontend.counts();
    await sleep(runMs);
    const last = await frontend.counts();
    await frontend.ask("stop");
    await backend.end();
    const frames = row.direction === "receive"
      ? last.sent - first.sent
      : last.received - first.received;
    if (frames > 0) return frames / (last.time - first.time) * 1000;
  }
  throw new Error(`No frames came in ${attempts} attempts`);
}

type Start = (row: Row, path: string) => Promise<Backend>;

async function compare(
  row: Row,
  starts: readonly Start[],
  { rounds, runMs }: Run,
): Promise<Figure[]> {
  const folder = mkdtempSync(join(tmpdir(), "vhost2-bench-"));
  const running: { stop(): Promise<void> }[] = [];
  try {
    const turns: (() => Promise<number>)[] = [];
    for (const start of starts) {
      const path = join(folder, `${turns.length}.sock`);
      const backend = await start(row, path);
      running.unshift(backend);
      const frontend = await startFrontend(row, path);
      running.unshift(frontend);
      turns.push(() => once(row, backend, frontend, runMs));
    }
    // The first, unmeasured, is for caches and what V8 compiles.
    await inTurns(turns, 1);
    const found = await inTurns(turns, rounds);
    return [
      { value: medianOf(found, 0), unit: "perSecond" },
      { value: medianOf(found, 1), unit: "perSecond" },
      { value: medianRatio(found, 0, 1), unit: "ratio" },
    ];
  } finally {
    for (const one of running) await one.stop();
    rmSync(folder, { recursive: true, force: true });
  }
}

const missing = () => testpmdProgram === null ? testpmdMissing : null;

export const network: Section = {
  name: "network",
  about:
    "Frames per second beside DPDK's vhost driver, with DPDK's virtio_user in front of both",
  columns: ["vhost2", "DPDK vhost", "ratio"],
  missing,
  cases: rows.map((row) => ({
    name: row.name,
    measure: (run) => compare(row, [startOurs, startDpdk], run),
  })),
};

export const networkInNode: Section = {
  name: "network, node",
  about: "Frames per second in Node beside Deno, virtio_user in front of both",
  columns: ["Node", "Deno", "ratio"],
  missing,
  cases: rows.map((row) => ({
    name: row.name,
    goal: ">= 0.70x",
    measure: (run) =>
      compare(
        row,
        (["node", "deno"] as const).map((runtime): Start => (row, path) =>
          startOurs(row, path, runtime)
        ),
        run,
      ),
  })),
};
