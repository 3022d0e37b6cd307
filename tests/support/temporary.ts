/** Folders and socket paths of one test. */

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

/** A folder of its own that goes with the test. */
export class TemporaryFolder {
  readonly path: string = mkdtempSync(join(tmpdir(), "vhost2-test-"));

  /** A path in the folder; short enough for a socket. */
  file(name: string): string {
    return join(this.path, name);
  }

  remove(): void {
    rmSync(this.path, { recursive: true, force: true });
  }

  [Symbol.dispose](): void {
    this.remove();
  }
}

/** A socket path that nobody uses; the folder goes with the callback. */
export async function withSocketPath(
  body: (path: string) => Promise<void>,
): Promise<void> {
  const folder = new TemporaryFolder();
  try {
    await body(folder.file("socket"));
  } finally {
    folder.remove();
  }
}
