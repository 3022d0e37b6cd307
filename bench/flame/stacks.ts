/**
 * Sampled call stacks, as `perf script` prints them, and the tree of them.
 *
 * @module
 */

/** A function as seen from one path of callers. */
export interface Frame {
  readonly name: string;
  /** Samples in it and in what it called. */
  count: number;
  readonly callees: Map<string, Frame>;
}

function frame(name: string): Frame {
  return { name, count: 0, callees: new Map() };
}

/**
 * The names of each sample's frames, the outermost first.
 *
 * A sample begins with a line that is not indented; of the lines below it the
 * innermost frame is first:
 *
 *     deno 1234:
 *             7f12 vhost2_ring_pop+0x12 (/x/libvhost2-x86_64.so)
 *             7f34 JS:*turn file:///x/virtqueue.ts:1:2 (/tmp/perf-1.map)
 */
export function* parse(text: string): Generator<string[]> {
  let names: string[] | undefined;
  for (const line of text.split("\n")) {
    if (line.trim() === "") {
      if (names !== undefined && names.length > 0) yield names.reverse();
      names = undefined;
    } else if (!/^\s/.test(line)) {
      names = [];
    } else {
      const found = /^\s+[0-9a-f]+ (.*) \(([^()]*)\)$/.exec(line);
      names?.push(nameOf(found?.[1] ?? "?", found?.[2] ?? ""));
    }
  }
  if (names !== undefined && names.length > 0) yield names.reverse();
}

/** A short name: what people look for, without places in files. */
function nameOf(symbol: string, object: string): string {
  // Without the place in the function, and the number of a Zig instance.
  const plain = symbol.replace(/\+0x[0-9a-f]+$/, "").replace(
    /__anon_\d+$/,
    "",
  );
  // V8: `JS:` and how it was compiled (* and +: optimised, ~: not), then the
  // function and where it is.
  const script = /^JS:[*+^~]?'?(\S*) \S*?([^/\s]+):\d+:\d+$/.exec(plain);
  if (script !== null) {
    return `${script[1] === "" ? "(anonymous)" : script[1]} ${script[2]}`;
  }
  if (object.startsWith("[kernel")) return `${plain} [kernel]`;
  if (plain !== "[unknown]") return plain;
  const file = object.split("/").at(-1)!;
  return /^perf-\d+\.map$|^\[?unknown\]?$|^$|^\/\/anon$/.test(file)
    ? "(generated code)"
    : `(${file})`;
}

/** One tree of all samples; frames of the same name below each other are one. */
export function fold(samples: Iterable<readonly string[]>): Frame {
  const root = frame("all");
  for (const names of samples) {
    root.count++;
    let at = root;
    for (const name of names) {
      if (name === at.name) continue;
      let next = at.callees.get(name);
      if (next === undefined) at.callees.set(name, next = frame(name));
      next.count++;
      at = next;
    }
  }
  return root;
}

/** Samples whose innermost frame has this name, by name. */
export function selfCounts(root: Frame): Map<string, number> {
  const counts = new Map<string, number>();
  const visit = (at: Frame) => {
    let own = at.count;
    for (const callee of at.callees.values()) {
      own -= callee.count;
      visit(callee);
    }
    if (own > 0) counts.set(at.name, (counts.get(at.name) ?? 0) + own);
  };
  visit(root);
  return counts;
}
