/** A small seeded generator (mulberry32), so that a failure can be repeated. */
export class Random {
  #state: number;

  constructor(seed: number) {
    this.#state = seed;
  }

  /** A whole number from 0 to `below` - 1. */
  below(below: number): number {
    this.#state = (this.#state + 0x6d2b79f5) | 0;
    let t = Math.imul(this.#state ^ (this.#state >>> 15), 1 | this.#state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return Math.floor(((t ^ (t >>> 14)) >>> 0) / 2 ** 32 * below);
  }

  /** True once in `n` times. */
  once(n: number): boolean {
    return this.below(n) === 0;
  }

  pick<T>(from: readonly T[]): T {
    return from[this.below(from.length)];
  }

  bytes(length: number): Uint8Array<ArrayBuffer> {
    return Uint8Array.from({ length }, () => this.below(256));
  }

  /** Numbers that break things more often than others do. */
  word(): number {
    return this.pick([
      0,
      1,
      2,
      this.below(16),
      this.below(256),
      this.below(0x10000),
      0x7fff,
      0x8000,
      0xffff,
      0x10000,
      0x7fffffff,
      0x80000000,
      0xffffffff,
      this.below(2 ** 32),
    ]);
  }

  long(): bigint {
    return this.pick([
      BigInt(this.word()),
      BigInt(this.word()) << 32n,
      2n ** 64n - 1n - BigInt(this.word()),
      BigInt(this.below(2 ** 20)) * 4096n,
    ]);
  }
}
