import { existsSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

/** The tools, from here or from where these tests were transpiled to. */
export function toolsFolder(): string {
  for (let at = fileURLToPath(import.meta.url);;) {
    at = dirname(at);
    const tools = join(at, "tools", "debian.mjs");
    if (existsSync(tools)) return dirname(tools);
    if (at === dirname(at)) throw new Error("Cannot find tools/debian.mjs");
  }
}
