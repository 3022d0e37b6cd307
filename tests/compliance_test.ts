/** docs/compliance.md says what is true: every row is there, so is every test. */

import assert from "node:assert/strict";
import { existsSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { backendRequests } from "../protocol/backend_request.ts";
import { ProtocolFeature } from "../protocol/features.ts";
import { frontendRequests } from "../protocol/frontend_request.ts";
import { test } from "./harness.ts";

const page = fileURLToPath(new URL("../docs/compliance.md", import.meta.url));

/** The tables by the heading above them: their rows, without the two at top. */
function readTables(): Map<string, string[][]> {
  const tables = new Map<string, string[][]>();
  let heading = "";
  for (const line of readFileSync(page, "utf8").split("\n")) {
    if (line.startsWith("## ")) heading = line.slice(3);
    if (!line.startsWith("|")) continue;
    const cells = line.split("|").slice(1, -1).map((cell) => cell.trim());
    tables.set(heading, [...tables.get(heading) ?? [], cells]);
  }
  for (const [heading, rows] of tables) tables.set(heading, rows.slice(2));
  return tables;
}

const tables = readTables();

/** The first cells of each row of a table. */
function rowsOf(heading: string, cells: number): string[] {
  const rows = tables.get(heading);
  assert.ok(rows !== undefined, `${heading} has a table`);
  return rows.map((row) => row.slice(0, cells).join(" "));
}

function range(prefix: string, count: number): string[] {
  return Array.from({ length: count }, (_, i) => `${prefix}${i + 1}`);
}

test("compliance.md: every message of the front-end and the back-end has a row", () => {
  for (
    const [heading, table] of [
      ["Messages of the front-end", frontendRequests],
      ["Messages of the back-end", backendRequests],
    ] as const
  ) {
    const expected = table.map(({ id, name }) => `${id} ${name}`);
    assert.deepEqual(rowsOf(heading, 2), expected);
  }
});

test("compliance.md: every protocol feature, rule and row of the contract has a row", () => {
  const features = Object.entries(ProtocolFeature);
  assert.deepEqual(
    rowsOf("Protocol features", 2),
    features.map(([name, bit]) => `${bit} ${name}`),
  );
  const rules = rowsOf("Rules that implementations get wrong", 1);
  assert.deepEqual(rules, range("", 25));
  assert.deepEqual(rowsOf("The contract of the RFC", 1), [
    ...range("A", 17),
    ...range("B", 10),
    ...range("C", 11),
    ...range("D", 10),
    ...range("E", 5),
  ]);
  const inputs = rowsOf("Inputs that broke other back-ends", 1);
  assert.deepEqual(inputs, range("", 48));
});

/** `[session/rules] "rule 2:"` is a test by its file and its name's beginning. */
const claim = /\[([a-z_/]+)\] "([^"]+)"/g;

test("compliance.md: every row names a test, or says why there is none", () => {
  for (const [heading, rows] of tables) {
    for (const row of rows) {
      const isProved = row.some((cell) => [...cell.matchAll(claim)].length > 0);
      const isExplained = row.some((cell) => /^— \w/.test(cell));
      assert.ok(isProved !== isExplained, `${heading}: ${row.join(" | ")}`);
    }
  }
});

test("compliance.md: every test that it names exists", () => {
  const text = readFileSync(page, "utf8");
  const links = new Map(
    [...text.matchAll(/^\[([a-z_/]+)\]: (\S+)$/gm)].map((m) => [m[1], m[2]]),
  );
  const claims = [...text.replace(/\s+/g, " ").matchAll(claim)];
  assert.ok(claims.length > 150, `${claims.length} tests are named`);
  for (const [, file, name] of claims) {
    assert.equal(links.get(file), `../tests/${file}_test.ts`);
    const path = join(dirname(page), links.get(file)!);
    assert.ok(existsSync(path), `${path} exists`);
    const source = readFileSync(path, "utf8");
    // The beginning of a string: a test's name, or what one is made of.
    const begins = (text: string) =>
      source.includes(`"${text}`) || source.includes("`" + text);
    const isMade = name.startsWith("packed, ") &&
      source.includes("`packed, ${name}`") && begins(name.slice(8));
    assert.ok(begins(name) || isMade, `${file} has a test "${name}..."`);
  }
});
