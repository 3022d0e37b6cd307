/**
 * The binder for Node: koffi.
 *
 * @module
 */

import { constants } from "node:buffer";
import {
  closeSync,
  openSync,
  readdirSync,
  readlinkSync,
  writeSync,
} from "node:fs";
import process from "node:process";
import {
  type Binding,
  type Core,
  declarations,
  type Width,
} from "./binding.ts";
import {
  descriptorFolder,
  F_GETFL,
  isMadeHere,
  LOCK_EX,
  lockPath,
  memfdLink,
  memfdName,
  MFD_CLOEXEC,
} from "./memfd.ts";

/** What of koffi is used here. */
interface Koffi {
  load(path: string | null): {
    // deno-lint-ignore no-explicit-any
    func(name: string, result: string, parameters: string[]): any;
  };
  view(address: bigint, size: number): ArrayBuffer;
}

// By its bare name: a literal "npm:" specifier would make Deno ask the
// registry for it although Deno never runs this module.
const koffi: Koffi = (await import("koffi")).default as unknown as Koffi;

const types: Record<Width, string> = {
  u32: "uint32_t",
  i32: "int32_t",
  f64: "double",
  u64: "uint64_t",
  i64: "int64_t",
  buffer: "void *",
};

function bind(path: string): Core {
  const library = koffi.load(path);
  return Object.fromEntries(
    declarations().map(([name, { symbol, parameters, result }]) => [
      name,
      library.func(symbol, types[result], parameters.map((w) => types[w])),
    ]),
  ) as unknown as Core;
}

/** An open descriptor of this process that is the memfd `name`, or -1. */
function findMemfd(name: string): number {
  const fcntl = koffi.load(null).func("fcntl", "int", ["int", "int"]);
  for (const number of readdirSync(descriptorFolder)) {
    try {
      const target = readlinkSync(`${descriptorFolder}/${number}`);
      const isFound = target === memfdLink(name) &&
        isMadeHere(fcntl(Number(number), F_GETFL));
      if (isFound) return Number(number);
    } catch {
      // Closed in the meantime, as the one that lists them is.
    }
  }
  return -1;
}

function makeMemfd(name: string, bytes: Uint8Array): number {
  const libc = koffi.load(null);
  const create = libc.func("memfd_create", "int", ["str", "unsigned int"]);
  const fd: number = create(name, MFD_CLOEXEC);
  if (fd < 0) return -1;
  try {
    for (let done = 0; done < bytes.length;) {
      done += writeSync(fd, bytes, done);
    }
    return fd;
  } catch {
    closeSync(fd);
    return -1;
  }
}

function createMemfd(bytes: Uint8Array): number {
  const name = memfdName(bytes);
  const flock = koffi.load(null).func("flock", "int", ["int", "int"]);
  const lock = openSync(lockPath, "r");
  flock(lock, LOCK_EX);
  try {
    const existing = findMemfd(name);
    return existing >= 0 ? existing : makeMemfd(name, bytes);
  } finally {
    closeSync(lock);
  }
}

/** What the core calls through in Node. */
export const binding: Binding = {
  runtime: "node",
  bind,
  createMemfd,
  view: (address, size) => koffi.view(address, size),
  maxViewSize: constants.MAX_LENGTH,
  architecture: ({ x64: "x86_64", arm64: "aarch64" } as Record<string, string>)[
    process.arch
  ] ?? process.arch,
};
