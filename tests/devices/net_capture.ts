/** Captures in the format of pcap, for tests. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

/** A frame of a capture. */
export interface CaptureRecord {
  /** Seconds since 1970. */
  readonly time: number;
  /** Bytes that the frame had, and those that were kept. */
  readonly length: number;
  readonly bytes: Uint8Array;
}

/** Records of a capture: seconds, and the bytes kept of each frame. */
export function readCapture(
  path: string,
): { snapLength: number; records: CaptureRecord[] } {
  const bytes = new Uint8Array(readFileSync(path));
  const view = new DataView(bytes.buffer);
  // draft-ietf-opsawg-pcap, section 4: nanoseconds, version 2.4, Ethernet.
  assert.equal(view.getUint32(0, true), 0xa1b23c4d);
  assert.deepEqual([view.getUint16(4, true), view.getUint16(6, true)], [2, 4]);
  assert.deepEqual([view.getUint32(8, true), view.getUint32(12, true)], [0, 0]);
  assert.equal(view.getUint32(20, true), 1);
  const records: CaptureRecord[] = [];
  for (let at = 24; at < bytes.length;) {
    const kept = view.getUint32(at + 8, true);
    records.push({
      time: view.getUint32(at, true) + view.getUint32(at + 4, true) / 1e9,
      length: view.getUint32(at + 12, true),
      bytes: bytes.slice(at + 16, at + 16 + kept),
    });
    at += 16 + kept;
  }
  return { snapLength: view.getUint32(16, true), records };
}
