/**
 * Which port a station was seen at last: a hash table of fixed size in typed
 * arrays, so that a guest that makes up addresses costs no memory, and a look
 * no allocation.
 *
 * @module
 */

/** Places looked at for an address. */
const ways = 8;

export class MacTable {
  readonly #mask: number;
  readonly #high: Uint16Array<ArrayBuffer>;
  readonly #low: Uint32Array<ArrayBuffer>;
  /** Port number plus one; 0 where the place is free. */
  readonly #ports: Uint16Array<ArrayBuffer>;
  readonly #seen: Float64Array<ArrayBuffer>;
  readonly #ageMs: number;

  /**
   * @param size addresses, a power of two of at least 8
   * @param ageMs for so long an address is known that is not seen
   */
  constructor(size: number, ageMs: number) {
    this.#mask = size - 1;
    this.#high = new Uint16Array(size);
    this.#low = new Uint32Array(size);
    this.#ports = new Uint16Array(size);
    this.#seen = new Float64Array(size);
    this.#ageMs = ageMs;
  }

  #start(high: number, low: number): number {
    const mixed = Math.imul(low ^ Math.imul(high, 0x9e3779b1), 0x85ebca6b);
    return (mixed ^ (mixed >>> 15)) & this.#mask;
  }

  /**
   * The port of an address, or -1.
   *
   * @param high its first two bytes, and `low` the others, in any byte order
   */
  find(high: number, low: number, now: number): number {
    const start = this.#start(high, low);
    for (let i = 0; i < ways; i++) {
      const at = (start + i) & this.#mask;
      if (this.#low[at] !== low || this.#high[at] !== high) continue;
      if (this.#ports[at] === 0 || now - this.#seen[at] > this.#ageMs) continue;
      return this.#ports[at] - 1;
    }
    return -1;
  }

  /** The address was seen at `port`. */
  learn(high: number, low: number, port: number, now: number): void {
    const start = this.#start(high, low);
    let oldest = start;
    for (let i = 0; i < ways; i++) {
      const at = (start + i) & this.#mask;
      const isOurs = this.#low[at] === low && this.#high[at] === high;
      if (isOurs && this.#ports[at] !== 0) {
        oldest = at;
        break;
      }
      if (this.#ports[at] === 0) {
        if (this.#ports[oldest] !== 0) oldest = at;
      } else if (
        this.#ports[oldest] !== 0 && this.#seen[at] < this.#seen[oldest]
      ) oldest = at;
    }
    this.#high[oldest] = high;
    this.#low[oldest] = low;
    this.#ports[oldest] = port + 1;
    this.#seen[oldest] = now;
  }

  /** The port has gone, and with it all that was seen there. */
  forget(port: number): void {
    for (let at = 0; at <= this.#mask; at++) {
      if (this.#ports[at] === port + 1) this.#ports[at] = 0;
    }
  }
}
