/** The house's own rules, read off the sources. */

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { dirname, join, normalize, relative } from "node:path";
import { fileURLToPath } from "node:url";
import { test } from "./harness.ts";

const root = fileURLToPath(new URL("..", import.meta.url));

/** Folder -> folders that it may import from (itself is always allowed). */
const allowed: Record<string, readonly string[]> = {
  ffi: [],
  protocol: [],
  virtqueue: ["ffi"],
  driver: ["protocol", "ffi"],
  pci: ["driver", "protocol", "ffi"],
  transports: ["pci", "driver", "virtqueue", "protocol", "ffi"],
  session: ["transports", "protocol", "ffi"],
  devices: ["virtqueue", "protocol", "ffi", "session"],
  frontend: ["driver", "pci", "protocol", "ffi", "transports"],
};

function sources(folder: string): string[] {
  return readdirSync(join(root, folder), { withFileTypes: true })
    .flatMap((entry) => {
      const name = join(folder, entry.name);
      if (entry.isDirectory()) {
        return entry.name === "embedded" ? [] : sources(name);
      }
      return name.endsWith(".ts") ? [name] : [];
    });
}

function imports(file: string): { path: string; isTypeOnly: boolean }[] {
  const text = readFileSync(join(root, file), "utf8");
  const statements = text.matchAll(
    /^(import|export)\s+(type\s)?[^;]*?from\s+"([^"]+)";|import\("([^"]+)"\)/gm,
  );
  return [...statements].map((match) => ({
    path: match[3] ?? match[4],
    isTypeOnly: match[2] !== undefined,
  }));
}

for (const folder of Object.keys(allowed)) {
  test(`${folder}/ imports only from ${[folder, ...allowed[folder]].join(", ")}`, () => {
    for (const file of sources(folder)) {
      for (const { path, isTypeOnly } of imports(file)) {
        if (!path.startsWith(".")) {
          assert.ok(
            path.startsWith("node:") || (folder === "ffi" && path === "koffi"),
            `${file} imports ${path}`,
          );
          continue;
        }
        const target = relative(
          root,
          normalize(join(root, dirname(file), path)),
        );
        const other = target.split("/")[0];
        const isAllowed = other === folder || allowed[folder].includes(other);
        assert.ok(isAllowed, `${file} imports ${target}`);
        // A device is built on the public API: of the session, types only.
        if (folder === "devices" && other === "session") {
          assert.ok(isTypeOnly, `${file} imports ${target} as a value`);
        }
        // Requests are the devices' business; PCI-vDPA relays some.
        if (folder === "transports" && other === "virtqueue" && !isTypeOnly) {
          assert.match(file, /^transports\/pci_vdpa\//, target);
        }
        if (folder === "frontend" && other === "transports") {
          assert.match(target, /channel\.ts$|transport\.ts$/, file);
        }
      }
    }
  });
}

test("only ffi/ names a runtime", () => {
  const folders = Object.keys(allowed).filter((folder) => folder !== "ffi");
  for (const file of [...folders, "cli"].flatMap(sources)) {
    const text = readFileSync(join(root, file), "utf8")
      .replace(/\/\*[\s\S]*?\*\/|\/\/.*/g, "");
    assert.doesNotMatch(text, /\bDeno\.|\bkoffi\b/, file);
  }
});

test("only one Zig file has exports", () => {
  const files = readdirSync(join(root, "core-zig"), {
    recursive: true,
    encoding: "utf8",
  }).filter((name) => name.endsWith(".zig") && name !== "exports.zig");
  assert.ok(files.length > 5);
  for (const file of files) {
    const text = readFileSync(join(root, "core-zig", file), "utf8");
    assert.doesNotMatch(text, /^\s*(pub )?export fn|@export\(/m, file);
  }
});
