/** This process's open descriptors, for tests that nothing leaks. */

import { readdirSync, readFileSync, readlinkSync } from "node:fs";
import { eventLoop } from "../../ffi/event_loop.ts";
import { eventually } from "./wait.ts";

/** What each open descriptor is, by number. */
export function openDescriptors(): Map<number, string> {
  const found = new Map<number, string>();
  for (const name of readdirSync("/proc/self/fd")) {
    try {
      found.set(Number(name), readlinkSync(`/proc/self/fd/${name}`));
    } catch {
      // The descriptor of the listing itself: gone.
    }
  }
  return found;
}

/** How many descriptors are open. */
export function descriptorCount(): number {
  return openDescriptors().size;
}

/** How many mappings of guest memory (the core's memfds) the process has. */
export function guestMappingCount(): number {
  return readFileSync("/proc/self/maps", "utf8")
    .split("\n").filter((line) => line.includes("memfd:vhost2")).length;
}

/**
 * What a runtime has in each Worker: Deno closes them at any time after the
 * Worker has ended, in the midst of later tests too.
 */
const closedLate = ["anon_inode:[eventpoll]", "anon_inode:[eventfd]", "socket"];

/**
 * Runs `body` and requires that the process has the same descriptors
 * afterwards as before: by kind and target, as numbers may be reused. The
 * event loop is held open, so that its own do not count.
 */
export async function withoutDescriptorLeak(
  body: () => void | Promise<void>,
): Promise<void> {
  eventLoop.ref();
  try {
    const before = kinds();
    await body();
    await eventually(
      () => difference(before, kinds()).length === 0,
      () =>
        `descriptors are as before: ${difference(before, kinds()).join(", ")}`,
    );
  } finally {
    eventLoop.unref();
  }
}

/** `socket:[1234]` and the like become `socket`. */
function kinds(): string[] {
  return [...openDescriptors().values()]
    .map((target) => target.replace(/:\[\d+\]$/, "")).sort();
}

function difference(before: string[], after: string[]): string[] {
  const rest = [...after];
  const missing: string[] = [];
  for (const kind of before) {
    const index = rest.indexOf(kind);
    if (index >= 0) rest.splice(index, 1);
    else if (!closedLate.includes(kind)) missing.push(`-${kind}`);
  }
  return [...missing, ...rest.map((kind) => `+${kind}`)];
}

/**
 * Requires that no more descriptors are open than a test began with, waiting
 * for closes that are under way; fewer are, when `closedLate`.
 */
export async function assertDescriptorCount(expected: number): Promise<void> {
  await eventually(
    () => descriptorCount() <= expected,
    () =>
      `${expected} descriptors are open, not ${descriptorCount()}: ${
        [...openDescriptors()].map(([fd, target]) => `${fd} ${target}`)
          .join(", ")
      }`,
  );
}
