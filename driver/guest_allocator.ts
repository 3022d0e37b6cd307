/**
 * Hands out pieces of a range of guest addresses: first fit, with the holes
 * kept in order and joined when they touch.
 *
 * @module
 */

import { Vhost2Error } from "../ffi/errors.ts";

interface Hole {
  start: number;
  end: number;
}

/** Pieces of the offsets 0 to `size` of one region. */
export class GuestAllocator {
  readonly #holes: Hole[];

  /** @param size bytes */
  constructor(size: number) {
    this.#holes = [{ start: 0, end: size }];
  }

  /**
   * The offset of a free piece, or null when no hole is large enough.
   *
   * @param size bytes
   * @param alignment bytes, a power of two
   */
  allocate(size: number, alignment: number): number | null {
    for (let index = 0; index < this.#holes.length; index++) {
      const hole = this.#holes[index];
      const start = Math.ceil(hole.start / alignment) * alignment;
      if (start + size > hole.end) continue;
      this.#cut(index, start, start + size);
      return start;
    }
    return null;
  }

  /** As `allocate`, but the last piece that fits. */
  allocateLast(size: number, alignment: number): number | null {
    for (let index = this.#holes.length - 1; index >= 0; index--) {
      const hole = this.#holes[index];
      const start = Math.floor((hole.end - size) / alignment) * alignment;
      if (start < hole.start) continue;
      this.#cut(index, start, start + size);
      return start;
    }
    return null;
  }

  /** Takes just this piece; false when it is not all free. */
  take(start: number, size: number): boolean {
    const end = start + size;
    const index = this.#holes.findIndex((hole) =>
      hole.start <= start && end <= hole.end
    );
    if (index < 0) return false;
    this.#cut(index, start, end);
    return true;
  }

  #cut(index: number, start: number, end: number): void {
    const hole = this.#holes[index];
    const rest: Hole[] = [];
    if (start > hole.start) rest.push({ start: hole.start, end: start });
    if (end < hole.end) rest.push({ start: end, end: hole.end });
    this.#holes.splice(index, 1, ...rest);
  }

  /** Gives a piece back, exactly as it was allocated. */
  free(start: number, size: number): void {
    const end = start + size;
    const next = this.#holes.findIndex((hole) => hole.start >= start);
    const index = next < 0 ? this.#holes.length : next;
    const before = this.#holes[index - 1];
    const after = this.#holes[index];
    if (
      (before !== undefined && before.end > start) ||
      (after !== undefined && after.start < end)
    ) {
      throw new Vhost2Error(
        "OPTION",
        `Cannot free offset ${start}: it is free already`,
      );
    }
    const joinsBefore = before?.end === start;
    const joinsAfter = after?.start === end;
    if (joinsBefore && joinsAfter) {
      before.end = after.end;
      this.#holes.splice(index, 1);
    } else if (joinsBefore) before.end = end;
    else if (joinsAfter) after.start = start;
    else this.#holes.splice(index, 0, { start, end });
  }
}
