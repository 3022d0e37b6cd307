/**
 * `Device.translateAsync` in a Worker: the front-end is asked by the
 * registering thread, and what it has answered is in the IOTLB, which all
 * isolates share. So only how the wait has ended is passed on.
 *
 * @module
 */

import {
  errorFromMessage,
  type ErrorMessage,
  Vhost2Error,
} from "../../ffi/errors.ts";
import type { GuestMemory } from "../../ffi/guest_memory.ts";
import type { Access } from "../../ffi/iotlb.ts";
import { hasFeature, VirtioFeature } from "../../protocol/features.ts";
import type { Queue } from "../queue.ts";
import type { FromWorker } from "./messages.ts";

/** What is needed of the device. */
export interface AwaitingDevice {
  readonly id: number;
  readonly name: string;
  readonly features: bigint;
  readonly memory: GuestMemory;
  /** Those that are served here. */
  readonly queues: Iterable<{ readonly run: number; readonly queue: Queue }>;
}

interface Wait {
  resolve(): void;
  reject(error: Error): void;
}

export class AwaitedTranslations {
  readonly #device: AwaitingDevice;
  readonly #post: (message: FromWorker) => void;
  readonly #waits = new Map<number, Wait>();
  #nextWait = 1;

  constructor(device: AwaitingDevice, post: (message: FromWorker) => void) {
    this.#device = device;
    this.#post = post;
  }

  /** Addresses of the driver's are IOVAs. */
  get isActive(): boolean {
    return hasFeature(this.#device.features, VirtioFeature.ACCESS_PLATFORM);
  }

  /** See `Session.whenMapped`; queues of other Workers are none here. */
  whenMapped(
    iova: bigint,
    access: Access,
    queue: Queue | undefined,
  ): Promise<void> {
    const { id, queues } = this.#device;
    const served = [...queues];
    const run = served.find((one) => one.queue === queue)?.run;
    // Where no queue runs there are no views either.
    if (queue === undefined ? served.length === 0 : run === undefined) {
      return Promise.reject(this.#stopped());
    }
    return new Promise((resolve, reject) => {
      const wait = this.#nextWait++;
      this.#waits.set(wait, { resolve, reject });
      this.#post({
        kind: "translate",
        device: id,
        wait,
        run: run ?? null,
        iova,
        access,
      });
    });
  }

  /** A wait has ended. */
  answered(wait: number, error: ErrorMessage | null): void {
    const waiting = this.#waits.get(wait);
    this.#waits.delete(wait);
    // It may lead to a region that was added since the last pop.
    this.#device.memory.refresh();
    if (error === null) waiting?.resolve();
    else waiting?.reject(errorFromMessage(error));
  }

  /** No queue of the device runs here any more. */
  close(): void {
    for (const { reject } of this.#waits.values()) reject(this.#stopped());
    this.#waits.clear();
  }

  #stopped(): Vhost2Error {
    return new Vhost2Error(
      "CLOSED",
      `Cannot await a translation of ${this.#device.name}: it has stopped`,
    );
  }
}
