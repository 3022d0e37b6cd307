// A program: loads the core ("here", or in a Worker that ends: "worker"), then
// touches memory of somebody else's whose file has shrunk. It must end as if
// there was no core, by SIGBUS.
// deno-lint-ignore-file no-explicit-any

import process from "node:process";
import { Worker } from "node:worker_threads";

const extension = import.meta.url.slice(import.meta.url.lastIndexOf("."));
const coreUrl = new URL(`../../ffi/core${extension}`, import.meta.url);

/** Loads the core in a Worker, and awaits the end of it. */
async function loadInWorker(): Promise<void> {
  const source = `await import(${JSON.stringify(coreUrl.href)});`;
  const url = `data:text/javascript,${encodeURIComponent(source)}`;
  const worker = new Worker(new URL(url));
  await new Promise((resolve, reject) => {
    worker.once("error", reject);
    worker.once("exit", resolve);
  });
}

/** The C library's functions that make a mapping, and one that reads it. */
async function library() {
  const deno = (globalThis as any).Deno;
  if (deno !== undefined) {
    return deno.dlopen("libc.so.6", {
      memfd_create: { parameters: ["buffer", "u32"], result: "i32" },
      ftruncate: { parameters: ["i32", "i64"], result: "i32" },
      mmap: {
        parameters: ["usize", "usize", "i32", "i32", "i32", "i64"],
        result: "usize",
      },
      strlen: { parameters: ["usize"], result: "usize" },
    }).symbols;
  }
  const koffi = (await import("koffi")).default;
  const libc = koffi.load("libc.so.6");
  return {
    memfd_create: libc.func("int memfd_create(void *, uint32_t)"),
    ftruncate: libc.func("int ftruncate(int, int64_t)"),
    mmap: libc.func(
      "uintptr_t mmap(uintptr_t, size_t, int, int, int, int64_t)",
    ),
    strlen: libc.func("size_t strlen(uintptr_t)"),
  };
}

if (process.argv[2] === "worker") await loadInWorker();
else await import(coreUrl.href);
const libc = await library();
const fd = libc.memfd_create(Uint8Array.of(120, 0), 0);
libc.ftruncate(fd, 4096n);
const readable = 1;
const shared = 1;
const address = libc.mmap(0n, 4096n, readable, shared, fd, 0n);
libc.ftruncate(fd, 0n);
process.stdout.write("touching\n");
libc.strlen(address);
process.stdout.write("survived\n");
