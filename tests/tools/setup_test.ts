// The set-up's cache: what an older clone has unpacked does not stay.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import {
  chmodSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  writeFileSync,
} from "node:fs";
import { delimiter, join } from "node:path";
import process from "node:process";
import { test } from "../harness.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { toolsFolder } from "./tools_folder.ts";

/** An apt-get that "downloads" a package with the words of $WORDS in it. */
const aptGet = `#!/bin/sh -e
mkdir -p package/DEBIAN package/usr
cat > package/DEBIAN/control <<END
Package: words
Version: 1
Architecture: all
Maintainer: nobody
Description: words
END
echo "$WORDS" > package/usr/words
dpkg-deb --build package words.deb > log
rm -r package log
`;

const setUp = (debian: string, folder: string, part: string) => `
import { isUnpacked, noteRecipe, recipeOf, unpackInto } from ${debian};
const recipe = recipeOf(${part}, () => "made so");
if (!await isUnpacked(${folder}, recipe)) {
  await unpackInto(${folder}, "words", "1 KB", async () => ["words"],
    (unpacked) => noteRecipe(unpacked, recipe));
  console.log("unpacked");
}`;

const name =
  "what an older clone has unpacked is unpacked again when another thing is wanted";

if (!existsSync("/usr/bin/dpkg-deb")) {
  test.skip(name, "there is no dpkg-deb; on Debian it runs");
} else {
  test(name, () => {
    using folder = new TemporaryFolder();
    const bin = folder.file("bin");
    mkdirSync(bin);
    writeFileSync(join(bin, "apt-get"), aptGet);
    chmodSync(join(bin, "apt-get"), 0o755);
    const cache = folder.file("cache");
    const unpacked = join(cache, "words");
    const run = (part: string, words: string) =>
      execFileSync("node", [
        "--input-type=module",
        "--eval",
        setUp(
          JSON.stringify(join(toolsFolder(), "debian.mjs")),
          JSON.stringify(unpacked),
          JSON.stringify(part),
        ),
      ], {
        encoding: "utf8",
        env: {
          ...process.env,
          PATH: `${bin}${delimiter}${process.env.PATH}`,
          WORDS: words,
        },
      });
    const words = () =>
      readFileSync(join(unpacked, "root", "usr", "words"), "utf8").trim();
    // As a clone has left it that knew no recipes.
    mkdirSync(join(unpacked, "root"), { recursive: true });
    writeFileSync(join(unpacked, "left"), "");
    assert.equal(run("first", "one"), "unpacked\n");
    assert.equal(words(), "one");
    assert.equal(existsSync(join(unpacked, "left")), false);
    assert.equal(run("first", "two"), "");
    assert.equal(words(), "one");
    assert.equal(run("second", "two"), "unpacked\n");
    assert.equal(words(), "two");
    assert.deepEqual(readdirSync(cache), ["words"]);
    assert.deepEqual(readdirSync(unpacked).sort(), [".recipe", "root"]);
  });
}
