/**
 * Rows that compare two disks under the same load.
 *
 * @module
 */

import { type GeneratorOptions, LoadGenerator } from "./generator.ts";
import type { Load, LoadFigures } from "./load.ts";
import { inTurns, medianOf, medianRatio } from "./measure.ts";
import { NativeDisk } from "./native_disk.ts";
import {
  type Disk,
  type OursOptions,
  type Peer,
  startOurs,
  startStorageDaemon,
} from "./peers.ts";
import type { Case, Figure, Run } from "./section.ts";

/** A disk that loads can be put on. */
export interface Loaded {
  run(load: Load): LoadFigures;
  close(): Promise<void>;
  /** Of the back-end. */
  readonly pid?: number;
}

/** Starts a back-end with what loads it. */
export type Start = (run: Run) => Promise<Loaded>;

/** What a disk is made of; sizes and paths are the run's. */
export type DiskKind = Disk["kind"];

const nullBytes = 2 ** 30;

export function diskOf(kind: DiskKind, run: Run): Disk {
  switch (kind) {
    case "null":
      return { kind, size: nullBytes };
    case "memory":
      return { kind, size: run.diskBytes };
    case "file":
      return { kind, path: run.file() };
  }
}

async function loaded(peer: Peer, options: GeneratorOptions): Promise<Loaded> {
  try {
    const generator = await LoadGenerator.open(peer.socketPath(), options);
    return {
      pid: peer.pid,
      run: (load) => generator.run(load),
      async close() {
        await generator.close();
        await peer.stop();
      },
    };
  } catch (error) {
    await peer.stop();
    throw error;
  }
}

/** This library. */
export function ours(
  kind: DiskKind,
  options: Omit<OursOptions, "disk"> = {},
  front: GeneratorOptions = {},
): Start {
  return async (run) =>
    loaded(await startOurs({ disk: diskOf(kind, run), ...options }), front);
}

/** QEMU's storage daemon. */
export function storageDaemon(
  kind: DiskKind,
  options: Omit<OursOptions, "disk"> = {},
  front: GeneratorOptions = {},
): Start {
  return async (run) =>
    loaded(
      await startStorageDaemon({ disk: diskOf(kind, run), ...options }),
      front,
    );
}

/** A native loop over the same core. */
export function nativeDisk(kind: "null" | "memory"): Start {
  return (run) => {
    const disk = diskOf(kind, run);
    if (disk.kind === "file") throw new Error("It serves no files");
    return NativeDisk.start(disk);
  };
}

/** Starts all, and stops those that run, whatever happens. */
export async function withAll<T>(
  run: Run,
  starts: readonly Start[],
  body: (all: readonly Loaded[]) => T | Promise<T>,
): Promise<T> {
  const all: Loaded[] = [];
  try {
    for (const start of starts) all.push(await start(run));
    return await body(all);
  } finally {
    for (const one of all) await one.close();
  }
}

/** The load of most rows. */
export const reads = {
  operation: "read",
  requestBytes: 4096,
  isRandom: true,
  spins: true,
} as const;

/** More about a comparison. */
export interface ComparisonOptions {
  readonly goal?: string;
  /** Compares latencies (p50, at depth 1), not rates. */
  readonly isLatency?: boolean;
  /** The whole disk is written first: what was never written is no memory. */
  readonly isFilled?: boolean;
}

/** A row: the first, the second, and the first by the second. */
export function comparison(
  name: string,
  load: Load,
  first: Start,
  second: Start,
  options: ComparisonOptions = {},
): Case {
  const { goal, isLatency = false, isFilled = false } = options;
  const unit = isLatency ? "nanoseconds" : "perSecond";
  return {
    name,
    goal,
    measure: (run) =>
      withAll(run, [first, second], async (all): Promise<Figure[]> => {
        const turns = all.map((one) => () => {
          const figures = one.run({ ...load, durationMs: run.runMs });
          return isLatency ? figures.p50 : figures.perSecond;
        });
        if (isFilled) { for (const one of all) fill(one, run); }
        // One unmeasured run each: caches, and what V8 compiles.
        for (const turn of turns) turn();
        const found = await inTurns(turns, run.rounds);
        return [
          { value: medianOf(found, 0), unit },
          { value: medianOf(found, 1), unit },
          { value: medianRatio(found, 0, 1), unit: "ratio" },
        ];
      }),
  };
}

const fillBytes = 65536;

function fill(disk: Loaded, run: Run): void {
  disk.run({
    operation: "write",
    requestBytes: fillBytes,
    depth: 32,
    spins: true,
    requestCount: run.diskBytes / fillBytes,
  });
}
