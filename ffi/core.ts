/**
 * Loads the core, once per isolate, and hands it out.
 *
 * From a checkout the library is the file that the build left; from a URL or
 * a package it is a generated module, loaded through a memfd, so that nothing
 * but `--allow-ffi` is needed. One core per process: the memfd stays open and
 * Workers find it (memfd.ts), because the same bytes under another number
 * would be a second core with its own state.
 *
 * @module
 */

import { abiHash } from "./abi.gen.ts";
import type { Binding, Core } from "./binding.ts";
import { check, Vhost2Error } from "./errors.ts";

const isDeno = "Deno" in globalThis;

const runtime: Binding = isDeno
  ? (await import("./deno.ts")).binding
  : (await import("./node.ts")).binding;

async function embedded(architecture: string): Promise<string> {
  // Literal, so that a lock file covers both and no permission is asked.
  switch (architecture) {
    case "x86_64":
      return (await import("./embedded/x86_64.ts")).default;
    case "aarch64":
      return (await import("./embedded/aarch64.ts")).default;
    default:
      throw new Vhost2Error(
        "CORE",
        `Cannot run on this processor: ${architecture} (x86_64 and aarch64 are built)`,
      );
  }
}

function decodeBase64(text: string): Uint8Array {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

/** The embedded library's path, the same for all isolates of the process. */
async function embeddedPath(): Promise<string> {
  const fd = runtime.createMemfd(
    decodeBase64(await embedded(runtime.architecture)),
  );
  if (fd < 0) {
    throw new Vhost2Error(
      "CORE",
      "Cannot load the core: no memfd could be made for it",
    );
  }
  return `/proc/self/fd/${fd}`;
}

async function load(): Promise<Core> {
  const file = fileBeside();
  if (file !== null) {
    try {
      return runtime.bind(file);
    } catch {
      // Not built here, or not for this machine: the embedded one remains.
    }
  }
  try {
    return runtime.bind(await embeddedPath());
  } catch (error) {
    if (error instanceof Vhost2Error) throw error;
    const { message } = error as Error;
    throw new Vhost2Error("CORE", `Cannot load the core: ${message}`, {
      cause: error,
    });
  }
}

function fileBeside(): string | null {
  const url = new URL(
    `../zig-out/lib/libvhost2-${runtime.architecture}.so`,
    import.meta.url,
  );
  return url.protocol === "file:" ? decodeURIComponent(url.pathname) : null;
}

function verify(core: Core): Core {
  const hash = core.coreHash();
  if (hash !== abiHash) {
    throw new Vhost2Error(
      "CORE",
      `Cannot use the core: it is of another build (hash ${hash}, expected ${abiHash}); run "deno task build"`,
    );
  }
  check(core.coreInit(), "Cannot prepare the process for the core");
  return core;
}

/** The native core. Its functions return 0 or more, or a negative errno. */
export const core: Core = verify(await load());

/** What the runtime offers beside the core: views over native memory. */
export const binding: Binding = runtime;
