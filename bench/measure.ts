/**
 * Measuring two things in turns (A B B A), and what is quoted: medians.
 *
 * @module
 */

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1
    ? sorted[middle]
    : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** Medians of the two, and of the ratio a/b pair by pair. */
export interface Comparison {
  readonly a: number;
  readonly b: number;
  readonly ratio: number;
}

/** Runs a and b in turns, `rounds` times each. */
export function compare(
  a: () => number,
  b: () => number,
  rounds: number,
): Comparison {
  const pairs: [number, number][] = [];
  for (let round = 0; round < rounds; round++) {
    if (round % 2 === 0) {
      const first = a();
      pairs.push([first, b()]);
    } else {
      const first = b();
      pairs.push([a(), first]);
    }
  }
  return {
    a: median(pairs.map(([value]) => value)),
    b: median(pairs.map(([, value]) => value)),
    ratio: median(pairs.map(([x, y]) => x / y)),
  };
}
