/** Ownership, reset, status, the back-end's channel: messages 3, 4, 21, 34, 39, 40. */

import type { Message } from "../../transports/transport.ts";
import { Refusal } from "../refusal.ts";
import type { Session } from "../session.ts";
import { tracedChannel } from "../traced_channel.ts";

/** The connection is the ownership. */
export function setOwner(): void {}

/** Deprecated: "ignore it, or disable all rings"; connection state stays. */
export function resetOwner(): void {}

export function setBackendChannel(
  session: Session,
  _payload: null,
  message: Message,
): void {
  const channel = session.connection.openBackendChannel(message.descriptors);
  session.backendChannel?.close();
  const { trace } = session.options;
  session.backendChannel = trace === undefined
    ? channel
    : tracedChannel(channel, trace);
}

/** Connection, memory, features and protocol features stay. */
export async function resetDevice(session: Session): Promise<void> {
  await session.queues.stopAll();
  for (const vring of session.vrings) vring.reset();
  session.memory.log.drop();
  // What is tracked there belongs to the driver before the reset.
  session.inflight.forget();
  session.forgetTranslations();
  session.sharedMemory.forget();
  session.status = 0;
}

/** Status 0 is the driver's reset: every ring must be set up again. */
export async function setStatus(
  session: Session,
  status: bigint,
): Promise<void> {
  if (status > 0xffn) throw new Refusal(`status ${status} does not fit 8 bits`);
  if (status === 0n) {
    await session.queues.stopAll();
    for (const vring of session.vrings) vring.forgetSetup();
    session.forgetTranslations();
    session.sharedMemory.forget();
  }
  session.status = Number(status);
}

export function getStatus(session: Session): bigint {
  return BigInt(session.status);
}
