/**
 * The same back-end in Node and in Deno.
 *
 * @module
 */

import { comparison, type DiskKind, ours, reads } from "../comparison.ts";
import { isInstalled, ownRuntime } from "../programs.ts";
import type { Section } from "../section.ts";
import { depths } from "./disks.ts";

const goal = ">= 0.70x";

function row(
  name: string,
  kind: DiskKind,
  load: Parameters<typeof comparison>[1],
  options: {
    readonly service?: object;
    readonly isLatency?: boolean;
    readonly isFilled?: boolean;
  } = {},
) {
  const { service, isLatency = false, isFilled = false } = options;
  return comparison(
    name,
    load,
    ours(kind, { runtime: "node", service }),
    ours(kind, { runtime: "deno", service }),
    { isLatency, isFilled, goal: isLatency ? "<= 1.43x" : goal },
  );
}

export const node: Section = {
  name: "node",
  about: "Back-ends in Node beside the same in Deno, under the same driver",
  columns: ["Node", "Deno", "ratio"],
  missing: () =>
    ownRuntime === "node" || isInstalled("node")
      ? null
      : "node is missing; run: apt-get install nodejs",
  cases: [
    ...depths.map((depth) =>
      row(`null disk, 4 KiB reads, depth ${depth}`, "null", { ...reads, depth })
    ),
    ...[32, 128].map((depth) =>
      row(`null disk, depth ${depth}, driver sleeps`, "null", {
        ...reads,
        depth,
        spins: false,
      })
    ),
    ...depths.map((depth) =>
      row(`null disk, depth ${depth}, Worker`, "null", { ...reads, depth }, {
        service: { workers: 1 },
      })
    ),
    row("null disk, latency at depth 1", "null", {
      ...reads,
      depth: 1,
      spins: false,
    }, { isLatency: true }),
    row("null disk, latency at depth 1, Worker spins", "null", {
      ...reads,
      depth: 1,
      spins: false,
    }, {
      isLatency: true,
      service: { workers: 1, pollMicroseconds: 200 },
    }),
    ...depths.map((depth) =>
      row(`memory disk, 4 KiB reads, depth ${depth}`, "memory", {
        ...reads,
        depth,
      }, { isFilled: true })
    ),
    ...(["read", "write"] as const).flatMap((operation) =>
      depths.map((depth) =>
        row(`cached file, 4 KiB ${operation}s, depth ${depth}`, "file", {
          ...reads,
          operation,
          depth,
        })
      )
    ),
  ],
};
