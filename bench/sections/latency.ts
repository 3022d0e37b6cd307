/**
 * From a request to its completion, at depth 1 with a driver that sleeps.
 *
 * @module
 */

import { comparison, ours, reads, storageDaemon } from "../comparison.ts";
import { storageDaemonMissing } from "../peers.ts";
import { frontendCpu } from "../programs.ts";
import type { Section } from "../section.ts";

const load = { ...reads, depth: 1, spins: false };
const services = {
  "event loop": {},
  "Worker sleeps": { workers: 1, pollMicroseconds: 0 },
  "Worker spins (200 us)": { workers: 1, pollMicroseconds: 200 },
};

export const latency: Section = {
  name: "latency",
  about:
    "Latency (p50) of a null disk at depth 1 beside QEMU's storage daemon; less is better",
  columns: ["vhost2", "storage daemon", "ratio"],
  missing: storageDaemonMissing,
  cases: [false, true].flatMap((isOneCpu) =>
    Object.entries(services).map(([name, service]) => {
      const cpus = isOneCpu ? { cpus: String(frontendCpu) } : {};
      return comparison(
        isOneCpu ? `${name}, both on one processor` : name,
        load,
        ours("null", { service, ...cpus }),
        storageDaemon("null", cpus),
        { isLatency: true },
      );
    })
  ),
};
