/**
 * A tree of call stacks as a flame graph: callers below, callees above, as wide
 * as the time spent in them. No script is in it; pointing at a frame shows its
 * whole name and its part.
 *
 * @module
 */

import type { Frame } from "./stacks.ts";

const width = 1200;
const rowHeight = 17;
const titleHeight = 40;
const margin = 10;
/** Pixels of a letter, and of the narrowest frame that is drawn. */
const letterWidth = 6.6;
const leastWidth = 0.4;

interface Placed {
  readonly frame: Frame;
  readonly left: number;
  readonly width: number;
  readonly depth: number;
}

function place(root: Frame): Placed[] {
  const placed: Placed[] = [];
  const perSample = (width - 2 * margin) / root.count;
  const visit = (frame: Frame, left: number, depth: number) => {
    const wide = frame.count * perSample;
    if (wide < leastWidth) return;
    placed.push({ frame, left, width: wide, depth });
    let at = left;
    // By name: two graphs of the same program look alike.
    const callees = [...frame.callees.values()]
      .sort((a, b) => a.name < b.name ? -1 : 1);
    for (const callee of callees) {
      visit(callee, at, depth + 1);
      at += callee.count * perSample;
    }
  };
  visit(root, margin, 0);
  return placed;
}

/** TypeScript, the core, the kernel, and the rest: the runtime. */
function colorOf(name: string): string {
  if (/\.(ts|js|mjs)$/.test(name)) return "#e8b04a";
  if (name.endsWith(" [kernel]")) return "#c77b6b";
  const core =
    /^(vhost2_|compiler_rt\.|(ring|memory|net|file|poll|descriptor|linux)\.)/;
  return core.test(name) ? "#6fa86f" : "#a9b3c1";
}

const escapes: Record<string, string> = {
  "&": "&amp;",
  "<": "&lt;",
  ">": "&gt;",
  '"': "&quot;",
};

function escape(text: string): string {
  return text.replace(/[&<>"]/g, (letter) => escapes[letter]);
}

function rectangle(
  { frame, left, width, depth }: Placed,
  root: Frame,
  height: number,
): string {
  const top = height - margin - (depth + 1) * rowHeight;
  const part = (frame.count / root.count * 100).toFixed(1);
  const letters = Math.floor((width - 4) / letterWidth);
  const name = frame.name.length <= letters
    ? frame.name
    : `${frame.name.slice(0, letters - 1)}…`;
  const label = letters < 3
    ? ""
    : `<text x="${(left + 3).toFixed(1)}" y="${top + 12}">${
      escape(name)
    }</text>`;
  return `<g><title>${escape(frame.name)}: ${part} %</title>` +
    `<rect x="${left.toFixed(1)}" y="${top}" width="${
      Math.max(width - 0.3, 0.1).toFixed(1)
    }" height="${rowHeight - 1}" fill="${colorOf(frame.name)}"/>${label}</g>`;
}

/** The text of an SVG file. */
export function draw(root: Frame, title: string): string {
  const placed = place(root);
  const depth = Math.max(...placed.map((one) => one.depth)) + 1;
  const height = titleHeight + depth * rowHeight + margin;
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" font-family="monospace" font-size="11">`,
    `<rect width="100%" height="100%" fill="#ffffff"/>`,
    `<text x="${width / 2}" y="24" text-anchor="middle" font-size="15">${
      escape(title)
    }</text>`,
    ...placed.map((one) => rectangle(one, root, height)),
    "</svg>",
    "",
  ].join("\n");
}
