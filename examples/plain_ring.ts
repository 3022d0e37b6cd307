// A device that processes its split ring itself, in plain TypeScript, with
// nothing but what the low-level library gives: the ring's three areas as
// views, `device.translate`, `queue.call` (virtio 1.3, section 2.7). It answers
// each request with the bytes that came with it. What it writes it also logs,
// so that its guest can be migrated.
//
//   deno run --allow-ffi examples/plain_ring.ts /tmp/echo.sock
import process from "node:process";
import {
  type Device,
  featureMask,
  ProtocolFeature,
  type Queue,
  registerTarget,
  type Target,
  type TargetOps,
} from "../mod.ts";

const flagNext = 1;
const flagWrite = 2;

/** Both areas begin with u16 flags and u16 idx. */
const idx = 1;
/** The first ring element, in u16 of the available and u32 of the used ring. */
const ring = 2;
const usedRing = 1;

interface Areas {
  readonly descriptors: DataView;
  readonly available: Uint16Array<ArrayBuffer>;
  readonly used: Uint16Array<ArrayBuffer>;
  readonly usedElements: Uint32Array<ArrayBuffer>;
}

class EchoDevice implements TargetOps {
  readonly #device: Device;
  readonly #queues = new Map<Queue, Areas>();

  constructor(device: Device) {
    this.#device = device;
  }

  queueStart(queue: Queue): void {
    const { descriptorTable: d, availableRing: a, usedRing: u } = queue;
    this.#queues.set(queue, {
      descriptors: new DataView(d.buffer, d.byteOffset, d.byteLength),
      available: new Uint16Array(a.buffer, a.byteOffset, a.byteLength >> 1),
      used: new Uint16Array(u.buffer, u.byteOffset, u.byteLength >> 1),
      usedElements: new Uint32Array(u.buffer, u.byteOffset, u.byteLength >> 2),
    });
  }

  queueStop(queue: Queue): void {
    this.#queues.delete(queue);
  }

  queueKick(queue: Queue): void {
    const areas = this.#queues.get(queue);
    if (areas === undefined) return;
    const { available, used, usedElements } = areas;
    // An atomic: the heads must not be read before the index.
    const end = Atomics.load(available, idx);
    if (((end - queue.availableIndex) & 0xffff) > queue.size) {
      return queue.fail(`the available index ${end} is too far ahead`);
    }
    let usedIndex = used[idx];
    while (queue.availableIndex !== end) {
      const slot = queue.availableIndex & (queue.size - 1);
      const head = available[ring + slot];
      const written = this.#echo(areas.descriptors, queue.size, head);
      if (written === null) return queue.fail(`the chain at ${head} is broken`);
      const at = usedRing + 2 * (usedIndex & (queue.size - 1));
      usedElements[at] = head;
      usedElements[at + 1] = written;
      queue.markUsed(4 * at, 8);
      usedIndex = (usedIndex + 1) & 0xffff;
      queue.availableIndex = (queue.availableIndex + 1) & 0xffff;
    }
    // An atomic again: the elements must be there before the index says so.
    Atomics.store(used, idx, usedIndex);
    queue.markUsed(2 * idx, 2);
    queue.call();
  }

  /** Bytes written; null when the chain is not to be trusted. */
  #echo(table: DataView, size: number, head: number): number | null {
    const readable: Uint8Array[] = [];
    let written = 0;
    let index = head;
    for (let count = 0; count < size && index < size; count++) {
      const at = index * 16;
      let address = table.getBigUint64(at, true);
      let length = table.getUint32(at + 8, true);
      const flags = table.getUint16(at + 12, true);
      while (length > 0) {
        // Shorter than asked for where a region of guest memory ends.
        const view = this.#device.translate(address, length);
        if (view === null) return null;
        if ((flags & flagWrite) === 0) readable.push(view);
        else {
          written += fill(view, readable);
          this.#device.markDirty(address, view.length);
        }
        address += BigInt(view.length);
        length -= view.length;
      }
      if ((flags & flagNext) === 0) return written;
      index = table.getUint16(at + 14, true);
    }
    return null;
  }
}

/** Moves as much as fits from the front of `from` to `into`. */
function fill(into: Uint8Array, from: Uint8Array[]): number {
  let done = 0;
  while (done < into.length && from.length > 0) {
    const part = from[0].subarray(0, into.length - done);
    into.set(part, done);
    done += part.length;
    if (part.length === from[0].length) from.shift();
    else from[0] = from[0].subarray(part.length);
  }
  return done;
}

/** Serves the device to whoever connects to the socket at `address`. */
export function serveEcho(address: string): Promise<Target> {
  return registerTarget({
    transport: "vhost-user",
    address,
    queueCount: 1,
    protocolFeatures: featureMask(ProtocolFeature.LOG_SHMFD),
    device: (device) => new EchoDevice(device),
  });
}

if (import.meta.main) await serveEcho(process.argv[2]);
