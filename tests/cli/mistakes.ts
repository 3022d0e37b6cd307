/**
 * What is typed wrongly, or asks for what cannot be: one sentence and an exit
 * code.
 *
 * @module
 */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { test } from "../harness.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { run } from "./command.ts";

/**
 * Its name, the words, the exit code, and the sentence; FOLDER is a folder of
 * the test's own, in which no socket `s` may come to be.
 */
export type Mistake = readonly [string, readonly string[], number, RegExp];

/** A test for each; the words come after `command`, where there is one. */
export function testMistakes(
  mistakes: readonly Mistake[],
  command?: string,
): void {
  const first = command === undefined ? [] : [command];
  const title = command === undefined ? "" : `${command}: `;
  for (const [name, words, expected, sentence] of mistakes) {
    test(`${title}${name} is one sentence on stderr and exit code ${expected}`, async () => {
      using folder = new TemporaryFolder();
      const { code, stdout, stderr } = await run(
        ...first,
        ...words.map((word) => word.replace("FOLDER", folder.path)),
      );
      assert.equal(code, expected, stderr);
      assert.equal(stdout, "");
      assert.match(stderr, sentence);
      assert.match(stderr, /^vhost2: [^\n]+\n$/);
      assert.ok(!existsSync(folder.file("s")));
    });
  }
}
