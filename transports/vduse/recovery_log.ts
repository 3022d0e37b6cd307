/**
 * What of a device outlives a crash: a file in the runtime directory. Its
 * first page says of which device it is and whether the driver runs; then
 * comes the inflight region (`core-zig/ring/inflight.zig`), in which the rings
 * note the requests that they have taken. The kernel keeps none of that.
 *
 * A file is written beside and renamed into place, so it is always whole. It
 * may still say anything: what it says of rings is checked when they start.
 *
 * @module
 */

import {
  lstatSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { core } from "../../ffi/core.ts";
import { check, Vhost2Error } from "../../ffi/errors.ts";
import { inflightBytes } from "../../ffi/inflight_region.ts";
import type { InflightDescription } from "../../protocol/payloads.ts";
import type { VduseDescription } from "./kernel.ts";

const encoder = new TextEncoder();
/** "vhost2vd", and the version of what follows. */
const magic = 0x6476_3274_736f_6876n;
const version = 1;
const headerSize = 4096;
const Header = {
  magic: 0,
  version: 8,
  deviceId: 12,
  features: 16,
  queueCount: 24,
  queueSize: 28,
  run: 32,
} as const;

/** The driver's rings: none, or of which format. */
export type Run = "none" | "split" | "packed";
const runs: readonly Run[] = ["none", "split", "packed"];

/** The folder for what is kept while the machine runs; made where needed. */
export function runtimeFolder(): string {
  const { RUNTIME_DIRECTORY, XDG_RUNTIME_DIR } = process.env;
  const user = process.getuid?.() ?? 0;
  const candidates = [
    // systemd gives it to a service; several are separated by colons.
    RUNTIME_DIRECTORY?.split(":")[0],
    "/run/vhost2",
    XDG_RUNTIME_DIR && join(XDG_RUNTIME_DIR, "vhost2"),
    join(tmpdir(), `vhost2-${user}`),
  ];
  for (const folder of candidates) {
    if (folder && isOurs(folder, user)) return folder;
  }
  throw new Vhost2Error(
    "SYSTEM",
    "Cannot find a runtime directory of this user alone: set RUNTIME_DIRECTORY or XDG_RUNTIME_DIR",
  );
}

/** Nobody else can put anything there: no links to follow, no files to trust. */
function isOurs(folder: string, user: number): boolean {
  try {
    mkdirSync(folder, { recursive: true, mode: 0o700 });
    const { mode, uid } = lstatSync(folder);
    return (mode & 0o170000) === 0o040000 && uid === user &&
      (mode & 0o022) === 0;
  } catch {
    return false;
  }
}

export class RecoveryLog {
  readonly path: string;

  constructor(folder: string, name: string) {
    this.path = join(folder, `${name}.vduse`);
  }

  /** What it says of this very device; null when it says nothing of it. */
  read(description: VduseDescription): Run | null {
    let bytes: Uint8Array;
    try {
      bytes = readFileSync(this.path);
    } catch {
      return null;
    }
    if (bytes.length < headerSize) return null;
    const found = new DataView(bytes.buffer, bytes.byteOffset, headerSize);
    const expected = header(description, "none");
    for (let at = 0; at < Header.run; at += 4) {
      if (found.getUint32(at) !== expected.getUint32(at)) return null;
    }
    return runs[found.getUint32(Header.run, true)] ?? null;
  }

  /** A new file: of this device, with nothing in flight. */
  begin(description: VduseDescription, run: Run): void {
    const { mmapSize } = region(description, run === "packed");
    const bytes = new Uint8Array(headerSize + Number(mmapSize));
    bytes.set(new Uint8Array(header(description, run).buffer));
    const written = `${this.path}.new`;
    rmSync(written, { force: true });
    writeFileSync(written, bytes, { mode: 0o600, flag: "wx" });
    renameSync(written, this.path);
  }

  /** The inflight region: what it is, and its file, the caller's. */
  open(
    description: VduseDescription,
    run: Run,
  ): { region: InflightDescription; fd: number } {
    const path = encoder.encode(this.path);
    const writable = 1;
    const fd = check(
      core.fileOpen(path, path.length, writable),
      `Cannot open ${this.path}`,
    );
    return { region: region(description, run === "packed"), fd };
  }

  remove(): void {
    rmSync(this.path, { force: true });
  }
}

function region(
  { queueCount, queueSize }: VduseDescription,
  isPacked: boolean,
): InflightDescription {
  return {
    mmapSize: BigInt(inflightBytes(queueCount, queueSize, isPacked)),
    mmapOffset: BigInt(headerSize),
    numQueues: queueCount,
    queueSize,
  };
}

function header(description: VduseDescription, run: Run): DataView {
  const view = new DataView(new ArrayBuffer(headerSize));
  view.setBigUint64(Header.magic, magic, true);
  view.setUint32(Header.version, version, true);
  view.setUint32(Header.deviceId, description.deviceId, true);
  view.setBigUint64(Header.features, description.features, true);
  view.setUint32(Header.queueCount, description.queueCount, true);
  view.setUint32(Header.queueSize, description.queueSize, true);
  view.setUint32(Header.run, runs.indexOf(run), true);
  return view;
}
