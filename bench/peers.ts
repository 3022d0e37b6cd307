/**
 * The back-ends that are compared, each in a process of its own, pinned to
 * processors.
 *
 * @module
 */

import { existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { Child } from "./child.ts";
import {
  backendCpu,
  isInstalled,
  ownRuntime,
  pinned,
  type Runtime,
  script,
} from "./programs.ts";

/** By whom a disk of ours is served: the event loop unless given. */
export interface Service {
  readonly workers?: number;
  readonly pollMicroseconds?: number;
  /** Queues that the disk offers; 1 unless given. */
  readonly queues?: number;
}

/** What a disk is made of. */
export type Disk =
  | { readonly kind: "null"; readonly size: number }
  | { readonly kind: "memory"; readonly size: number }
  | { readonly kind: "file"; readonly path: string };

/** A running back-end. */
export interface Peer {
  readonly pid: number;
  /** The socket of its disk number `index`. */
  socketPath(index?: number): string;
  /** Sends a word on its standard input and returns the line it answers. */
  ask(word: string): Promise<string>;
  stop(): Promise<void>;
}

/** How a back-end is started. */
export interface PeerOptions {
  readonly disk: Disk;
  readonly service?: Service;
  /** Those it may use, as `taskset -c` has them; the back-ends' own unless given. */
  readonly cpus?: string;
}

/** How one of ours is. */
export interface OursOptions extends PeerOptions {
  /** Equal disks in the one process; 1 unless given. */
  readonly count?: number;
  /** The one that runs the bench unless given. */
  readonly runtime?: Runtime;
  /** More flags of V8. */
  readonly flags?: readonly string[];
  /** Another copy of the project. */
  readonly project?: string;
}

function peerOf(child: Child, folder: string): Peer {
  return {
    pid: child.pid,
    socketPath: (index = 0) => join(folder, `${index}.sock`),
    ask: (word) => child.ask(word),
    async stop() {
      await child.stop();
      rmSync(folder, { recursive: true, force: true });
    },
  };
}

/** This library. */
export async function startOurs(options: OursOptions): Promise<Peer> {
  const { runtime = ownRuntime, count = 1 } = options;
  const flags = ["--expose-gc", ...options.flags ?? []];
  const command = await script("backend", runtime, flags, options.project);
  const folder = mkdtempSync(join(tmpdir(), "vhost2-bench-"));
  const child = new Child(pinned(options.cpus ?? String(backendCpu), [
    ...command,
    ...[folder, String(count)],
    JSON.stringify(options.disk),
    JSON.stringify(options.service ?? {}),
  ]));
  const peer = peerOf(child, folder);
  try {
    await child.line();
    return peer;
  } catch (error) {
    await peer.stop();
    throw error;
  }
}

/** What is missing for comparisons with QEMU's storage daemon, or null. */
export function storageDaemonMissing(): string | null {
  return isInstalled("qemu-storage-daemon")
    ? null
    : "qemu-storage-daemon is missing; run: apt-get install qemu-utils";
}

function blockNode(disk: Disk): string {
  switch (disk.kind) {
    case "null":
      return `driver=null-co,size=${disk.size},read-zeroes=off`;
    case "memory":
      // It has no disk in memory: the nearest are reads that give zeros.
      return `driver=null-co,size=${disk.size},read-zeroes=on`;
    case "file":
      return `driver=file,filename=${disk.path},aio=io_uring`;
  }
}

/** QEMU's storage daemon with the same disk. */
export async function startStorageDaemon(options: PeerOptions): Promise<Peer> {
  const folder = mkdtempSync(join(tmpdir(), "vhost2-bench-"));
  const path = join(folder, "0.sock");
  const queues = options.service?.queues ?? 1;
  const child = new Child(pinned(options.cpus ?? String(backendCpu), [
    "qemu-storage-daemon",
    "--blockdev",
    `${blockNode(options.disk)},node-name=n`,
    "--export",
    `type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=${path},writable=on,num-queues=${queues}`,
  ]));
  const peer = peerOf(child, folder);
  // It says nothing, and listens some time after the name is there.
  while (!isListening(path)) {
    if (child.hasEnded) {
      await peer.stop();
      throw new Error("qemu-storage-daemon ended before it listened");
    }
    await sleep(20);
  }
  return peer;
}

function isListening(path: string): boolean {
  if (!existsSync(path)) return false;
  // Flags 00010000: __SO_ACCEPTCON.
  return readFileSync("/proc/net/unix", "utf8").split("\n").some((row) =>
    row.endsWith(` ${path}`) && row.includes(" 00010000 ")
  );
}
