/**
 * How the isolates of one process find the one memfd that holds the core.
 *
 * Workers share no JavaScript state, so the memfd is found by its name among
 * the process's own descriptors, under a lock: two Workers that load at the
 * same time must not make two cores.
 *
 * @module
 */

import { createHash } from "node:crypto";

/** Lists the process's descriptors, from any of its threads. */
export const descriptorFolder = "/proc/self/fd";

/**
 * `flock` on it excludes the other threads of this process and nobody else:
 * each process has its own, and each `open` its own lock.
 */
export const lockPath = "/proc/self/maps";

export const MFD_CLOEXEC = 1;
export const LOCK_EX = 2;
export const O_RDONLY = 0;
export const O_CLOEXEC = 0o2000000;

export const F_GETFL = 3;

/**
 * Whether a descriptor's flags are those of the memfd that was made. A loader
 * that opens it in another thread has, for a moment, a descriptor with the
 * same link, but opened for reading only.
 */
export function isMadeHere(flags: number): boolean {
  const O_ACCMODE = 3;
  const O_RDWR = 2;
  return flags >= 0 && (flags & O_ACCMODE) === O_RDWR;
}

/** Named by content: the same bytes are the same core. */
export function memfdName(bytes: Uint8Array): string {
  const digest = createHash("sha256").update(bytes).digest("hex");
  return `vhost2-${digest.slice(0, 32)}`;
}

/** What a descriptor's link reads for the memfd `name`. */
export function memfdLink(name: string): string {
  return `/memfd:${name} (deleted)`;
}
