/** Postcopy migration: messages 28, 29 and 30. */

import { Refusal } from "../refusal.ts";
import { ReplyWithDescriptors } from "../reply.ts";
import type { Session } from "../session.ts";

export function advise(session: Session): ReplyWithDescriptors<null> {
  return new ReplyWithDescriptors(null, [session.postcopy.advise()]);
}

export function listen(session: Session): void {
  const { hangupFd } = session.connection;
  if (hangupFd === null) throw new Refusal("this transport has no socket");
  session.postcopy.listen(hangupFd);
}

/** "The reply is an acknowledgement only." */
export function end(session: Session): bigint {
  session.postcopy.end(false);
  return 0n;
}
