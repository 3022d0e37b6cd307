/** Guest memory: messages 5, 36, 37, 38. */

import { constants } from "../../ffi/abi.gen.ts";
import type { RegionDescription } from "../../ffi/guest_memory.ts";
import { uva } from "../../protocol/address.ts";
import type { MemoryRegionDescription } from "../../protocol/memory_payloads.ts";
import type { Message } from "../../transports/transport.ts";
import type { Session } from "../session.ts";

function describe(
  session: Session,
  message: Message,
  regions: readonly MemoryRegionDescription[],
): RegionDescription[] {
  return regions.map((region, index) => ({
    ...region,
    source: session.connection.regionSource(message, index),
  }));
}

/**
 * Changes the table. A change that only adds keeps every mapping and stops
 * nothing; otherwise no queue runs while regions go away, and `deviceInit` is
 * called again before the next start.
 */
async function change(
  session: Session,
  kind: "replace" | "add" | "remove",
  regions: RegionDescription[],
): Promise<void> {
  const prepared = session.memory.prepare(kind, regions);
  if (prepared.removed > 0) {
    await session.queues.stopAll();
    session.queues.isInitOwed = true;
  }
  session.memory.commit();
  for (const vring of session.vrings) vring.forgetFailure();
  session.translations.memoryChanged();
}

export async function setMemoryTable(
  session: Session,
  regions: readonly MemoryRegionDescription[],
  message: Message,
): Promise<readonly MemoryRegionDescription[] | void> {
  const { postcopy } = session;
  if (postcopy.isAckDue) return postcopy.acknowledge(message.payload);
  // No fault may come before the front-end knows where the regions are.
  if (postcopy.repliesWithBases) await session.queues.stopAll();
  await change(session, "replace", describe(session, message, regions));
  session.repeatedRegions.clear();
  if (!postcopy.repliesWithBases) return;
  postcopy.awaitAck();
  const bases = new Map(
    session.memory.regions.map(({ gpa, address }) => [gpa, address]),
  );
  return regions.map((r) => ({ ...r, uva: uva(bases.get(r.gpa)!) }));
}

/** A region that comes again: which one. */
function keyOf({ gpa, uva, size }: MemoryRegionDescription): string {
  return `${gpa} ${uva} ${size}`;
}

/**
 * QEMU's vhost-user-net has a memory listener for each queue pair, and before
 * 8.0 each adds, and later removes, every region.
 */
export async function addRegion(
  session: Session,
  region: MemoryRegionDescription,
  message: Message,
): Promise<void> {
  const isThere = session.memory.regions.some(({ gpa, uva, size }) =>
    gpa === region.gpa && uva === region.uva && BigInt(size) === region.size
  );
  if (isThere) {
    const key = keyOf(region);
    const times = session.repeatedRegions.get(key) ?? 0;
    session.repeatedRegions.set(key, times + 1);
    return;
  }
  await change(session, "add", describe(session, message, [region]));
}

export async function removeRegion(
  session: Session,
  region: MemoryRegionDescription,
): Promise<void> {
  const key = keyOf(region);
  const times = session.repeatedRegions.get(key) ?? 0;
  if (times > 1) session.repeatedRegions.set(key, times - 1);
  else session.repeatedRegions.delete(key);
  if (times > 0) return;
  await change(session, "remove", [{ ...region, source: { fd: -1 } }]);
}

export function getMaxMemorySlots(): bigint {
  return BigInt(constants.maxRegions);
}
