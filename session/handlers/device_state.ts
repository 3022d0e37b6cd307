/** Transfer of the device's state: messages 42 and 43. */

import { Vhost2Error } from "../../ffi/errors.ts";
import {
  type DeviceStateTransfer,
  StateDirection,
} from "../../protocol/payloads.ts";
import type { Message } from "../../transports/transport.ts";
import type { Session } from "../session.ts";

/** No descriptor of ours comes with the reply: theirs is used. */
const noDescriptor = 0x100n;
/** Bits 7:0 of a reply that says "failed". */
const failed = 1n;
const stoppedPhase = 0;

function refusal(
  session: Session,
  { direction, phase }: DeviceStateTransfer,
): string | null {
  if (phase !== stoppedPhase) return `phase ${phase} is not 0 (stopped)`;
  if (direction !== StateDirection.SAVE && direction !== StateDirection.LOAD) {
    return `direction ${direction} is neither save (0) nor load (1)`;
  }
  if (!session.isSuspended) return "not all queues are stopped";
  return session.deviceState.isTransferring
    ? "another transfer is under way"
    : null;
}

/** A refusal is a reply, and leaves the connection as it is. */
export function setDeviceStateFd(
  session: Session,
  payload: DeviceStateTransfer,
  message: Message,
): bigint {
  const reason = refusal(session, payload);
  if (reason !== null) {
    session.report(
      new Vhost2Error(
        "PROTOCOL",
        `Cannot accept SET_DEVICE_STATE_FD of ${session.name}: ${reason}`,
      ),
    );
    return noDescriptor | failed;
  }
  const { ops, device, deviceState } = session;
  const { direction } = payload;
  deviceState.begin({
    direction: direction === StateDirection.SAVE ? "save" : "load",
    fd: message.descriptors.take()!,
  }, (transfer) => ops.transferState!(device, transfer));
  return noDescriptor;
}

/**
 * Waits for the end of the transfer: a front-end that wrote asks as soon as it
 * has closed its end, while the device may still read.
 */
export async function checkDeviceState(session: Session): Promise<bigint> {
  const { deviceState } = session;
  const isSuccess =
    await (deviceState.isTransferring
      ? Promise.race([deviceState.result, session.connectionEnded()])
      : deviceState.result);
  return isSuccess === true ? 0n : failed;
}
