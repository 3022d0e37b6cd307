// Somebody else's back-end in a process of its own.
import { type ChildProcess, spawn } from "node:child_process";
import { existsSync, mkdtempSync, rmSync, watch } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

/** A back-end that listens, or is about to. */
export interface PeerBackend {
  readonly socketPath: string;
  [Symbol.asyncDispose](): Promise<void>;
}

/** A back-end that does not end by itself is ended after this. */
const stopTimeoutMs = 10_000;

/**
 * Starts a back-end; resolves when its socket has a name.
 *
 * @param command program and arguments, by the socket's path and a folder
 */
export async function startPeer(
  command: (socketPath: string, folder: string) => string[],
): Promise<PeerBackend> {
  const folder = mkdtempSync(join(tmpdir(), "vhost2-peer-"));
  const socketPath = join(folder, "socket");
  const [program, ...args] = command(socketPath, folder);
  const child = spawn(program, args, { stdio: "pipe" });
  let output = "";
  for (const stream of [child.stdout, child.stderr]) {
    stream.setEncoding("utf8").on("data", (text: string) => {
      output = (output + text).slice(-64 << 10);
    });
  }
  const ended = new Promise<string>((resolve) => {
    child.once("error", (error) => resolve(error.message));
    child.once("close", (code) => resolve(`exit code ${code}`));
  });
  const named = new Promise<void>((resolve) => {
    const watcher = watch(folder, () => look());
    const look = () => {
      if (!existsSync(socketPath)) return;
      watcher.close();
      resolve();
    };
    ended.then(() => watcher.close());
    look();
  });
  const stop = async () => {
    await end(child, ended);
    rmSync(folder, { recursive: true, force: true });
  };
  const early = ended.then((how) => {
    throw new Error(`${program} ended (${how}) before it listened:\n${output}`);
  });
  early.catch(() => {});
  try {
    await Promise.race([named, early]);
  } catch (error) {
    await stop();
    throw error;
  }
  return { socketPath, [Symbol.asyncDispose]: stop };
}

/**
 * Opens what listens there: a back-end binds its socket, which names it, and
 * listens a moment later, of which it tells nobody.
 */
export async function opened<T>(open: () => Promise<T>): Promise<T> {
  for (let left = 200;; left--) {
    try {
      return await open();
    } catch (error) {
      if (left === 0 || !/ECONNREFUSED/.test(`${error}`)) throw error;
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }
}

async function end(child: ChildProcess, ended: Promise<string>): Promise<void> {
  child.stdin?.on("error", () => {});
  child.stdin?.end("\n");
  child.kill("SIGTERM");
  const timer = setTimeout(() => child.kill("SIGKILL"), stopTimeoutMs);
  await ended;
  clearTimeout(timer);
}
