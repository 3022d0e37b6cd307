/**
 * The queues of a session: each is made from what its vring and the memory
 * table say, and started, kicked and stopped on its own.
 *
 * @module
 */

import { Vhost2Error } from "../ffi/errors.ts";
import { BackendRequest } from "../protocol/backend_request.ts";
import {
  featureMask,
  hasFeature,
  ProtocolFeature,
  VirtioFeature,
} from "../protocol/features.ts";
import { VRING_FLAG_LOG } from "../protocol/payloads.ts";
import { Queue } from "./queue.ts";
import { findRingAreas, movingRingAreas } from "./ring_areas.ts";
import type { Session } from "./session.ts";
import type { Vring } from "./vring.ts";

/** What the queues need to know of their session. */
export type QueueingSession = Pick<
  Session,
  | "name"
  | "options"
  | "connection"
  | "memory"
  | "vrings"
  | "device"
  | "ops"
  | "sequencer"
  | "requests"
  | "inBand"
  | "inflight"
  | "translations"
  | "features"
  | "ackedProtocolFeatures"
  | "isPacked"
  | "firstBase"
  | "ringSpace"
  | "report"
>;

const logAllMask = featureMask(VirtioFeature.LOG_ALL);

export class Queues {
  readonly #session: QueueingSession;
  /** `deviceInit` is owed before the next start. */
  isInitOwed = true;

  constructor(session: QueueingSession) {
    this.#session = session;
  }

  /** Starts every queue that can run and does not. */
  async startReady(): Promise<void> {
    const { vrings, memory } = this.#session;
    for (const vring of vrings) {
      if (!vring.isReady || memory.state !== "ok") continue;
      const queue = this.#make(vring);
      if (queue !== null) await this.#start(vring, queue);
    }
  }

  /** A kick arrived, or may have: the user's op, if the queue has started. */
  kick(vring: Vring): void {
    if (vring.run.kind !== "started" || vring.run.queue.isBroken) return;
    const session = this.#session;
    try {
      session.ops.queueKick?.(vring.run.queue);
    } catch (cause) {
      session.report(
        new Vhost2Error(
          "OP",
          `Op queueKick of ${session.name} failed: ${cause}`,
          { cause },
        ),
      );
    }
  }

  /** Stops each started queue, one after the other. */
  async stopAll(leavesInFlight = false): Promise<void> {
    for (const vring of this.#session.vrings) {
      if (vring.run.kind === "started") await this.stop(vring, leavesInFlight);
    }
  }

  /**
   * Stops one queue, if it runs, and keeps where it stopped. Requests in flight
   * complete first, or, where there is an inflight region, may be left there.
   */
  async stop(vring: Vring, leavesInFlight = false): Promise<void> {
    const session = this.#session;
    session.translations.stopped(vring);
    if (vring.run.kind !== "started") return;
    const { queue } = vring.run;
    queue.leavesInFlight = leavesInFlight && queue.inflight !== null;
    vring.run = { kind: "stopping", queue };
    const isStopped = await session.sequencer.insist(
      "queueStop",
      () => session.ops.queueStop?.(queue),
      (error) => session.report(error),
    );
    if (!isStopped) {
      // The device cannot be trusted to keep its hands off the guest.
      session.memory.revoke();
      session.connection.close();
    }
    // Packed: two positions with their wrap counters.
    vring.base = hasFeature(queue.features, VirtioFeature.RING_PACKED)
      ? queue.availableIndex >>> 0
      : queue.availableIndex & 0xffff;
    vring.stoppedAt = vring.base;
    queue.markStopped();
    vring.hasLeftInFlight = queue.inflight !== null && queue.leftInFlight > 0;
    vring.run = { kind: "stopped" };
  }

  /**
   * Stops one queue with nothing in flight, also where an earlier stop (it was
   * disabled) had left requests in the inflight region.
   */
  async drain(vring: Vring): Promise<void> {
    await this.stop(vring);
    if (!vring.hasLeftInFlight || !vring.isSetUp) return;
    const queue = this.#make(vring);
    if (queue === null || queue.inflight === null) return;
    await this.#start(vring, queue);
    await this.stop(vring);
  }

