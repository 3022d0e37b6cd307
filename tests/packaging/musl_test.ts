/** One library per architecture serves glibc and musl (DESIGN section 3). */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { abiHash } from "../../ffi/abi.gen.ts";
import { test } from "../harness.ts";
import {
  architecture,
  root,
  run,
  succeed,
  tool,
  withFolder,
} from "./project.ts";

const library = join(root, "zig-out", "lib", `libvhost2-${architecture}.so`);

/** The dynamic linker of each C library, and Debian's package with it. */
const linkers = {
  gnu: {
    path: architecture === "x86_64"
      ? "/lib64/ld-linux-x86-64.so.2"
      : "/lib/ld-linux-aarch64.so.1",
    package: "libc6",
  },
  musl: { path: `/lib/ld-musl-${architecture}.so.1`, package: "musl" },
};

for (const [abi, linker] of Object.entries(linkers)) {
  const name = `the core works in a process of ${abi}'s C library`;
  if (!existsSync(library)) {
    test.skip(name, `no core is built for ${architecture}`);
    continue;
  }
  if (!existsSync(linker.path)) {
    test.skip(name, `${linker.path} is missing: apt install ${linker.package}`);
    continue;
  }
  test(name, async () => {
    await withFolder(async (folder) => {
      const program = join(folder, "load_core");
      await succeed([
        tool("zig"),
        "cc",
        "-target",
        `${architecture}-linux-${abi}`,
        "-dynamic",
        // Zig's checks in C would need more than old C libraries have.
        "-fno-sanitize=undefined",
        "-Wall",
        "-Werror",
        "-o",
        program,
        join(root, "tests", "packaging", "load_core.c"),
      ], { cwd: folder });
      // Started by the linker itself: proves which C library it is.
      const { status, stdout, stderr } = await run([
        linker.path,
        program,
        library,
      ]);
      assert.equal(status, 0, stdout + stderr);
      assert.equal(stdout, `${abiHash}\n`);
    });
  });
}
