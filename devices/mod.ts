/**
 * Devices, each built only on the public API.
 *
 * @module
 */

export * from "./blk/mod.ts";
export * from "./net/mod.ts";
