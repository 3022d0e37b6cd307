/**
 * Tables on a terminal.
 *
 * @module
 */

import type { Case, Figure, Section, Unit } from "./section.ts";

const nameWidth = 56;
const cellWidth = 15;

const scaled = (value: number, unit: string) =>
  `${value >= 100 ? value.toFixed(0) : value.toPrecision(3)} ${unit}`;

const formats: Record<Unit, (value: number) => string> = {
  perSecond: (value) =>
    value >= 1e6
      ? `${(value / 1e6).toFixed(2)} M/s`
      : `${(value / 1e3).toFixed(0)} k/s`,
  nanoseconds: (value) =>
    value >= 1000 ? `${(value / 1000).toFixed(1)} us` : scaled(value, "ns"),
  ratio: (value) => `${value.toFixed(2)}x`,
  bytes: (value) => {
    const size = Math.abs(value);
    if (size >= 1e6) return `${(value / 1e6).toFixed(1)} MB`;
    return size >= 1e3
      ? `${(value / 1e3).toFixed(1)} kB`
      : `${value.toFixed(3)} B`;
  },
  percent: (value) => `${value.toFixed(2)} %`,
  count: (value) => String(value),
};

/** A figure with its unit. */
export function format({ value, unit }: Figure): string {
  return formats[unit](value);
}

function line(name: string, cells: readonly string[], last: string): string {
  const row = name.padEnd(nameWidth) +
    cells.map((cell) => cell.padStart(cellWidth)).join("");
  return last === "" ? row : `${row}   ${last}`;
}

/** The section's title and its columns. */
export function heading(section: Section): string {
  return `\n${section.about}\n${line("", section.columns, "")}`;
}

/** One row, with its goal behind it. */
export function row(
  { name, goal }: Case,
  figures: readonly Figure[],
): string {
  return line(
    name,
    figures.map(format),
    goal === undefined ? "" : `goal: ${goal}`,
  );
}
