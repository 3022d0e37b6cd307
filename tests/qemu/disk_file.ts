// Files that serve as disks, gone at the end of their scope.
import {
  closeSync,
  ftruncateSync,
  mkdtempSync,
  openSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

export interface DiskFile {
  readonly path: string;
  [Symbol.dispose](): void;
}

/** A file of so many bytes of holes, or with this content. */
export function diskFile(content: number | Uint8Array): DiskFile {
  const folder = mkdtempSync(join(tmpdir(), "vhost2-disk-"));
  const path = join(folder, "disk.img");
  if (typeof content === "number") {
    const fd = openSync(path, "w");
    ftruncateSync(fd, content);
    closeSync(fd);
  } else writeFileSync(path, content);
  return {
    path,
    [Symbol.dispose]: () => rmSync(folder, { recursive: true, force: true }),
  };
}
