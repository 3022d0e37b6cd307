/**
 * I/O virtual addresses (ACCESS_PLATFORM): the front-end's updates and
 * invalidations of the device IOTLB, our misses, and who waits for which.
 *
 * Nobody is ever blocked by a miss. A queue that met one keeps its requests in
 * the ring and is kicked when the update has come; an op that awaits a
 * translation is passed by the message that brings it (`Inbox`). Where
 * REPLY_ACK is negotiated the front-end acknowledges a miss once it has sent
 * the update, or decided to send none ("IOMMU support"); the reply is awaited
 * by a promise only.
 *
 * @module
 */

import { Vhost2Error } from "../ffi/errors.ts";
import type { GuestMemory } from "../ffi/guest_memory.ts";
import { type Access, type IotlbMiss, permissionOf } from "../ffi/iotlb.ts";
import { formatAddress, iova, uva } from "../protocol/address.ts";
import { BackendRequest } from "../protocol/backend_request.ts";
import { hasFeature, VirtioFeature } from "../protocol/features.ts";
import { type IotlbMessage, IotlbType } from "../protocol/payloads.ts";
import type { BackendRequests } from "./backend_requests.ts";
import type { Queues } from "./queues.ts";
import type { Vring } from "./vring.ts";

/** What translations need to know of their session. */
export interface TranslatingSession {
  readonly name: string;
  readonly features: bigint;
  readonly memory: GuestMemory;
  readonly requests: BackendRequests;
  /** In which space the targets of updates are. */
  readonly memorySpace: "gpa" | "uva";
  report(error: Vhost2Error): void;
  readonly queues: Pick<Queues, "kick">;
  /** Queues may be able to start. */
  wake(): void;
}

/** Misses that the front-end has not answered. */
const maxAsked = 1024;
/** Translations awaited by ops and devices. */
const maxAwaited = 1024;
/**
 * Without REPLY_ACK nothing tells that there is no answer: after so long a
 * miss may be sent again, when somebody needs it.
 */
const answerMs = 1000;
/** No IOMMU has smaller pages: one miss is enough for all in one. */
const pageShift = 12n;

interface Asked {
  readonly miss: IotlbMiss;
  readonly since: number;
}

interface Awaited {
  readonly iova: bigint;
  readonly access: Access;
  readonly vring: Vring | undefined;
  resolve(): void;
  reject(error: Vhost2Error): void;
}

const keyOf = (miss: Pick<IotlbMiss, "iova" | "access">) =>
  `${miss.iova >> pageShift} ${miss.access}`;

export class Translations {
  readonly #session: TranslatingSession;
  readonly #asked = new Map<string, Asked>();
  /** Access failures that the front-end has not acknowledged. */
  readonly #failures = new Set<string>();
  readonly #waiting = new Map<Vring, readonly IotlbMiss[]>();
  readonly #awaited = new Set<Awaited>();
  #hasWarned = false;
  /** A miss was not sent, because too many were out. */
  #isShort = false;

  constructor(session: TranslatingSession) {
    this.#session = session;
  }

  /** Addresses of the driver's are IOVAs. */
  get isActive(): boolean {
    return hasFeature(this.#session.features, VirtioFeature.ACCESS_PLATFORM);
  }

  /** An IOTLB message: 0, or 1 where it is refused. */
  take(message: IotlbMessage): bigint {
    const refusal = this.#apply(message);
    if (refusal === null) return 0n;
    this.#session.report(
      new Vhost2Error(
        "PROTOCOL",
        `Cannot accept IOTLB_MSG of ${this.#session.name}: ${refusal}`,
      ),
    );
    return 1n;
  }

