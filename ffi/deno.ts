/**
 * The binder for Deno: its own FFI.
 *
 * @module
 */

import { type Binding, type Core, declarations } from "./binding.ts";
import {
  descriptorFolder,
  F_GETFL,
  isMadeHere,
  LOCK_EX,
  lockPath,
  memfdLink,
  memfdName,
  MFD_CLOEXEC,
  O_CLOEXEC,
  O_RDONLY,
} from "./memfd.ts";

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

/** Of the few functions that loading needs: glibc's, as Deno is built for it. */
function openLibc() {
  return Deno.dlopen("libc.so.6", {
    memfd_create: { parameters: ["buffer", "u32"], result: "i32" },
    write: { parameters: ["i32", "buffer", "usize"], result: "isize" },
    open: { parameters: ["buffer", "i32"], result: "i32" },
    flock: { parameters: ["i32", "i32"], result: "i32" },
    close: { parameters: ["i32"], result: "i32" },
    fcntl: { parameters: ["i32", "i32"], result: "i32" },
    opendir: { parameters: ["buffer"], result: "pointer" },
    readdir: { parameters: ["pointer"], result: "pointer" },
    closedir: { parameters: ["pointer"], result: "i32" },
    readlink: { parameters: ["buffer", "buffer", "usize"], result: "isize" },
  }).symbols;
}

type Libc = ReturnType<typeof openLibc>;

/** `struct dirent` on every 64-bit Linux. */
const nameOffset = 19;

function cString(text: string): Uint8Array<ArrayBuffer> {
  return new TextEncoder().encode(`${text}\0`);
}

/** An open descriptor of this process that is the memfd `name`, or -1. */
function findMemfd(libc: Libc, name: string): number {
  const folder = libc.opendir(cString(descriptorFolder));
  if (folder === null) return -1;
  const wanted = memfdLink(name);
  const target = new Uint8Array(wanted.length + 1);
  let found = -1;
  for (;;) {
    const entry = libc.readdir(folder);
    if (entry === null) break;
    const number = Deno.UnsafePointerView.getCString(entry, nameOffset);
    const length = Number(
      libc.readlink(
        cString(`${descriptorFolder}/${number}`),
        target,
        BigInt(target.length),
      ),
    );
    if (
      length === wanted.length &&
      new TextDecoder().decode(target.subarray(0, length)) === wanted
    ) {
      if (!isMadeHere(libc.fcntl(Number(number), F_GETFL))) continue;
      found = Number(number);
      break;
    }
  }
  libc.closedir(folder);
  return found;
}

function makeMemfd(libc: Libc, name: string, bytes: Uint8Array): number {
  const fd = libc.memfd_create(cString(name), MFD_CLOEXEC);
  let done = 0;
  while (fd >= 0 && done < bytes.length) {
    const rest = bytes.subarray(done) as Uint8Array<ArrayBuffer>;
    const written = Number(libc.write(fd, rest, BigInt(rest.length)));
    if (written <= 0) {
      libc.close(fd);
      return -1;
    }
    done += written;
  }
  return fd;
}

// Through the C library and not through Deno's own files: those would need
// permissions to read.
function createMemfd(bytes: Uint8Array): number {
  const libc = openLibc();
  const name = memfdName(bytes);
  const lock = libc.open(cString(lockPath), O_RDONLY | O_CLOEXEC);
  libc.flock(lock, LOCK_EX);
  try {
    const existing = findMemfd(libc, name);
    return existing >= 0 ? existing : makeMemfd(libc, name, bytes);
  } finally {
    libc.close(lock);
  }
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
