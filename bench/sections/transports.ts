/**
 * The same null disk on other transports, beside a Unix socket.
 *
 * @module
 */

import { reads } from "../comparison.ts";
import { DriverThread } from "../driver_thread.ts";
import { inTurns, medianOf, medianRatio } from "../measure.ts";
import { onKernel, onPci, onSocket, type OwnDisk } from "../own_disks.ts";
import type { Case, Figure, Run, Section } from "../section.ts";
import { depths } from "./disks.ts";

interface Beside {
  readonly name: string;
  readonly open: () => Promise<OwnDisk>;
  readonly socket: () => Promise<OwnDisk>;
  /** Whether its driver can also sleep: the model passes no calls on itself. */
  readonly sleeps: boolean;
}

const transports: readonly Beside[] = [
  { name: "VDUSE", open: onKernel, socket: () => onSocket(true), sleeps: true },
  {
    name: "PCI-vhost-user",
    open: onPci,
    socket: () => onSocket(false),
    sleeps: false,
  },
];

async function measure(
  { open, socket }: Beside,
  depth: number,
  spins: boolean,
  run: Run,
): Promise<Figure[]> {
  const disks: OwnDisk[] = [];
  const driver = new DriverThread();
  try {
    disks.push(await open());
    disks.push(await socket());
    const load = { ...reads, depth, spins, durationMs: run.runMs };
    const turns = disks.map(({ place }) => async () =>
      (await driver.run(load, place)).perSecond
    );
    // One unmeasured run each: caches, and what V8 compiles.
    for (const turn of turns) await turn();
    const found = await inTurns(turns, run.rounds);
    return [
      { value: medianOf(found, 0), unit: "perSecond" },
      { value: medianOf(found, 1), unit: "perSecond" },
      { value: medianRatio(found, 0, 1), unit: "ratio" },
    ];
  } finally {
    await driver.end();
    for (const disk of disks) await disk.close();
  }
}

export const transportsBeside: Section = {
  name: "transports",
  about:
    "Null disk on another transport beside a Unix socket, served by one thread; the other side is a model",
  columns: ["this transport", "socket", "ratio"],
  cases: transports.flatMap((beside) =>
    [true, ...(beside.sleeps ? [false] : [])].flatMap((spins) =>
      depths.map((depth): Case => ({
        name: `${beside.name}, depth ${depth}${spins ? "" : ", driver sleeps"}`,
        goal: ">= 0.80x",
        measure: (run) => measure(beside, depth, spins, run),
      }))
    )
  ),
};