  #apply({ type, iova, size, uva, permission }: IotlbMessage): string | null {
    const { iotlb } = this.#session.memory;
    const range = `${size} bytes at ${formatAddress(iova)}`;
    switch (type) {
      case IotlbType.UPDATE:
        if (iotlb.update(iova, size, uva, permission)) {
          this.#updated(iova, iova + size);
          return null;
        }
        return `an update of ${range} to ${
          formatAddress(uva)
        } with permission ${permission}`;
      case IotlbType.INVALIDATE:
        return iotlb.invalidate(iova, size)
          ? null
          : `an invalidation of ${range}`;
      default:
        return `type ${type} is neither update nor invalidate`;
    }
  }

  /** Everything is forgotten: the front-end will be asked again. */
  clear(): void {
    this.#session.memory.iotlb.clear(this.#session.memorySpace);
    this.#asked.clear();
    this.#failures.clear();
    this.#isShort = false;
    this.#rejectAll("the device was reset or stopped");
    this.#retry();
  }

  /** A queue, started or to be started, waits for these. */
  wait(vring: Vring, misses: readonly IotlbMiss[]): void {
    // In a Worker the update may have been faster than the miss.
    if (misses.some((miss) => this.#isSolved(miss))) return this.#resume(vring);
    this.#waiting.set(vring, misses);
    for (const miss of misses) this.#ask(miss);
  }

  /** The queue stops, or has stopped. */
  stopped(vring: Vring): void {
    this.#waiting.delete(vring);
    for (const awaited of this.#awaited) {
      if (awaited.vring !== vring) continue;
      this.#reject(awaited, "CLOSED", "its queue stops");
    }
  }

  /** Regions have come or gone: what led nowhere may lead somewhere now. */
  memoryChanged(): void {
    this.#retry();
    this.#settleAwaited();
  }

  /** The session ends. */
  close(): void {
    this.#waiting.clear();
    this.#rejectAll("the connection has closed");
  }

  /**
   * Fulfilled when the address can be used so. Rejects with CLOSED when the
   * queue stops or the connection ends, with MEMORY when the front-end has no
   * such translation or cannot be asked.
   */
  whenMapped(
    address: bigint,
    access: Access,
    vring: Vring | undefined,
  ): Promise<void> {
    return new Promise((resolve, reject) => {
      const awaited = { iova: address, access, vring, resolve, reject };
      const state = this.#session.memory.iotlb.translate(address, 1, access);
      if (typeof state !== "string") return resolve();
      if (vring !== undefined && !mayWait(vring)) {
        return this.#reject(awaited, "CLOSED", "its queue has stopped");
      }
      if (this.#awaited.size >= maxAwaited) {
        return this.#reject(awaited, "MEMORY", `${maxAwaited} are awaited`);
      }
      this.#awaited.add(awaited);
      this.#ask({ iova: address, access, reason: state });
    });
  }

  #isSolved({ iova, access }: IotlbMiss): boolean {
    const { iotlb } = this.#session.memory;
    return typeof iotlb.translate(iova, 1, access) !== "string";
  }

  /** [start, end) has come: whoever waits for a part of it goes on. */
  #updated(start: bigint, end: bigint): void {
    const isIn = (miss: { readonly iova: bigint }) =>
      miss.iova >= start && miss.iova < end;
    for (const [key, { miss }] of this.#asked) {
      if (!isIn(miss)) continue;
      if (this.#isSolved(miss)) this.#asked.delete(key);
      // Nothing else will say that this was the answer.
      else if (!this.#session.requests.canAcknowledge) this.#answered(key, 0n);
    }
    for (const [vring, misses] of this.#waiting) {
      if (misses.some(isIn)) this.#resume(vring);
    }
    this.#settleAwaited();
  }

  #resume(vring: Vring): void {
    this.#waiting.delete(vring);
    if (vring.run.kind === "stopped") this.#session.wake();
    else this.#session.queues.kick(vring);
  }

  #retry(): void {
    for (const vring of [...this.#waiting.keys()]) this.#resume(vring);
  }

  #settleAwaited(): void {
    const { iotlb } = this.#session.memory;
    for (const awaited of this.#awaited) {
      const state = iotlb.translate(awaited.iova, 1, awaited.access);
      if (typeof state === "string") continue;
      this.#awaited.delete(awaited);
      awaited.resolve();
    }
  }

  /** Sends a miss, unless one for that page is on its way. */
  #ask(miss: IotlbMiss): void {
    // The front-end has said where it is; only its memory table can help.
    if (miss.reason === "unmapped") return;
    const { requests } = this.#session;
    const key = keyOf(miss);
    const earlier = this.#asked.get(key);
    if (
      earlier !== undefined &&
      (requests.canAcknowledge || performance.now() - earlier.since < answerMs)
    ) return;
    if (earlier === undefined && this.#asked.size >= maxAsked) {
      this.#isShort = true;
      return;
    }
    const asked = { miss, since: performance.now() };
    this.#asked.set(key, asked);
    this.#send(IotlbType.MISS, miss).then(
      (ack) => {
        // Without REPLY_ACK it was sent and no more.
        if (ack === undefined || this.#asked.get(key) !== asked) return;
        this.#answered(key, ack);
      },
      (error: Vhost2Error) => {
        if (this.#asked.get(key) !== asked) return;
        this.#asked.delete(key);
        this.#cannotAsk(miss, error);
      },
    );
  }

  /** The front-end has done what it would about a miss. */
  #answered(key: string, ack: bigint): void {
    const { miss } = this.#asked.get(key)!;
    this.#asked.delete(key);
    const { iova, access } = miss;
    const state = this.#session.memory.iotlb.translate(iova, 1, access);
    if (state === "forbidden") this.#forbidden(miss);
    for (const awaited of this.#awaited) {
      if (keyOf(awaited) !== key) continue;
      if (state === "forbidden") {
        this.#reject(awaited, "MEMORY", `the front-end permits no ${access}`);
      } else if (ack !== 0n) {
        this.#reject(awaited, "MEMORY", "the front-end has no translation");
      }
    }
    if (!this.#isShort) return;
    this.#isShort = false;
    this.#retry();
    for (const { iova, access } of this.#awaited) {
      this.#ask({ iova, access, reason: "absent" });
    }
  }

  /** There is an entry, and it does not permit what a driver asked for. */
  #forbidden(miss: IotlbMiss): void {
    const key = keyOf(miss);
    if (this.#failures.has(key) || this.#failures.size >= maxAsked) return;
    this.#failures.add(key);
    this.#session.report(
      new Vhost2Error(
        "MEMORY",
        `Cannot go on at IOVA ${
          formatAddress(miss.iova)
        } of ${this.#session.name}: the front-end permits no ${miss.access}`,
      ),
    );
    this.#send(IotlbType.ACCESS_FAIL, miss).then((ack) => {
      if (ack !== undefined) this.#failures.delete(key);
    }, () => {});
  }

  /** Without a channel a queue waits for updates that come unasked. */
  #cannotAsk(miss: IotlbMiss, error: Vhost2Error): void {
    for (const awaited of this.#awaited) {
      if (keyOf(awaited) !== keyOf(miss)) continue;
      this.#awaited.delete(awaited);
      awaited.reject(error);
    }
    if (this.#hasWarned || error.code === "CLOSED") return;
    this.#hasWarned = true;
    this.#session.report(error);
  }

  async #send(type: number, miss: IotlbMiss): Promise<bigint | undefined> {
    return await this.#session.requests.ask(BackendRequest.BACKEND_IOTLB_MSG, {
      iova: iova(miss.iova),
      size: 0n,
      uva: uva(0n),
      permission: permissionOf(miss.access),
      type,
    });
  }

  #reject(awaited: Awaited, code: "CLOSED" | "MEMORY", reason: string): void {
    this.#awaited.delete(awaited);
    awaited.reject(
      new Vhost2Error(
        code,
        `Cannot await the translation of IOVA ${
          formatAddress(awaited.iova)
        }: ${reason}`,
      ),
    );
  }

  #rejectAll(reason: string): void {
    for (const awaited of this.#awaited) {
      this.#reject(awaited, "CLOSED", reason);
    }
  }
}

function mayWait({ run }: Vring): boolean {
  return run.kind === "started" || run.kind === "starting";
}
