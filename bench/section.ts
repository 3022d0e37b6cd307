/**
 * What the bench consists of: sections of like rows, each row measured by
 * itself, with whatever it needs started and stopped.
 *
 * @module
 */

/** How a figure is written. */
export type Unit =
  | "perSecond"
  | "nanoseconds"
  | "ratio"
  | "bytes"
  | "percent"
  | "count";

/** One cell of a table. */
export interface Figure {
  readonly value: number;
  readonly unit: Unit;
}

/** How long and how often; the same for all rows of a run. */
export interface Run {
  /** Pairs of turns (A B, B A, ...), of which medians are quoted. */
  readonly rounds: number;
  /** Milliseconds of a turn. */
  readonly runMs: number;
  /** Requests between the two looks at the heap. */
  readonly heapRequests: number;
  /** Bytes of disks that hold data. */
  readonly diskBytes: number;
  /** A file of that size, in the page cache. */
  file(): string;
}

/** One row. */
export interface Case {
  readonly name: string;
  /** What the project wants of it, for people. */
  readonly goal?: string;
  /** One figure for each column of the section. */
  measure(run: Run): Promise<readonly Figure[]>;
}

/** Rows with the same columns. */
export interface Section {
  /** One word: with it the rows are chosen, as with their names. */
  readonly name: string;
  /** What is compared with what. */
  readonly about: string;
  readonly columns: readonly string[];
  readonly cases: readonly Case[];
  /** Why it cannot be measured on this machine, and what would help; or null. */
  missing?(): string | null;
}

/** The rows that a filter chooses: a part of "section: row". */
export function chosen(section: Section, filter: string): readonly Case[] {
  return section.cases.filter(({ name }) =>
    `${section.name}: ${name}`.includes(filter)
  );
}
