/**
 * This project and Deno with its libraries, as files for a guest's initramfs:
 * `deno` is on its path, the project in /project. QEMU too, where a guest is to
 * have a guest.
 */

import { execFileSync } from "node:child_process";
import { existsSync, readdirSync, readFileSync, realpathSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { projectFolder } from "./cache.ts";

/** What of the project the guest needs. */
const sources = [
  ...["cli", "devices", "driver", "ffi", "frontend", "pci", "protocol"],
  ...["session", "transports", "virtqueue"],
];
const single = ["deno.json", "mod.ts", "zig-out/lib/libvhost2-x86_64.so"];

export type GuestFiles = Map<string, { bytes: Uint8Array; mode?: number }>;

/** @param programs of the tests, by their path in the project */
export function projectFiles(programs: readonly string[] = []): GuestFiles {
  const project = projectFolder();
  const files: GuestFiles = new Map();
  const deno = realpathSync(join(project, "node_modules/deno/deno"));
  addProgram(files, "bin/deno", deno);
  for (const folder of sources) {
    const names = readdirSync(join(project, folder), {
      recursive: true,
      encoding: "utf8",
    });
    for (const name of names) {
      if (!name.endsWith(".ts") || name.startsWith("embedded")) continue;
      addFile(files, project, join(folder, name));
    }
  }
  for (const name of [...single, ...programs]) addFile(files, project, name);
  return files;
}

/** With the libraries that it is linked with. */
export function addProgram(files: GuestFiles, to: string, from: string): void {
  files.set(to, { bytes: readFileSync(from), mode: 0o755 });
  const libraries = execFileSync("ldd", [from], { encoding: "utf8" });
  for (const [path] of libraries.matchAll(/\/\S+/g)) {
    files.set(path.slice(1), { bytes: readFileSync(path), mode: 0o755 });
  }
}

/** Where QEMU looks for what is not in the program. */
const qemuModules = "/usr/lib/x86_64-linux-gnu/qemu";
const qemuFirmware = [
  "/usr/share/seabios/bios-256k.bin",
  "/usr/share/qemu/kvmvapic.bin",
  "/usr/share/qemu/linuxboot_dma.bin",
];

/** QEMU as the host has it, for a guest without a display. */
export function qemuFiles(): GuestFiles {
  const files: GuestFiles = new Map();
  const name = "qemu-system-x86_64";
  const folder = process.env.PATH!.split(":").find((folder) =>
    existsSync(join(folder, name))
  )!;
  // There, so that it finds the rest.
  addProgram(files, `usr/bin/${name}`, join(folder, name));
  const emulation = join(qemuModules, "accel-tcg-x86_64.so");
  if (existsSync(emulation)) addProgram(files, emulation.slice(1), emulation);
  for (const path of qemuFirmware) {
    files.set(path.slice(1), { bytes: readFileSync(path) });
  }
  return files;
}

function addFile(files: GuestFiles, project: string, name: string): void {
  files.set(`project/${name}`, { bytes: readFileSync(join(project, name)) });
}
