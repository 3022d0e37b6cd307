/** Crash recovery: messages 31 and 32. */

import type { InflightDescription } from "../../protocol/payloads.ts";
import type { Message } from "../../transports/transport.ts";
import { ReplyWithDescriptors } from "../reply.ts";
import type { Session } from "../session.ts";

/** A new region each time: the front-end asks when the machine was reset. */
export async function getInflightFd(
  session: Session,
  wanted: InflightDescription,
): Promise<ReplyWithDescriptors<InflightDescription>> {
  await session.queues.stopAll();
  const { description, fd } = session.inflight.make(wanted);
  return new ReplyWithDescriptors(description, [fd]);
}

/**
 * The region of this back-end or of the one before, which may have crashed. A
 * refused one changes nothing.
 */
export async function setInflightFd(
  session: Session,
  description: InflightDescription,
  message: Message,
): Promise<void> {
  await session.queues.stopAll();
  session.inflight.adopt(description, message.descriptors.peek()[0]);
  for (const vring of session.vrings) vring.forgetFailure();
}
