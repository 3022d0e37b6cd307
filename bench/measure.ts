/**
 * Measuring things in turns (A B B A), and what is quoted: medians.
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

/** Measures one of several things once. */
export type Once = () => number | Promise<number>;

/**
 * Each of `things` once in each of `rounds`, a different one first each time;
 * the figures of a round are beside each other.
 */
export async function inTurns(
  things: readonly Once[],
  rounds: number,
): Promise<number[][]> {
  const found: number[][] = [];
  for (let round = 0; round < rounds; round++) {
    const figures: number[] = new Array(things.length);
    for (let i = 0; i < things.length; i++) {
      const which = (round + i) % things.length;
      figures[which] = await things[which]();
    }
    found.push(figures);
  }
  return found;
}

/** The median of column `which`. */
export function medianOf(
  found: readonly (readonly number[])[],
  which: number,
): number {
  return median(found.map((figures) => figures[which]));
}

/** The median of the rounds' ratios of column `a` to column `b`. */
export function medianRatio(
  found: readonly (readonly number[])[],
  a: number,
  b: number,
): number {
  return median(found.map((figures) => figures[a] / figures[b]));
}
