// What an inflight region says, read from outside: through QEMU, which keeps
// its descriptor over the death of a back-end.
import {
  closeSync,
  fstatSync,
  openSync,
  readdirSync,
  readlinkSync,
  readSync,
} from "node:fs";

/** The format of a ring, which decides over its region's layout. */
export type Format = "split" | "packed";

/** Entries: QEMU's queue size unless it is told another. */
const queueSize = 128;
/** Where the entries begin, and bytes of each. */
const layouts = {
  split: { header: 16, entry: 16, usedIndex: 14 },
  packed: { header: 32, entry: 32, usedIndex: 16 },
} as const;

/** One look. */
export interface Picture {
  /** Requests that the back-end has taken and not completed. */
  readonly inFlight: number;
  /** Some that are younger than one of them were completed before it. */
  readonly isOutOfOrder: boolean;
  /** Where the used ring ends. */
  readonly usedIndex: number;
}

/** Bytes of a region of one queue: a multiple of 64. */
function sizeOf(format: Format): number {
  const { header, entry } = layouts[format];
  return Math.ceil((header + entry * queueSize) / 64) * 64;
}

/**
 * Looks at the region that QEMU holds for the one disk of this format; null
 * while there is none.
 */
export function lookAtInflight(pid: number, format: Format): Picture | null {
  const folder = `/proc/${pid}/fd`;
  for (const name of readdirSync(folder)) {
    const path = `${folder}/${name}`;
    try {
      if (!readlinkSync(path).startsWith("/memfd:vhost2")) continue;
    } catch {
      // Closed in the meantime.
      continue;
    }
    const fd = openSync(path, "r");
    try {
      if (fstatSync(fd).size !== sizeOf(format)) continue;
      const bytes = new Uint8Array(sizeOf(format));
      readSync(fd, bytes, 0, bytes.length, 0);
      return read(new DataView(bytes.buffer), format);
    } finally {
      closeSync(fd);
    }
  }
  return null;
}

function read(view: DataView, format: Format): Picture {
  const { header, entry, usedIndex } = layouts[format];
  const counters: number[] = [];
  for (let i = 0; i < queueSize; i++) {
    const at = header + i * entry;
    if (view.getUint8(at) === 0) continue;
    counters.push(Number(view.getBigUint64(at + 8, true)));
  }
  const span = Math.max(...counters) - Math.min(...counters) + 1;
  return {
    inFlight: counters.length,
    isOutOfOrder: counters.length > 0 && span > counters.length,
    usedIndex: view.getUint16(usedIndex, true),
  };
}
