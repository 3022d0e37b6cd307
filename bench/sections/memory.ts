/**
 * Memory and processor time of processes with many idle disks.
 *
 * @module
 */

import { setTimeout as sleep } from "node:timers/promises";
import { VhostUserDevice } from "../../frontend/mod.ts";
import { diskOf } from "../comparison.ts";
import { type Peer, startOurs } from "../peers.ts";
import { processorTime, resident } from "../processes.ts";
import type { Runtime } from "../programs.ts";
import type { Case, Figure, Run, Section } from "../section.ts";

interface Population {
  readonly name: string;
  readonly devices: number;
  /** Of each disk; 1 unless given. */
  readonly queues?: number;
  /** Whether each has a front-end, with its queues started; true unless given. */
  readonly isConnected?: boolean;
  readonly runtime?: Runtime;
  readonly goal?: string;
}

/** A small guest's memory: what it is made of is not counted. */
const ramSize = 1 << 20;
/** Turns until a process is idle, and for which it is watched then. */
const settleTurns = 2;
const idleTurns = 5;

async function withDisks<T>(
  run: Run,
  population: Pick<Population, "devices" | "queues" | "runtime">,
  isConnected: boolean,
  body: (peer: Peer) => Promise<T>,
): Promise<T> {
  const { devices, queues = 1, runtime } = population;
  const peer = await startOurs({
    disk: diskOf("null", run),
    count: devices,
    service: { queues },
    runtime,
  });
  const opened: VhostUserDevice[] = [];
  try {
    for (let i = 0; isConnected && i < devices; i++) {
      opened.push(
        await VhostUserDevice.open({
          path: peer.socketPath(i),
          queueCount: queues,
          ramSize,
          usesCalls: false,
        }),
      );
    }
    // Collected: what is left is what they need.
    await peer.ask("heap");
    return await body(peer);
  } finally {
    for (const device of opened) await device.close();
    await peer.stop();
  }
}

function row(population: Population): Case {
  const { name, goal, devices, runtime } = population;
  return {
    name,
    goal,
    async measure(run): Promise<Figure[]> {
      const total = (peer: Peer) => {
        const { anon, file } = resident(peer.pid);
        return anon + file;
      };
      // What a process with one target and no front-end has.
      const base = await withDisks(
        run,
        { devices: 1, runtime },
        false,
        (peer) => Promise.resolve(total(peer)),
      );
      return await withDisks(
        run,
        population,
        population.isConnected ?? true,
        async (peer) => {
          const { anon, file } = resident(peer.pid);
          await sleep(settleTurns * run.runMs);
          const began = performance.now();
          const before = processorTime(peer.pid);
          await sleep(idleTurns * run.runMs);
          const spent = processorTime(peer.pid) - before;
          const elapsed = (performance.now() - began) * 1e6;
          return [
            { value: anon + file, unit: "bytes" },
            { value: anon, unit: "bytes" },
            { value: file, unit: "bytes" },
            { value: (anon + file - base) / devices, unit: "bytes" },
            { value: spent / elapsed * 100, unit: "percent" },
          ];
        },
      );
    },
  };
}

const populations: Population[] = [
  { name: "1 disk", devices: 1 },
  { name: "100 disks", devices: 100 },
  { name: "100 disks of 16 queues", devices: 100, queues: 16 },
  { name: "1000 disks", devices: 1000, goal: "< 300 MB, < 1 %" },
  {
    name: "1000 targets without a front-end",
    devices: 1000,
    isConnected: false,
  },
  { name: "1000 disks, Node", devices: 1000, runtime: "node" },
];

export const memory: Section = {
  name: "memory",
  about:
    "Idle null disks in one process, a front-end with started queues on each (guest memory not counted)",
  columns: ["resident", "RssAnon", "RssFile", "per device", "of a processor"],
  cases: populations.map(row),
};
