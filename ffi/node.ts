/**
 * The binder for Node: koffi.
 *
 * @module
 */

import { constants } from "node:buffer";
import {
  type Binding,
  type Core,
  declarations,
  type Width,
} from "./binding.ts";

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

function createMemfd(bytes: Uint8Array): number {
  const libc = koffi.load(null);
  const create = libc.func("memfd_create", "int", ["str", "unsigned int"]);
  const write = libc.func("write", "long", ["int", "void *", "size_t"]);
  const MFD_CLOEXEC = 1;
  const fd: number = create("vhost2", MFD_CLOEXEC);
  let done = 0;
  while (fd >= 0 && done < bytes.length) {
    const rest = bytes.subarray(done);
    const written: number = Number(write(fd, rest, rest.length));
    if (written <= 0) return -1;
    done += written;
  }
  return fd;
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
