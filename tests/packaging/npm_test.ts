/** The npm package is made, and used from an empty project on Node. */

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "../harness.ts";
import { root, run, tool, withFolder } from "./project.ts";

test("npm-build makes a package that serves a device, and a disk by its command, from an empty Node project", async () => {
  await withFolder(async (folder) => {
    const output = join(folder, "npm");
    const { status, stdout, stderr } = await run(
      [tool("deno"), "run", "--allow-all", "npm-build.ts", output],
      { cwd: root },
    );
    assert.equal(status, 0, stdout + stderr);
    assert.match(stdout, /^Made @vhost2\/vhost2 \d+\.\d+\.\d+: .*\.tgz, /m);
    assert.match(stdout, /^A script on Node serves a device/m);
    assert.match(stdout, /^npx vhost2 --version: .*\d+\.\d+\.\d+$/m);
    assert.match(stdout, /^vhost2 blk serves a disk of 4194304 bytes$/m);

    const read = (path: string) => JSON.parse(readFileSync(path, "utf8"));
    const made = read(join(output, "package", "package.json"));
    const { name, version, exports } = read(join(root, "deno.json"));
    const { devDependencies } = read(join(root, "package.json"));
    assert.equal(made.name, name);
    assert.equal(made.version, version);
    assert.deepEqual(Object.keys(made.exports), Object.keys(exports));
    // Exactly what was tested, and nothing else.
    assert.deepEqual(made.dependencies, { koffi: devDependencies.koffi });
    assert.equal(made.scripts, undefined);

    const files = readdirSync(output, { recursive: true, encoding: "utf8" });
    const tarballs = files.filter((file) => file.endsWith(".tgz"));
    assert.deepEqual(tarballs, [`vhost2-vhost2-${version}.tgz`]);
    assert.ok(!files.some((file) => /_test\.|\.mjs$|\.so$|\.zig$/.test(file)));
  });
});
