/**
 * What the system says of a process.
 *
 * @module
 */

import { readdirSync, readFileSync } from "node:fs";

/** Bytes: private memory, and mapped files; shared memory apart. */
export interface Resident {
  readonly anon: number;
  readonly file: number;
}

/** Of /proc/PID/status. */
export function resident(pid: number): Resident {
  const status = readFileSync(`/proc/${pid}/status`, "utf8");
  const field = (name: string) =>
    Number(new RegExp(`^${name}:\\s+(\\d+)`, "m").exec(status)?.[1] ?? 0) *
    1024;
  return { anon: field("RssAnon"), file: field("RssFile") };
}

/** Nanoseconds on a processor, of all threads that are alive. */
export function processorTime(pid: number): number {
  let sum = 0;
  for (const thread of readdirSync(`/proc/${pid}/task`)) {
    try {
      const text = readFileSync(
        `/proc/${pid}/task/${thread}/schedstat`,
        "utf8",
      );
      sum += Number(text.split(" ")[0]);
    } catch {
      // It has ended in the meantime.
    }
  }
  return sum;
}
