/**
 * A list of copies between guest memory and a buffer, done in one call of the
 * core.
 *
 * @module
 */

import { constants, layouts } from "../../../ffi/abi.gen.ts";
import { core } from "../../../ffi/core.ts";
import type { GuestMemory } from "../../../ffi/guest_memory.ts";

const copyWords = layouts.Copy.byteSize / 4;
const field = {
  view: layouts.Copy.view / 4,
  offset: layouts.Copy.offset / 4,
  length: layouts.Copy.length / 4,
  access: layouts.Copy.access / 4,
  bufferOffset: layouts.Copy.bufferOffset / 4,
};

/** The device writes: buffer to guest. */
export const toGuest: number = constants.accessWrite;
/** The device reads: guest to buffer. */
export const fromGuest: number = constants.accessRead;

/** Copies to be done together. */
export class Copies {
  #words = new Uint32Array(64 * copyWords);
  #count = 0;

  /** How many there are. */
  get count(): number {
    return this.#count;
  }

  /** Adds a copy of `length` bytes at `bufferOffset` of the buffer. */
  add(
    view: number,
    offset: number,
    length: number,
    access: number,
    bufferOffset: number,
  ): void {
    const at = this.#count * copyWords;
    if (at === this.#words.length) {
      const larger = new Uint32Array(at * 2);
      larger.set(this.#words);
      this.#words = larger;
    }
    const words = this.#words;
    words[at + field.view] = view;
    words[at + field.offset] = offset;
    words[at + field.length] = length;
    words[at + field.access] = access;
    words[at + field.bufferOffset] = bufferOffset;
    words[at + field.bufferOffset + 1] = bufferOffset / 2 ** 32;
    this.#count++;
  }

  /**
   * Does them all and empties the list.
   *
   * @returns false when guest memory has gone: nothing was copied then
   */
  run(memory: GuestMemory, buffer: Uint8Array): boolean {
    const count = this.#count;
    this.#count = 0;
    if (count === 0) return true;
    return core.memoryCopy(
      memory.handle,
      this.#words,
      count,
      buffer,
      buffer.length,
    ) >= 0;
  }
}
