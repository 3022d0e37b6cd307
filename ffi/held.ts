/**
 * What an isolate holds of the core, written down where another isolate can
 * read it: a Worker that dies takes its JavaScript along, but not its rings,
 * poll sets, engines and descriptors. Whoever made it releases them then.
 *
 * @module
 */

import { core } from "./core.ts";

/** What is held; in the order in which it can be released. */
export const Held = {
  ring: 1,
  engine: 2,
  poll: 3,
  descriptor: 4,
  /**
   * A descriptor that the runtime closes, or should: Deno's does not when it
   * ends a Worker. The tag is part of its inode: by now the number may be
   * somebody else's.
   */
  runtimeDescriptor: 5,
} as const;
export type HeldKind = (typeof Held)[keyof typeof Held];

/** An entry: kind (0: free), handle or descriptor, tag. */
const entryWords = 3;
const capacity = 1024;

let accounts: Int32Array | undefined;

/** Room for the accounts of one isolate. */
export function makeAccounts(): SharedArrayBuffer {
  return new SharedArrayBuffer(capacity * entryWords * 4);
}

/** From now on what this isolate holds is written down. */
export function keepAccounts(shared: SharedArrayBuffer): void {
  accounts = new Int32Array(shared);
}

/**
 * This isolate holds it now. `tag` says what for, to `findHeld`. More than
 * there is room for is not written down, and lost when the isolate dies.
 */
export function noteHeld(kind: HeldKind, handle: number, tag = 0): void {
  if (accounts === undefined) return;
  for (let at = 0; at < accounts.length; at += entryWords) {
    if (accounts[at] !== 0) continue;
    accounts[at + 1] = handle;
    accounts[at + 2] = tag;
    Atomics.store(accounts, at, kind);
    return;
  }
}

/** This isolate is about to release it. */
export function noteReleased(kind: HeldKind, handle: number): void {
  if (accounts === undefined) return;
  for (let at = 0; at < accounts.length; at += entryWords) {
    if (accounts[at] !== kind || accounts[at + 1] !== handle) continue;
    Atomics.store(accounts, at, 0);
    return;
  }
}

/** What an isolate that has ended holds under a tag. */
export function findHeld(
  shared: SharedArrayBuffer,
  kind: HeldKind,
  tag: number,
): number | undefined {
  const words = new Int32Array(shared);
  for (let at = 0; at < words.length; at += entryWords) {
    if (words[at] === kind && words[at + 2] === tag) return words[at + 1];
  }
}

/** The tag of a `runtimeDescriptor`. */
export function inodeTag(fd: number): number {
  return core.descriptorInode(fd) % 2 ** 31;
}

/** Releases all that an isolate held. Its thread has ended. */
export function releaseHeld(shared: SharedArrayBuffer): void {
  const words = new Int32Array(shared);
  const release: Record<HeldKind, (h: number, tag: number) => unknown> = {
    [Held.ring]: core.ringDestroy,
    [Held.engine]: core.ioDestroy,
    [Held.poll]: core.pollClose,
    [Held.descriptor]: core.descriptorClose,
    [Held.runtimeDescriptor]: (fd, tag) => {
      if (inodeTag(fd) === tag) core.descriptorClose(fd);
    },
  };
  for (const kind of Object.values(Held)) {
    for (let at = 0; at < words.length; at += entryWords) {
      if (words[at] !== kind) continue;
      words[at] = 0;
      release[kind](words[at + 1], words[at + 2]);
    }
  }
}
