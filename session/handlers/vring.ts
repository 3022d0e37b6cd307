/** The vrings: messages 8-14, 18, 35 and 45. */

import { hasFeature, ProtocolFeature } from "../../protocol/features.ts";
import { VRING_FLAG_LOG } from "../../protocol/payloads.ts";
import type {
  VringAddress,
  VringDescriptorIndex,
  VringState,
} from "../../protocol/payloads.ts";
import type { Message } from "../../transports/transport.ts";
import { Refusal } from "../refusal.ts";
import { ringAreaSizes } from "../ring_areas.ts";
import type { Session } from "../session.ts";

const maxQueueSize = 32768;

export async function setNum(
  session: Session,
  { index, num }: VringState,
): Promise<void> {
  if (num === 0 || num > maxQueueSize) {
    throw new Refusal(`queue size ${num} is not from 1 to ${maxQueueSize}`);
  }
  if (!session.isPacked && (num & (num - 1)) !== 0) {
    throw new Refusal(
      `queue size ${num} is not a power of two from 1 to ${maxQueueSize}`,
    );
  }
  const vring = session.vrings[index];
  await session.queues.stop(vring);
  vring.size = num;
  vring.forgetFailure();
}

/** Alignment in bytes of each area (virtio 1.3, sections 2.7 and 2.8). */
const splitAlignments = { descriptor: 16n, available: 2n, used: 4n } as const;
const packedAlignments = { descriptor: 16n, available: 4n, used: 4n } as const;

export async function setAddress(
  session: Session,
  address: VringAddress,
): Promise<void> {
  const vring = session.vrings[address.index];
  const alignments = session.isPacked ? packedAlignments : splitAlignments;
  for (const name of ["descriptor", "available", "used"] as const) {
    if (address[name] % alignments[name] !== 0n) {
      throw new Refusal(
        `${name} area at 0x${address[name].toString(16)} is not aligned to ${
          alignments[name]
        } bytes`,
      );
    }
    // Before there is memory nothing can be said, nor of IOVAs, which need not
    // be mapped yet; the start checks again.
    const space = session.ringSpace;
    if (space === "iova") continue;
    if (session.memory.regions.length === 0 || vring.size === 0) continue;
    const size = ringAreaSizes(vring.size, session.isPacked)[name];
    if (session.memory.whole(space, address[name], size) === null) {
      throw new Refusal(
        `${name} area at 0x${
          address[name].toString(16)
        } (${size} bytes) is not inside one memory region`,
      );
    }
  }
  const old = vring.addresses;
  const isSameRing = old !== null && old.descriptor === address.descriptor &&
    old.available === address.available && old.used === address.used;
  const isLogChange = isSameRing &&
    ((old.flags ^ address.flags) & ~VRING_FLAG_LOG) === 0;
  // Migration resends the address of a running ring with the log flag set.
  if (!isLogChange) await session.queues.stop(vring);
  vring.addresses = address;
  session.memory.log.setRing(
    vring.index,
    (address.flags & VRING_FLAG_LOG) !== 0 ? address.log : null,
  );
  vring.queue?.onChanged?.();
  vring.forgetFailure();
}

/**
 * DPDK's virtio_user sends of a packed base the half for what is available,
 * without the half for what is used: 0x8000. Read as it stands that is a ring
 * with more in flight than it holds, or, at position 0, with all of it.
 */
function completeBase(num: number): number {
  return num <= 0xffff && (num & 0x8000) !== 0 ? num * 0x1_0001 : num;
}

export async function setBase(
  session: Session,
  { index, num: given }: VringState,
): Promise<void> {
  const vring = session.vrings[index];
  const num = session.isPacked ? completeBase(given) : given;
  if (!session.isPacked) {
    if (num > 0xffff) throw new Refusal(`base ${num} does not fit 16 bits`);
  } else if (
    vring.size > 0 &&
    ((num & 0x7fff) >= vring.size || ((num >>> 16) & 0x7fff) >= vring.size)
  ) {
    throw new Refusal(
      `base 0x${num.toString(16)} is outside a ring of ${vring.size}`,
    );
  }
  await session.queues.stop(vring);
  vring.base = num;
  if (vring.stoppedAt !== null) vring.isAnew = num !== vring.stoppedAt;
  if (vring.isAnew) vring.hasLeftInFlight = false;
  vring.forgetFailure();
}

