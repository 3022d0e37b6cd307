/** Shared objects and shared memory: messages 41 and 44. */

import type { Vhost2Error } from "../../ffi/errors.ts";
import type { ShmemConfig } from "../../protocol/payloads.ts";
import { ReplyWithDescriptors } from "../reply.ts";
import type { Session } from "../session.ts";

/** A reply without a descriptor says that there is no such object. */
export async function getSharedObject(
  session: Session,
  uuid: Uint8Array,
): Promise<ReplyWithDescriptors<null>> {
  const { ops, device, sequencer } = session;
  let fd: number | null = null;
  try {
    fd = await sequencer.call(
      "getSharedObject",
      () => ops.getSharedObject?.(device, uuid) ?? null,
    );
  } catch (error) {
    session.report(error as Vhost2Error);
  }
  return new ReplyWithDescriptors(null, fd === null ? [] : [fd]);
}

export function getSharedMemoryConfig(session: Session): ShmemConfig {
  return session.sharedMemory.config;
}
