/**
 * TypeScript over the core beside a native loop over the same core.
 *
 * @module
 */

import { comparison, nativeDisk, ours, reads } from "../comparison.ts";
import type { Section } from "../section.ts";
import { depths } from "./disks.ts";

const services = {
  "": {},
  // Which polls like the native loop, and has no event loop to go round.
  ", Worker": { workers: 1 },
};

export const native: Section = {
  name: "native",
  about:
    "Disks beside a native loop: the same core, the host's memcpy, polling all the time",
  columns: ["vhost2", "native loop", "ratio"],
  cases: Object.entries(services).flatMap(([how, service]) => [
    ...depths.map((depth) =>
      comparison(
        `null disk, 4 KiB reads, depth ${depth}${how}`,
        { ...reads, depth },
        ours("null", { service }),
        nativeDisk("null"),
      )
    ),
    ...(["read", "write"] as const).flatMap((operation) =>
      depths.map((depth) =>
        comparison(
          `memory disk, 4 KiB ${operation}s, depth ${depth}${how}`,
          { ...reads, operation, depth },
          ours("memory", { service }),
          nativeDisk("memory"),
          { isFilled: true, goal: ">= 0.60x" },
        )
      )
    ),
  ]),
};
