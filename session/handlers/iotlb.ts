/** The IOMMU: message 22. */

import type { IotlbMessage } from "../../protocol/payloads.ts";
import type { Session } from "../session.ts";

/** Answers 0, or 1 where it was refused. */
export function iotlb(session: Session, message: IotlbMessage): bigint {
  return session.translations.take(message);
}
