/** Configuration space: messages 24 and 25. */

import { ConfigFlag, type ConfigPayload } from "../../protocol/payloads.ts";
import { MAX_CONFIG_SIZE } from "../../protocol/message.ts";
import { Refusal } from "../refusal.ts";
import type { Session } from "../session.ts";

/** What lies behind the device's own space reads as zeros. */
export function getConfig(
  session: Session,
  { offset, flags, data }: ConfigPayload,
): ConfigPayload {
  const { ops, device } = session;
  if (ops.getConfig === undefined) throw new Refusal("the device has none");
  if (offset + data.length > MAX_CONFIG_SIZE) {
    throw new Refusal(
      `${data.length} bytes at ${offset} pass the limit of ${MAX_CONFIG_SIZE}`,
    );
  }
  const config = ops.getConfig(device);
  const answer = new Uint8Array(data.length);
  answer.set(config.subarray(offset, offset + data.length));
  return { offset, flags, data: answer };
}

export function setConfig(
  session: Session,
  { offset, flags, data }: ConfigPayload,
): void {
  const { ops, device } = session;
  if (ops.setConfig === undefined) {
    throw new Refusal("the device's configuration space is read-only");
  }
  if (flags !== ConfigFlag.WRITABLE && flags !== ConfigFlag.MIGRATION) {
    throw new Refusal(`flags ${flags} are not known`);
  }
  const size = ops.getConfig?.(device).length ?? MAX_CONFIG_SIZE;
  if (offset + data.length > size) {
    throw new Refusal(
      `${data.length} bytes at ${offset} pass its end at ${size}`,
    );
  }
  const reason = flags === ConfigFlag.MIGRATION ? "migration" : "frontend";
  ops.setConfig(device, offset, data, reason);
}
