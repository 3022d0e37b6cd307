// The back-end of a guest's disk, in a process of its own: our `blk` command
// on Deno or, to try the tests themselves against a known peer, QEMU's storage
// daemon (VHOST2_QEMU_TEST_BACKEND=qemu-storage-daemon).
import { type ChildProcess, spawn } from "node:child_process";
import {
  closeSync,
  existsSync,
  ftruncateSync,
  mkdtempSync,
  openSync,
  rmSync,
  watch,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { projectFolder } from "./cache.ts";

export type BackendKind = "vhost2" | "qemu-storage-daemon";

/** What the tests are run against. */
export const BACKEND: BackendKind =
  process.env.VHOST2_QEMU_TEST_BACKEND === "qemu-storage-daemon"
    ? "qemu-storage-daemon"
    : "vhost2";

export interface BackendOptions {
  /** The disk: a file, so many bytes of memory, or as many that hold nothing. */
  disk: { file: string } | { memory: number } | { null: number };
  numQueues?: number;
  /** Workers that serve the queues (ours only); none unless given. */
  workers?: number;
  readOnly?: boolean;
  /** Guests may be migrated to it by postcopy. */
  postcopy?: boolean;
  /** Prints each message. */
  verbose?: boolean;
  serial?: string;
  /** Where to listen: that of an earlier back-end, to take its place. */
  socketPath?: string;
}

/** A back-end that listens. */
export interface Backend {
  readonly socketPath: string;
  /** What it has printed so far. */
  readonly output: () => string;
  /** Resolves when it ends without having been stopped: a crash. */
  readonly crashed: Promise<Error>;
  /** Stops it as a user does; rejects when it does not end cleanly. */
  stop(): Promise<void>;
  [Symbol.asyncDispose](): Promise<void>;
}

/** A back-end that does not end by itself is ended after this. */
const STOP_TIMEOUT_MS = 10_000;

/**
 * Starts a back-end; resolves when it listens.
 *
 * @throws {Error} with what it printed when it ends instead
 */
export function startBackend(options: BackendOptions): Promise<Backend> {
  return start(
    options.socketPath,
    BACKEND,
    (socketPath, folder) =>
      BACKEND === "vhost2"
        ? ourCommand(options, socketPath)
        : storageDaemonCommand(options, socketPath, folder),
  );
}

/**
 * Starts our `net` command with these words, and a socket of its own; resolves
 * when it listens.
 *
 * @throws {Error} with what it printed when it ends instead
 */
export function startNetBackend(words: string[]): Promise<Backend> {
  return start(undefined, "vhost2", (socketPath) => [
    ...ourProgram("net"),
    ...["--socket-path", socketPath],
    ...words,
  ]);
}

async function start(
  wantedPath: string | undefined,
  kind: BackendKind,
  command: (socketPath: string, folder: string) => string[],
): Promise<Backend> {
  const folder = mkdtempSync(join(tmpdir(), "vhost2-backend-"));
  const socketPath = wantedPath ?? join(folder, "socket");
  const [program, ...args] = command(socketPath, folder);
  const child = spawn(program, args, {
    cwd: projectFolder(),
    stdio: "pipe",
  });
  child.stdin.on("error", () => {});
  let output = "";
  const take = (chunk: string) => {
    output += chunk;
    if (output.length > 64 << 10) output = output.slice(-32 << 10);
  };
  let closed = false;
  const close = new Promise<string>((resolve) => {
    child.once("error", (error) => resolve(error.message));
    child.once("close", (code, signal) => {
      resolve(signal ? `signal ${signal}` : `exit code ${code}`);
    });
  }).then((how) => {
    closed = true;
    return how;
  });
  let stopping = false;
  const crashed = new Promise<Error>((resolve) => {
    close.then((how) => {
      const what = `Back-end ended (${how}) and was not stopped:\n${output}`;
      if (!stopping) resolve(new Error(what));
    });
  });
  const end = async () => {
    stopping = true;
    // Not child.kill: after it Deno reports the signal as the end's cause, even
    // when the program has caught it and ended with an exit code.
    if (!closed && kind === "vhost2" && child.pid !== undefined) {
      process.kill(child.pid, "SIGTERM");
    }
    if (!closed && kind !== "vhost2") {
      child.stdin.end(`{"execute":"qmp_capabilities"}{"execute":"quit"}`);
    }
    const timer = setTimeout(() => child.kill("SIGKILL"), STOP_TIMEOUT_MS);
    const how = await close;
    clearTimeout(timer);
    return how;
  };
  const dispose = async () => {
    await end();
    rmSync(folder, { recursive: true, force: true });
  };
  try {
    const ready = listening(child, kind, socketPath, take, () => output);
    const ended = close.then((how) => {
      throw new Error(`Back-end ended (${how}) before it listened:\n${output}`);
    });
    // Nobody looks at it any more once the back-end listens.
    ended.catch(() => {});
    await Promise.race([ready, ended]);
  } catch (error) {
    await dispose();
    throw error;
  }
  return {
    socketPath,
    output: () => output,
    crashed,
    async stop() {
      const how = await end();
      if (how !== "exit code 0") {
        throw new Error(`Back-end ended with ${how} when stopped:\n${output}`);
      }
    },
    [Symbol.asyncDispose]: dispose,
  };
}

/** Resolves when the back-end says that it listens, or its socket appears. */
function listening(
  child: ChildProcess,
  kind: BackendKind,
  socketPath: string,
  take: (chunk: string) => void,
  output: () => string,
): Promise<void> {
  child.stdout?.setEncoding("utf8");
  child.stderr?.setEncoding("utf8");
  child.stderr?.on("data", take);
  if (kind === "vhost2") {
    return new Promise((resolve) => {
      child.stdout?.on("data", (chunk: string) => {
        take(chunk);
        if (output().includes("listening")) resolve();
      });
    });
  }
  child.stdout?.on("data", take);
  return new Promise((resolve) => {
    const folder = join(socketPath, "..");
    const watcher = watch(folder, () => look());
    const look = () => {
      if (!existsSync(socketPath)) return;
      watcher.close();
      resolve();
    };
    child.once("close", () => watcher.close());
    look();
  });
}

function ourProgram(command: string): string[] {
  const project = projectFolder();
  return [
    join(project, "node_modules", "deno", "deno"),
    ...["run", "--allow-all", "--no-prompt"],
    ...[join(project, "cli", "main.ts"), command],
  ];
}

function ourCommand(options: BackendOptions, socketPath: string): string[] {
  const { disk } = options;
  return [
    ...ourProgram("blk"),
    ...["--socket-path", socketPath],
    ...("file" in disk
      ? ["--blk-file", disk.file]
      : "memory" in disk
      ? ["--memory", String(disk.memory)]
      : ["--null", String(disk.null)]),
    ...["--num-queues", String(options.numQueues ?? 1)],
    ...["--workers", String(options.workers ?? 0)],
    ...(options.readOnly ? ["--read-only"] : []),
    ...(options.postcopy ? ["--postcopy"] : []),
    ...(options.verbose ? ["--verbose"] : []),
    ...(options.serial === undefined ? [] : ["--serial", options.serial]),
  ];
}

function storageDaemonCommand(
  options: BackendOptions,
  socketPath: string,
  folder: string,
): string[] {
  // It binds and listens in two steps but names the socket only in the first;
  // a socket left by its predecessor would look like one that listens.
  rmSync(socketPath, { force: true });
  const { disk } = options;
  const readOnly = options.readOnly ? "on" : "off";
  let node: string;
  if ("null" in disk) {
    node = `driver=null-co,size=${disk.null},read-zeroes=on`;
  } else {
    let file: string;
    if ("file" in disk) file = disk.file;
    else {
      file = join(folder, "memory");
      const fd = openSync(file, "w");
      ftruncateSync(fd, disk.memory);
      closeSync(fd);
    }
    node = `driver=file,filename=${file},read-only=${readOnly},discard=unmap`;
  }
  return [
    "qemu-storage-daemon",
    ...["--chardev", "stdio,id=control", "--monitor", "chardev=control"],
    ...["--blockdev", `node-name=disk,${node}`],
    "--export",
    `type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,` +
    `addr.path=${socketPath},writable=${options.readOnly ? "off" : "on"},` +
    `num-queues=${options.numQueues ?? 1}`,
  ];
}
