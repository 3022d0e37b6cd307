/**
 * One queue and two, driven in turns by one thread.
 *
 * With two processors the driver has one of them, so two Workers share the
 * other: what these rows show is what a second queue costs, not what it gains.
 *
 * @module
 */

import { comparison, ours, reads, storageDaemon } from "../comparison.ts";
import { storageDaemonMissing } from "../peers.ts";
import type { Section } from "../section.ts";

const two = { queues: 2 };
const services = {
  "event loop": {},
  "1 Worker": { workers: 1 },
  "2 Workers": { workers: 2 },
};
const depths = [32, 128] as const;

export const queues: Section = {
  name: "queues",
  about:
    "Null disk of two queues beside QEMU's storage daemon; the depth is that of both together",
  columns: ["vhost2", "storage daemon", "ratio"],
  missing: storageDaemonMissing,
  cases: Object.entries(services).flatMap(([name, service]) =>
    depths.map((depth) =>
      comparison(
        `2 queues, depth ${depth}, ${name}`,
        { ...reads, depth: depth / 2 },
        ours("null", { service: { ...service, ...two } }, two),
        storageDaemon("null", { service: two }, two),
      )
    )
  ),
};

/** What an added queue costs: the same load on one queue and on two. */
export const addedQueue: Section = {
  name: "added queue",
  about: "Null disk: two queues beside one, of this library",
  columns: ["2 queues", "1 queue", "ratio"],
  cases: Object.entries(services).slice(0, 2).flatMap(([name, service]) => [
    ...depths.map((depth) =>
      comparison(
        `both driven, depth ${depth} together, ${name}`,
        { ...reads, depth: depth / 2 },
        ours("null", { service: { ...service, ...two } }, two),
        // The same requests in flight.
        oneQueueAt(depth, service),
      )
    ),
    comparison(
      `15 idle queues beside the driven one, depth 32, ${name}`,
      { ...reads, depth: 32 },
      idleBeside(15, service),
      ours("null", { service }),
    ),
  ]),
};

/** One queue, under the load of as many requests as two have together. */
function oneQueueAt(depth: number, service: object) {
  const start = ours("null", { service });
  return async (run: Parameters<typeof start>[0]) => {
    const one = await start(run);
    return {
      ...one,
      run: (load: Parameters<typeof one.run>[0]) => one.run({ ...load, depth }),
    };
  };
}

function idleBeside(idle: number, service: object) {
  const queues = idle + 1;
  return ours("null", { service: { ...service, queues } }, {
    queues,
    driven: 1,
  });
}
