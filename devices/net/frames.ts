/**
 * Bursts of frames in one buffer: what moves between rings and ends, without
 * an object per frame.
 *
 * @module
 */

import { constants, layouts } from "../../ffi/abi.gen.ts";
import { Vhost2Error } from "../../ffi/errors.ts";

const frameWords = layouts.Frame.byteSize / 4;
const headerBytes = constants.netHeaderSize;
/** Frames begin at multiples of this. */
const alignment = 16;

/** Bytes of the longest frame (5.1.6.3.1), without header. */
export const maxFrameBytes: number = constants.netFrameMaximum;
/** Bytes of the shortest: an Ethernet header. */
export const minFrameBytes = 14;

/** `struct virtio_net_hdr`: byte offsets in a frame's header (5.1.6). */
export const NetHeader = {
  flags: 0,
  gso_type: 1,
  hdr_len: 2,
  gso_size: 4,
  csum_start: 6,
  csum_offset: 8,
  num_buffers: 10,
  byteSize: headerBytes,
} as const;

/** VIRTIO_NET_HDR_F_NEEDS_CSUM: the checksum is partial. */
export const headerNeedsChecksum = 1;

/**
 * A burst: frame i is at `words[2 * i]` in `bytes`, `words[2 * i + 1]` long,
 * its `virtio_net_hdr` in the 12 bytes before it. Offsets of frames that came
 * from the core, or by `add`, are multiples of 16.
 *
 * @example
 * ```ts
 * import { Frames } from "vhost2";
 * const frames = new Frames();
 * frames.add(new Uint8Array(60).fill(0xff));
 * if (frames.count !== 1 || frames.at(0).length !== 60) throw new Error("lost");
 * ```
 */
export class Frames {
  readonly maxFrames: number;
  readonly bytes: Uint8Array<ArrayBuffer>;
  /** The same bytes, for fields of two bytes at even offsets. */
  readonly halves: Uint16Array<ArrayBuffer>;
  readonly words: Uint32Array<ArrayBuffer>;
  /** Frames in it. */
  count = 0;
  /** Bytes of the buffer that `add` has used. */
  #used = 0;

  /**
   * @param maxFrames 1 to 256; 64 unless given
   * @param size bytes of the buffer, at least one longest frame; 256 KiB
   * unless given. A burst ends where it is full.
   * @throws Vhost2Error OPTION for other numbers
   */
  constructor(maxFrames = 64, size: number = 256 << 10) {
    const most = constants.netBurstMaximum;
    if (!Number.isInteger(maxFrames) || maxFrames < 1 || maxFrames > most) {
      throw new Vhost2Error(
        "OPTION",
        `Cannot make a burst of ${maxFrames} frames (1 to ${most})`,
      );
    }
    const least = alignment + maxFrameBytes;
    if (!Number.isInteger(size) || size < least || size > 2 ** 31) {
      throw new Vhost2Error(
        "OPTION",
        `Cannot make a burst of ${size} bytes (${least} or more)`,
      );
    }
    this.maxFrames = maxFrames;
    const buffer = new ArrayBuffer(Math.ceil(size / alignment) * alignment);
    this.bytes = new Uint8Array(buffer);
    this.halves = new Uint16Array(buffer);
    this.words = new Uint32Array(maxFrames * frameWords);
  }

  /** Where frame `i` begins in `bytes`. */
  offset(i: number): number {
    return this.words[i * frameWords];
  }

  /** Bytes of frame `i`. */
  length(i: number): number {
    return this.words[i * frameWords + 1];
  }

  /** Frame `i`, a view that is good until the burst is used again. */
  at(i: number): Uint8Array<ArrayBuffer> {
    const offset = this.offset(i);
    return this.bytes.subarray(offset, offset + this.length(i));
  }

  /** The header of frame `i`, a view as `at`. */
  header(i: number): Uint8Array<ArrayBuffer> {
    const offset = this.offset(i);
    return this.bytes.subarray(offset - headerBytes, offset);
  }

  /** Whether frame `i` asks its receiver to complete it (an offload). */
  isPartial(i: number): boolean {
    const at = this.offset(i) - headerBytes;
    return this.bytes[at] !== 0 || this.bytes[at + 1] !== 0;
  }

  /** Forgets all frames. */
  clear(): void {
    this.count = 0;
    this.#used = 0;
  }

  /**
   * Copies a complete frame in, behind those of earlier calls; to begin anew
   * call `clear`.
   *
   * @returns false when there is no room for it
   * @throws Vhost2Error OPTION when it is shorter or longer than frames are
   */
  add(frame: Uint8Array): boolean {
    return this.#append(frame, null);
  }

  /** The same with frame `i` of another burst, and its header. */
  addFrom(frames: Frames, i: number): boolean {
    return this.#append(frames.at(i), frames.header(i));
  }

  #append(frame: Uint8Array, header: Uint8Array | null): boolean {
    const { length } = frame;
    if (length < minFrameBytes || length > maxFrameBytes) {
      throw new Vhost2Error(
        "OPTION",
        `Cannot send a frame of ${length} bytes (${minFrameBytes} to ${maxFrameBytes})`,
      );
    }
    if (this.count === 0) this.#used = 0;
    const offset = this.#used + alignment;
    if (
      this.count === this.maxFrames || offset + length > this.bytes.length
    ) return false;
    if (header === null) this.bytes.fill(0, offset - headerBytes, offset);
    else this.bytes.set(header, offset - headerBytes);
    this.bytes.set(frame, offset);
    const at = this.count * frameWords;
    this.words[at] = offset;
    this.words[at + 1] = length;
    this.count++;
    this.#used = Math.ceil((offset + length) / alignment) * alignment;
    return true;
  }
}

let shared: Frames | undefined;

/**
 * The isolate's burst for what guests send: used up before the next turn, so
 * that all queues share it and it stays in the cache.
 */
export function sharedFrames(): Frames {
  return shared ??= new Frames();
}