  /** Tells the front-end, where it listens, that no queue can go on. */
  signalErrors(): void {
    for (const vring of this.#session.vrings) this.#signalError(vring);
  }

  async #start(vring: Vring, queue: Queue): Promise<void> {
    const session = this.#session;
    if (this.isInitOwed) {
      await session.sequencer.call(
        "deviceInit",
        () => session.ops.deviceInit?.(session.device),
      );
      this.isInitOwed = false;
    }
    vring.run = { kind: "starting", queue };
    try {
      await session.sequencer.call(
        "queueStart",
        () => session.ops.queueStart?.(queue),
      );
    } catch (error) {
      queue.markStopped();
      vring.run = { kind: "failed" };
      session.translations.stopped(vring);
      this.#signalError(vring);
      session.report(error as Vhost2Error);
      return;
    }
    vring.run = { kind: "started", queue };
    vring.isAnew = false;
    // Used buffers of an earlier run may never have been announced, and a kick
    // may have come while nobody listened: both sides look once.
    queue.call();
    this.kick(vring);
  }

  /** The queue of a vring, or null (and an error event) if it is not mapped. */
  #make(vring: Vring): Queue | null {
    const session = this.#session;
    const { memory, ringSpace: space, isPacked } = session;
    const addresses = vring.addresses!;
    const place = { memory, space, addresses, size: vring.size, isPacked };
    const found = findRingAreas(place);
    if (found === null) {
      if (memory.regions.length > 0) this.#refuseRing(vring);
      return null;
    }
    if (!("used" in found)) {
      session.translations.wait(vring, found);
      return null;
    }
    return new Queue({
      device: session.device,
      index: vring.index,
      size: vring.size,
      features: session.features & ~logAllMask,
      addresses: { space, ...addresses },
      isLogged: hasFeature(
        session.ackedProtocolFeatures,
        ProtocolFeature.LOG_SHMFD,
      ),
      areas: space === "iova" ? movingRingAreas(place, found) : () => found,
      missed: (misses) => session.translations.wait(vring, misses),
      base: vring.base ?? session.firstBase,
      logAddress: () => {
        const now = vring.addresses;
        return now !== null && (now.flags & VRING_FLAG_LOG) !== 0
          ? now.log
          : null;
      },
      isPolled: vring.kick.kind === "polled",
      isEnabled: () => vring.isEnabled,
      memory,
      inflight: session.inflight.handleOf(vring.index),
      isAnew: vring.isAnew,
      pollMicroseconds: session.options.pollMicroseconds,
      wires: {
        kickFd: vring.kick.kind === "event" ? vring.kick.source.fd : null,
        call: () =>
          vring.call !== null
            ? vring.call.fd ?? "session"
            : session.inBand.isNegotiated
            ? "session"
            : null,
      },
      setHostNotifier: (area) =>
        session.requests.send(
          BackendRequest.BACKEND_VRING_HOST_NOTIFIER_MSG,
          {
            vring: {
              index: vring.index,
              hasDescriptor: area !== null,
              reserved: 0n,
            },
            offset: BigInt(area?.offset ?? 0),
            size: BigInt(area?.size ?? 0),
          },
          area === null ? [] : [area.fd],
        ),
      call: () => {
        if (vring.call !== null) vring.call.signal();
        else session.inBand.call(vring);
      },
      fail: (reason, cause) => {
        this.#signalError(vring);
        session.report(
          new Vhost2Error(
            "RING",
            `Cannot go on with queue ${vring.index} of ${session.name}: ${reason}`,
            { cause },
          ),
        );
      },
    });
  }

  /** Told once: it stays stopped until it, or the memory, is set up anew. */
  #refuseRing(vring: Vring): void {
    vring.run = { kind: "failed" };
    this.#signalError(vring);
    this.#session.report(
      new Vhost2Error(
        "MEMORY",
        `Cannot start queue ${vring.index} of ${this.#session.name}: its ring of ${vring.size} descriptors is not inside one memory region`,
      ),
    );
  }

  #signalError(vring: Vring): void {
    if (vring.error !== null) vring.error.signal();
    else this.#session.inBand.error(vring);
  }
}
