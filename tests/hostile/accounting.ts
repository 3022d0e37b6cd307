/** What this process holds, by the kernel's count. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

function status(field: string): number {
  const text = readFileSync("/proc/self/status", "utf8");
  const match = text.match(new RegExp(`^${field}:\\s+(\\d+) kB$`, "m"));
  if (match === null) throw new Error(`/proc/self/status has no ${field}`);
  return Number(match[1]) * 1024;
}

/** Bytes of private memory in use. */
export function anonymousBytes(): number {
  return status("RssAnon");
}

/** Bytes of address space, mapped by whatever. */
export function addressSpaceBytes(): number {
  return status("VmSize");
}

/**
 * Whether memory that goes is unmapped at once. Node 20 cannot empty views: the
 * back-end's addresses stay, with zero pages, and so does the front-end's map.
 */
export const isUnmapped = typeof ArrayBuffer.prototype.transfer === "function";

/** Requires that as much guest memory is mapped as before. */
export function assertGuestMemory(bytes: number): void {
  if (isUnmapped) assert.equal(guestMemoryBytes(), bytes);
}

/** Bytes of address space that guest memory (both ends' memfds) occupies. */
export function guestMemoryBytes(): number {
  let bytes = 0;
  for (const line of readFileSync("/proc/self/maps", "utf8").split("\n")) {
    const match = line.match(/^([0-9a-f]+)-([0-9a-f]+) .*\/memfd:vhost2 /);
    if (match === null) continue;
    bytes += Number(BigInt(`0x${match[2]}`) - BigInt(`0x${match[1]}`));
  }
  return bytes;
}
