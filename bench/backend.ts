/**
 * The back-end that the bench measures: disks in one process.
 *
 *   backend.ts FOLDER COUNT DISK SERVICE
 *
 * Says `ready` when all listen. Answers `heap` on its standard input with the
 * bytes of its heap, collected; ends with its standard input, or by SIGTERM.
 *
 * @module
 */

import { join } from "node:path";
import process from "node:process";
import { createInterface } from "node:readline";
import {
  blkDevice,
  fileBacking,
  memoryBacking,
  nullBacking,
  registerTarget,
  type Target,
} from "../mod.ts";
import type { Disk, Service } from "./peers.ts";

const [folder, count, ...json] = process.argv.slice(2);
const disk: Disk = JSON.parse(json[0]);
const { queues, ...service }: Service = JSON.parse(json[1]);

function backing() {
  switch (disk.kind) {
    case "null":
      return nullBacking(disk.size);
    case "memory":
      return memoryBacking(disk.size);
    case "file":
      return fileBacking(disk.path);
  }
}

const targets: Target[] = [];
for (let i = 0; i < Number(count); i++) {
  targets.push(
    await registerTarget({
      transport: "vhost-user",
      address: join(folder, `${i}.sock`),
      ...blkDevice({ backing: backing(), numQueues: queues ?? 1 }),
      ...service,
    }),
  );
}
createInterface({ input: process.stdin }).on("line", () => {
  (globalThis as { gc?: () => void }).gc?.();
  console.log(process.memoryUsage().heapUsed);
}).on("close", () => process.exit());
process.on("SIGTERM", async () => {
  for (const target of targets) await target.unregister();
  process.exit();
});
console.log("ready");
