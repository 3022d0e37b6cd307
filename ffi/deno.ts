/**
 * The binder for Deno: its own FFI.
 *
 * @module
 */

import { type Binding, type Core, declarations } from "./binding.ts";

function bind(path: string): Core {
  const symbols: Record<string, Deno.ForeignFunction> = {};
  for (const [, declaration] of declarations()) {
    symbols[declaration.symbol] = {
      parameters: [...declaration.parameters],
      result: declaration.result as Deno.NativeResultType,
    };
  }
  const library = Deno.dlopen(path, symbols);
  return Object.fromEntries(
    declarations().map(([name, { symbol }]) => [name, library.symbols[symbol]]),
  ) as unknown as Core;
}

/** glibc's and musl's own name; the process has it loaded already. */
const libraryNames = ["libc.so.6", "libc.so"];

function createMemfd(bytes: Uint8Array): number {
  let failure: unknown;
  for (const name of libraryNames) {
    try {
      const libc = Deno.dlopen(name, {
        memfd_create: { parameters: ["buffer", "u32"], result: "i32" },
        write: { parameters: ["i32", "buffer", "usize"], result: "isize" },
      });
      const MFD_CLOEXEC = 1;
      const fd = libc.symbols.memfd_create(
        new TextEncoder().encode("vhost2\0"),
        MFD_CLOEXEC,
      );
      let done = 0;
      while (fd >= 0 && done < bytes.length) {
        const rest = bytes.subarray(done) as Uint8Array<ArrayBuffer>;
        const written = Number(
          libc.symbols.write(fd, rest, BigInt(rest.length)),
        );
        if (written <= 0) return -1;
        done += written;
      }
      return fd;
    } catch (error) {
      failure = error;
    }
  }
  throw failure;
}

function view(address: bigint, size: number): ArrayBuffer {
  const pointer = Deno.UnsafePointer.create(address);
  if (pointer === null) return new ArrayBuffer(0);
  return Deno.UnsafePointerView.getArrayBuffer(pointer, size);
}

/** What the core calls through in Deno. */
export const binding: Binding = {
  runtime: "deno",
  bind,
  createMemfd,
  view,
  maxViewSize: 2 ** 43,
  architecture: Deno.build.arch,
};
