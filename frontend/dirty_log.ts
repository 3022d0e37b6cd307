/**
 * The dirty log as the front-end has it: a bitmap of guest pages in a memfd, in
 * which the back-end sets the bits and the front-end takes them.
 *
 * @module
 */

import { binding, core } from "../ffi/core.ts";
import { check } from "../ffi/errors.ts";
import type { LogDescription } from "../protocol/payloads.ts";

/** VHOST_LOG_PAGE: bytes of guest memory to a bit. */
export const logPageSize = 0x1000;

const canDetach = typeof ArrayBuffer.prototype.transfer === "function";

/** How a log is made. */
export interface DirtyLogOptions {
  /** Guest physical address behind the last page that it covers. */
  readonly end: bigint;
  /** Bytes of its file in front of it; 0 unless given. */
  readonly offset?: number;
}

/** One log: a memfd, mapped here. */
export class DirtyLog {
  /** The memfd. */
  readonly fd: number;
  /** What SET_LOG_BASE says of it. */
  readonly description: LogDescription;
  /** A bit per page, lowest first; empty after `close`. */
  readonly bytes: Uint8Array<ArrayBuffer>;
  readonly #address: bigint;
  readonly #fileSize: number;
  #isOpen = true;

  constructor({ end, offset = 0 }: DirtyLogOptions) {
    const pages = Number((end + BigInt(logPageSize - 1)) / BigInt(logPageSize));
    // Whole words, as QEMU has it.
    const size = Math.max(1, Math.ceil(pages / 64)) * 8;
    this.#fileSize = offset + size;
    this.description = { mmapSize: BigInt(size), mmapOffset: BigInt(offset) };
    this.fd = check(
      core.memfdCreate(this.#fileSize),
      `Cannot make a dirty log of ${size} bytes`,
    );
    const address = new BigUint64Array(1);
    const mapped = core.mapShared(this.fd, this.#fileSize, address);
    if (mapped < 0) {
      core.descriptorClose(this.fd);
      check(mapped, `Cannot map a dirty log of ${size} bytes`);
    }
    this.#address = address[0];
    this.bytes = new Uint8Array(
      binding.view(this.#address, this.#fileSize),
      offset,
      size,
    );
  }

  /** Whether the page at a guest physical address is marked. */
  isDirty(address: bigint): boolean {
    const page = Number(address / BigInt(logPageSize));
    const at = Math.floor(page / 8);
    return at < this.bytes.length &&
      (Atomics.load(this.bytes, at) >> (page % 8) & 1) !== 0;
  }

  /** Guest physical addresses of the pages marked, whose bits are cleared. */
  take(): bigint[] {
    const pages: bigint[] = [];
    for (let at = 0; at < this.bytes.length; at++) {
      if (this.bytes[at] === 0) continue;
      const bits = Atomics.exchange(this.bytes, at, 0);
      for (let bit = 0; bit < 8; bit++) {
        if ((bits >> bit & 1) === 0) continue;
        pages.push(BigInt(at * 8 + bit) * BigInt(logPageSize));
      }
    }
    return pages;
  }

  /** Takes the bits of another log over: those are cleared. */
  takeFrom(other: DirtyLog): void {
    const { length } = this.bytes;
    for (let at = 0; at < other.bytes.length && at < length; at++) {
      if (other.bytes[at] === 0) continue;
      Atomics.or(this.bytes, at, Atomics.exchange(other.bytes, at, 0));
    }
  }

  /** Closes the memfd, empties `bytes` and unmaps. */
  close(): void {
    if (!this.#isOpen) return;
    this.#isOpen = false;
    core.descriptorClose(this.fd);
    // As for guest memory: where views cannot be emptied the mapping stays.
    if (!canDetach) return;
    this.bytes.buffer.transfer();
    check(
      core.unmap(this.#address, this.#fileSize),
      "Cannot unmap a dirty log",
    );
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
