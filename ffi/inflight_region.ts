/**
 * Inflight regions (vhost-user, "Inflight I/O tracking"): shared memory in
 * which a device's rings note what they have taken, so that after a crash
 * their successors resubmit exactly that. The core reads and writes them.
 *
 * @module
 */

import { core } from "./core.ts";
import { check, Errno, Vhost2Error } from "./errors.ts";
import type { GuestMemory } from "./guest_memory.ts";

/** What a region is said to be. */
export interface InflightShape {
  /** Bytes. */
  readonly mmapSize: bigint;
  /** Bytes from the start of the descriptor's file. */
  readonly mmapOffset: bigint;
  readonly numQueues: number;
  /** Descriptors per queue, at most. */
  readonly queueSize: number;
}

/**
 * Bytes of the parts of `numQueues` queues.
 *
 * @param queueSize 1 to 32768
 * @throws Vhost2Error SYSTEM for another queue size
 */
export function inflightBytes(
  numQueues: number,
  queueSize: number,
  isPacked: boolean,
): number {
  const stride = core.inflightStride(queueSize, isPacked ? 1 : 0);
  return numQueues *
    check(stride, `Cannot track queues of ${queueSize} descriptors`);
}

/** A memfd that can become neither shorter nor longer; the caller's. */
export function makeInflightFd(bytes: number): number {
  const fd = check(
    core.memfdCreate(bytes),
    `Cannot make an inflight region of ${bytes} bytes`,
  );
  const sealed = core.memfdSeal(fd);
  if (sealed < 0) {
    core.descriptorClose(fd);
    check(sealed, "Cannot seal an inflight region");
  }
  return fd;
}

/** A mapped region. */
export class InflightRegion {
  /** The core's handle, for the rings. */
  readonly handle: number;

  /**
   * Maps a region. `fd` stays the caller's. A fault in it (its file became
   * shorter) is a fault of `memory`, before whose end it has to be closed.
   *
   * @throws Vhost2Error PROTOCOL when it cannot be what it is said to be
   */
  constructor(
    memory: GuestMemory,
    fd: number,
    shape: InflightShape,
    isPacked: boolean,
  ) {
    const result = core.inflightOpen(
      memory.handle,
      fd,
      shape.mmapSize,
      shape.mmapOffset,
      shape.numQueues,
      shape.queueSize,
      isPacked ? 1 : 0,
    );
    if (result < 0) throw refusal(-result, shape, isPacked);
    this.handle = result;
  }

  /** Rings that use the region keep it until they end. */
  close(): void {
    core.inflightClose(this.handle);
  }
}

function refusal(
  errno: number,
  { mmapSize, mmapOffset, numQueues, queueSize }: InflightShape,
  isPacked: boolean,
): Vhost2Error {
  const needed = inflightBytes(numQueues, queueSize, isPacked);
  const action =
    `Cannot map an inflight region of ${mmapSize} bytes at ${mmapOffset}`;
  const reason = errno === Errno.ENODATA
    ? "its file is shorter"
    : mmapSize < BigInt(needed)
    ? `${numQueues} queues of ${queueSize} need ${needed}`
    : errno === Errno.EINVAL
    ? "its offset is not a multiple of 8, passes the end of any file, or its descriptor is not shared memory"
    : null;
  if (reason === null) return check(-errno, action) as never;
  return new Vhost2Error("PROTOCOL", `${action}: ${reason}`, { errno });
}
