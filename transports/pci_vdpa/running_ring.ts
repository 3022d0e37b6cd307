/**
 * A queue while the device has it: the guest's own ring (`direct_ring.ts`), or
 * one of ours beside it (`shadow_ring.ts`).
 *
 * @module
 */

import type { Vhost2Error } from "../../ffi/errors.ts";
import type { DataPathQueue } from "../transport.ts";
import type { DeviceRing, VdpaDevice } from "./device.ts";
import { waitsForEvents } from "./features.ts";

export interface RunningRing extends DeviceRing {
  /**
   * The device has the ring. It is told of what lies there already.
   *
   * @param hasVector false: the device has refused the queue's vector
   */
  started(hasVector: boolean): void;
  /** The driver kicked. */
  kick(): void;
  /** The front-end has set another call. */
  changed(): void;
  /**
   * The device still works: resolves when it has done what it was given, as
   * far as that can be waited for.
   */
  quiesce(): Promise<void>;
  /**
   * The device has let go of the ring, and so does everything here. Resolves
   * with where the queue goes on (as `Queue.availableIndex`).
   */
  end(): Promise<number>;
}

/** What a ring is made of. */
export interface RingOptions {
  readonly queue: DataPathQueue;
  readonly device: VdpaDevice;
  report(error: Vhost2Error): void;
}

/** Requests that a device does not finish in this time are given up. */
const quiesceLimitMs = 30_000;
const betweenLooksMs = 1;

/**
 * Waits until `isIdle`, unless nobody can tell when that will be, or the
 * device works no more.
 */
export async function whenIdle(
  { queue, device }: RingOptions,
  isIdle: () => boolean,
): Promise<void> {
  if (waitsForEvents(device.type, queue.index)) return;
  const end = performance.now() + quiesceLimitMs;
  while (!isIdle() && device.condition === "ok" && performance.now() < end) {
    await new Promise((resolve) => setTimeout(resolve, betweenLooksMs));
  }
}

/** Has `look` called at each interrupt of the queue; returns the undo. */
export function watchInterrupts(
  { queue, device }: RingOptions,
  hasVector: boolean,
  look: () => void,
): () => void {
  const { interrupts } = device;
  return hasVector
    ? interrupts.handle(device.vectorOf(queue.index), look)
    : interrupts.poll(look);
}
