// A disk whose bytes come from a web server, by range requests, as the guest
// asks for them. What the guest writes stays in memory here, over the original.
//
//   deno run --allow-ffi --allow-net examples/http_disk.ts \
//     http://127.0.0.1:8000/disk.img /tmp/disk.sock
import process from "node:process";
import { blkDevice, type DiskObject } from "../devices/mod.ts";
import { registerTarget } from "../mod.ts";

const blockSize = 4096;

/** The length of what is at `url`, from a server that knows ranges. */
async function lengthOf(url: string): Promise<number> {
  const response = await fetch(url, { method: "HEAD" });
  await response.body?.cancel();
  const length = Number(response.headers.get("content-length"));
  if (response.ok && length > 0) return length;
  throw new Error(`Cannot use ${url}: status ${response.status}`);
}

async function fetchRange(
  url: string,
  offset: number,
  length: number,
  signal: AbortSignal,
): Promise<Uint8Array> {
  const range = `bytes=${offset}-${offset + length - 1}`;
  const response = await fetch(url, { headers: { range }, signal });
  if (response.status !== 206) {
    await response.body?.cancel();
    throw new Error(`${url} answered ${range} with status ${response.status}`);
  }
  const bytes = new Uint8Array(await response.arrayBuffer());
  if (bytes.length === length) return bytes;
  throw new Error(`${url} answered ${range} with ${bytes.length} bytes`);
}

/** The disk at `url`; a promise that rejects fails the guest's request. */
export async function httpDisk(url: string): Promise<DiskObject> {
  const size = await lengthOf(url);
  /** Blocks that were written, by number; whole blocks, thanks to the disk's
   * logical block size. */
  const overlay = new Map<number, Uint8Array>();
  return {
    size,
    async read(offset, into, signal) {
      const first = offset / blockSize;
      const count = into.length / blockSize;
      const numbers = Array.from({ length: count }, (_, i) => first + i);
      if (!numbers.every((number) => overlay.has(number))) {
        into.set(await fetchRange(url, offset, into.length, signal));
      }
      for (const number of numbers) {
        const block = overlay.get(number);
        if (block) into.set(block, (number - first) * blockSize);
      }
    },
    write(offset, data) {
      for (let at = 0; at < data.length; at += blockSize) {
        const block = data.slice(at, at + blockSize);
        overlay.set((offset + at) / blockSize, block);
      }
    },
  };
}

/** Serves the disk at `url` to whoever connects to the socket at `address`. */
export async function serveHttpDisk(url: string, address: string) {
  const disk = blkDevice({
    backing: await httpDisk(url),
    logicalBlockSize: blockSize,
  });
  return await registerTarget({ transport: "vhost-user", address, ...disk });
}

if (import.meta.main) await serveHttpDisk(process.argv[2], process.argv[3]);