/**
 * Stops the ring; the answer is where it stopped, the same if asked again.
 * What is in flight completes first, unless GET_VRING_BASE_INFLIGHT lets it
 * stay in the inflight region and there is no message that says so.
 */
export function getBase(
  session: Session,
  state: VringState,
): Promise<VringState> {
  const features = session.ackedProtocolFeatures;
  return stopAt(
    session,
    state,
    hasFeature(features, ProtocolFeature.GET_VRING_BASE_INFLIGHT) &&
      !hasFeature(features, ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN),
  );
}

/** The same at once: what is in flight stays in the inflight region. */
export function getBaseSkipDrain(
  session: Session,
  state: VringState,
): Promise<VringState> {
  return stopAt(session, state, true);
}

async function stopAt(
  session: Session,
  { index }: VringState,
  leavesInFlight: boolean,
): Promise<VringState> {
  const vring = session.vrings[index];
  if (leavesInFlight) await session.queues.stop(vring, true);
  else await session.queues.drain(vring);
  vring.forgetSetup();
  session.forgetTranslations();
  return { index, num: vring.base ?? session.firstBase };
}

export async function setKick(
  session: Session,
  { index, hasDescriptor }: VringDescriptorIndex,
  message: Message,
): Promise<void> {
  const vring = session.vrings[index];
  const source = hasDescriptor
    ? session.connection.openKick(
      index,
      message.descriptors,
      session.options.isServedElsewhere
        ? null
        : () => session.queues.kick(vring),
    )
    : null;
  try {
    await session.queues.stop(vring);
  } finally {
    vring.setKick(
      source === null ? { kind: "polled" } : { kind: "event", source },
    );
  }
  vring.forgetFailure();
}

/**
 * INBAND_NOTIFICATIONS: kicks the ring, and starts it where no SET_VRING_KICK
 * came, which is then not polled either.
 */
export function kick(session: Session, { index, num }: VringState): void {
  if (num !== 0) throw new Refusal(`num ${num} is reserved and must be 0`);
  const vring = session.vrings[index];
  if (vring.kick.kind === "none") vring.setKick({ kind: "inBand" });
  else session.queues.kick(vring);
}

export function setCall(
  session: Session,
  { index, hasDescriptor }: VringDescriptorIndex,
  message: Message,
): void {
  const vring = session.vrings[index];
  vring.setCall(
    hasDescriptor
      ? session.connection.openCall(index, message.descriptors)
      : null,
  );
  // A call between the old descriptor and this one may have been lost.
  vring.queue?.call();
}

export function setError(
  session: Session,
  { index, hasDescriptor }: VringDescriptorIndex,
  message: Message,
): void {
  const vring = session.vrings[index];
  vring.setError(
    hasDescriptor
      ? session.connection.openError(index, message.descriptors)
      : null,
  );
}

/** Rings that were never set up may be enabled: QEMU under SeaBIOS does it. */
export async function setEnable(
  session: Session,
  { index, num }: VringState,
): Promise<void> {
  if (num > 1) throw new Refusal(`enable must be 0 or 1, not ${num}`);
  const vring = session.vrings[index];
  // QEMU disables a ring before it says how it is to be stopped.
  if (vring.runsDisabled) {
    vring.forgetFailure();
    const isChange = vring.isEnabled !== (num === 1);
    // A Worker may be in the middle of what only an enabled ring may do.
    if (isChange && session.options.isServedElsewhere) {
      await session.queues.stop(vring);
    }
    vring.isEnabled = num === 1;
    if (isChange) session.queues.kick(vring);
    return;
  }
  if (num === 0) {
    const features = session.ackedProtocolFeatures;
    const feature = ProtocolFeature.GET_VRING_BASE_INFLIGHT;
    await session.queues.stop(vring, hasFeature(features, feature));
  } else if (!vring.isEnabled) vring.forgetFailure();
  vring.isEnabled = num === 1;
}
