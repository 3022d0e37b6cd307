/** A device whose writes are logged, and a guest with rings of either format. */

import assert from "node:assert/strict";
import {
  type DirtyLog,
  logPageSize,
  type QueueDriver,
  VhostUserDevice,
  type VhostUserDeviceOptions,
} from "../../frontend/mod.ts";
import { virtqueueProtocolFeatures } from "../../mod.ts";
import { type Served, type ServeOptions, serving } from "./served.ts";

/** A guest with rings of either format. */
export type Guest = VhostUserDevice<QueueDriver>;

/** The two formats of a ring. */
export const formats = [
  { name: "split", packed: false },
  { name: "packed", packed: true },
] as const;

/** Bytes of the guest's memory. */
export const ramSize = 4 << 20;

export interface LoggedOptions extends ServeOptions {
  readonly packed?: boolean;
  readonly guest?: VhostUserDeviceOptions;
}

/** A device on `virtqueue/`, and a guest on it with its queues started. */
export function withLogged(
  options: LoggedOptions,
  body: (guest: Guest, served: Served) => Promise<void>,
): Promise<void> {
  return serving({
    queueCount: 1,
    protocolFeatures: virtqueueProtocolFeatures,
    ...options,
  }, async (served) => {
    const guest = await VhostUserDevice.open({
      path: served.path,
      queueSize: 16,
      ramSize,
      ...options.guest,
      packed: options.packed ?? false,
    });
    try {
      await body(guest, served);
    } finally {
      guest.connection.close();
      await guest.close();
    }
  });
}

/** The pages of [address, address + length). */
export function pagesOf(address: bigint, length: number): bigint[] {
  const size = BigInt(logPageSize);
  const pages: bigint[] = [];
  for (
    let page = address / size * size;
    page < address + BigInt(length);
    page += size
  ) pages.push(page);
  return pages;
}

/** Exactly these pages are marked; they are taken. */
export function assertPages(
  log: DirtyLog,
  expected: readonly bigint[],
  what = "pages marked",
): void {
  const sorted = [...new Set(expected)].sort((a, b) => Number(a - b));
  assert.deepEqual(log.take().map(hex), sorted.map(hex), what);
}

function hex(page: bigint): string {
  return `0x${page.toString(16)}`;
}

/** Pages of guest memory that nobody else uses. */
export function allocatePages(guest: Guest, count: number): bigint {
  return guest.ram.allocate(count * logPageSize, logPageSize);
}

/** Has a number of writable pages at an address answered. */
export function ask(
  guest: Guest,
  address: bigint,
  count = 1,
  options: { indirect?: boolean; queue?: number } = {},
): Promise<number> {
  const size = BigInt(logPageSize);
  const buffers = Array.from({ length: count }, (_, i) => ({
    address: address + BigInt(i) * size,
    length: logPageSize,
    isWritable: true,
  }));
  return guest.queues[options.queue ?? 0].submitChain(buffers, options);
}
