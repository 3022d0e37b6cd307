/**
 * Requests per second: null, memory and file disks beside QEMU's storage
 * daemon.
 *
 * @module
 */

import { comparison, ours, reads, storageDaemon } from "../comparison.ts";
import { storageDaemonMissing } from "../peers.ts";
import type { Case, Section } from "../section.ts";

export const depths = [1, 32, 128] as const;
const worker = { service: { workers: 1 } };

const nullCases: Case[] = [
  ...depths.map((depth) =>
    comparison(
      `null disk, 4 KiB reads, depth ${depth}`,
      { ...reads, depth },
      ours("null"),
      storageDaemon("null"),
    )
  ),
  ...[32, 128].map((depth) =>
    comparison(
      `null disk, depth ${depth}, driver sleeps`,
      { ...reads, depth, spins: false },
      ours("null"),
      storageDaemon("null"),
    )
  ),
  ...depths.map((depth) =>
    comparison(
      `null disk, depth ${depth}, Worker`,
      { ...reads, depth },
      ours("null", worker),
      storageDaemon("null"),
    )
  ),
];

const memoryCases: Case[] = (["read", "write"] as const).flatMap((operation) =>
  depths.map((depth) =>
    comparison(
      `memory disk, 4 KiB ${operation}s, depth ${depth}`,
      { ...reads, operation, depth },
      ours("memory"),
      storageDaemon("memory"),
      // Unwritten, ours were pages of zeros to read and page faults to write.
      { isFilled: true },
    )
  )
);

const fileCases: Case[] = [false, true].flatMap((hasWorker) =>
  (["read", "write"] as const).flatMap((operation) =>
    depths.map((depth) =>
      comparison(
        `cached file, 4 KiB ${operation}s, depth ${depth}${
          hasWorker ? ", Worker" : ""
        }`,
        { ...reads, operation, depth },
        ours("file", hasWorker ? worker : {}),
        storageDaemon("file"),
      )
    )
  )
);

export const disks: Section = {
  name: "disks",
  about:
    "Disks beside QEMU's storage daemon (whose memory disk keeps nothing: it gives zeros)",
  columns: ["vhost2", "storage daemon", "ratio"],
  missing: storageDaemonMissing,
  cases: [...nullCases, ...memoryCases, ...fileCases],
};
