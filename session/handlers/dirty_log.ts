/** The dirty log: messages 6 and 7. */

import { constants } from "../../ffi/abi.gen.ts";
import { core } from "../../ffi/core.ts";
import type { LogBase } from "../../protocol/payloads.ts";
import type { Message } from "../../transports/transport.ts";
import { Refusal } from "../refusal.ts";
import type { Session } from "../session.ts";

/** The reply is sent when nobody uses the log before any more. */
export function setLogBase(
  session: Session,
  payload: LogBase,
  message: Message,
): bigint {
  if (payload.kind !== "log") {
    throw new Refusal("with LOG_SHMFD it needs size, offset and a descriptor");
  }
  const [fd] = message.descriptors.peek();
  session.memory.log.setBase(fd, payload.mmapSize, payload.mmapOffset);
  return 0n;
}

/** As the kernel's vhost has it: signalled whenever the log has changed. */
export function setLogFd(
  session: Session,
  _payload: null,
  message: Message,
): void {
  const [fd] = message.descriptors.peek();
  if (core.descriptorKind(fd) !== constants.kindEventfd) {
    throw new Refusal(`descriptor ${fd} is not an eventfd`);
  }
  session.memory.log.setEvent(message.descriptors.take()!);
}
