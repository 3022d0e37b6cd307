/**
 * The core's functions as TypeScript sees them, derived from the generated
 * ABI, and what a runtime must offer to bind them.
 *
 * @module
 */

import { functions } from "./abi.gen.ts";

/** How one parameter or result crosses the boundary. */
export type Width = "u32" | "i32" | "f64" | "u64" | "i64" | "buffer";

type Value<W> = W extends "u64" | "i64" ? bigint
  : W extends "buffer" ? ArrayBufferView | ArrayBuffer | null
  : number;

type Parameters<P extends readonly Width[]> = {
  -readonly [I in keyof P]: Value<P[I]>;
};

/** The core: every export by its name, with plain numbers, bigints, buffers. */
export type Core = {
  readonly [N in keyof typeof functions]: (
    ...parameters: Parameters<(typeof functions)[N]["parameters"]>
  ) => Value<(typeof functions)[N]["result"]>;
};

/** One export as the binders see it. */
export interface Declaration {
  readonly symbol: string;
  readonly parameters: readonly Width[];
  readonly result: Width;
}

/** What a runtime offers. */
export interface Binding {
  /** "deno" or "node". */
  readonly runtime: "deno" | "node";
  /** Opens the shared library at `path` and binds all functions. */
  bind(path: string): Core;
  /** `memfd_create` of the host process: returns a descriptor. */
  createMemfd(bytes: Uint8Array): number;
  /** A zero-copy buffer over memory that is not the runtime's. */
  view(address: bigint, size: number): ArrayBuffer;
  /** Largest buffer that `view` can make, in bytes. */
  readonly maxViewSize: number;
  /** "x86_64", "aarch64", or the runtime's own name for another one. */
  readonly architecture: string;
}

/** The table of exports with its widths as plain data. */
export function declarations(): [keyof Core, Declaration][] {
  return Object.entries(functions) as unknown as [keyof Core, Declaration][];
}
