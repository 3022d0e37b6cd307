/**
 * The back-ends that are compared, each in a process of its own, pinned to a
 * processor.
 *
 * @module
 */

import { type ChildProcess, spawn, spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync, rmSync, watch } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";

/** By whom a disk of ours is served: the event loop unless given. */
export interface Service {
  readonly workers?: number;
  readonly pollMicroseconds?: number;
}

/** What a disk is made of. */
export type Disk =
  | { readonly kind: "null"; readonly size: number }
  | { readonly kind: "memory"; readonly size: number }
  | { readonly kind: "file"; readonly path: string };

/** A running back-end. */
export interface Peer {
  readonly name: string;
  readonly socketPath: string;
  readonly pid: number;
  /** Sends a word on its standard input and returns the line it answers. */
  ask(word: string): Promise<string>;
  stop(): Promise<void>;
}

const here = dirname(fileURLToPath(import.meta.url));

/** Whether QEMU's storage daemon is installed. */
export function hasStorageDaemon(): boolean {
  return spawnSync("qemu-storage-daemon", ["--version"]).status === 0;
}

async function start(
  name: string,
  command: string[],
  folder: string,
  socketPath: string,
  cpu: number,
): Promise<Peer> {
  const child = spawn("taskset", ["-c", String(cpu), ...command], {
    stdio: ["pipe", "pipe", "inherit"],
  });
  const lines: string[] = [];
  let wake: (() => void) | undefined;
  let rest = "";
  child.stdout!.setEncoding("utf8").on("data", (text: string) => {
    const parts = (rest + text).split("\n");
    rest = parts.pop()!;
    lines.push(...parts);
    wake?.();
  });
  const line = async () => {
    while (lines.length === 0) {
      await new Promise<void>((resolve) => wake = resolve);
    }
    return lines.shift()!;
  };
  await appeared(folder, socketPath, child);
  return {
    name,
    socketPath,
    pid: child.pid!,
    ask(word) {
      lines.length = 0;
      child.stdin!.write(`${word}\n`);
      return line();
    },
    async stop() {
      const ended = new Promise((resolve) => child.once("close", resolve));
      child.kill("SIGTERM");
      await ended;
      rmSync(folder, { recursive: true, force: true });
    },
  };
}

/** Resolves when the socket listens: its name appears in the folder. */
function appeared(
  folder: string,
  path: string,
  child: ChildProcess,
): Promise<void> {
  return new Promise((resolve, reject) => {
    const watcher = watch(folder, () => look());
    const look = () => {
      if (!isListening(path)) return;
      watcher.close();
      clearInterval(timer);
      resolve();
    };
    // The storage daemon listens some time after the name is there.
    const timer = setInterval(look, 20);
    child.once("close", (code) => {
      watcher.close();
      clearInterval(timer);
      reject(new Error(`The back-end ended with ${code} before it listened`));
    });
    look();
  });
}

function isListening(path: string): boolean {
  if (!existsSync(path)) return false;
  // Flags 00010000: __SO_ACCEPTCON.
  return readFileSync("/proc/net/unix", "utf8").split("\n").some((row) =>
    row.endsWith(` ${path}`) && row.includes(" 00010000 ")
  );
}

/** This library, in the runtime that runs the bench. */
export function startOurs(
  disk: Disk,
  cpu: number,
  count = 1,
  service: Service = {},
): Promise<Peer> {
  const folder = mkdtempSync(join(tmpdir(), "vhost2-bench-"));
  const socketPath = join(folder, "0.sock");
  const flags = "Deno" in globalThis
    ? ["run", "--allow-all", "--v8-flags=--expose-gc"]
    : ["--expose-gc"];
  const extension = import.meta.url.endsWith(".ts") ? "ts" : "js";
  return start(
    "vhost2",
    [
      process.execPath,
      ...flags,
      join(here, `backend.${extension}`),
      folder,
      String(count),
      JSON.stringify(disk),
      JSON.stringify(service),
    ],
    folder,
    socketPath,
    cpu,
  );
}

/** QEMU's storage daemon with the same disk. */
export function startStorageDaemon(disk: Disk, cpu: number): Promise<Peer> {
  const folder = mkdtempSync(join(tmpdir(), "vhost2-bench-"));
  const socketPath = join(folder, "0.sock");
  const node = disk.kind === "file"
    ? `driver=file,filename=${disk.path},aio=io_uring,node-name=n`
    : `driver=null-co,size=${disk.size},read-zeroes=${
      disk.kind === "memory" ? "on" : "off"
    },node-name=n`;
  return start(
    "qemu-storage-daemon",
    [
      "qemu-storage-daemon",
      "--blockdev",
      node,
      "--export",
      `type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=${socketPath},writable=on`,
    ],
    folder,
    socketPath,
    cpu,
  );
}

/** Kilobytes of a process: private and mapped files, shared memory apart. */
export function residentKilobytes(pid: number): { anon: number; file: number } {
  const status = readFileSync(`/proc/${pid}/status`, "utf8");
  const field = (name: string) =>
    Number(new RegExp(`^${name}:\\s+(\\d+)`, "m").exec(status)?.[1] ?? 0);
  return { anon: field("RssAnon"), file: field("RssFile") };
}
