/**
 * A guest that sends the smallest frames without end: each chain that was used
 * is available again at once.
 *
 * @module
 */

import { type SplitDriver, VhostUserDevice } from "../../frontend/mod.ts";
import { offloading } from "./net_lies.ts";

const transmitQueue = 1;

/** Such a guest; its ring is full. */
export class NetFlood {
  readonly device: VhostUserDevice;
  readonly #driver: SplitDriver;
  #seen: number;

  private constructor(device: VhostUserDevice) {
    this.device = device;
    this.#driver = device.queues[transmitQueue] as SplitDriver;
    const buffer = device.ram.allocate(32);
    for (let head = 0; head < this.#driver.queueSize; head++) {
      this.#driver.descriptor(head, {
        address: buffer,
        length: 26,
        flags: 0,
        next: 0,
      });
      this.#driver.publish(head);
    }
    this.#seen = this.#driver.usedIndex;
  }

  static async open(path: string): Promise<NetFlood> {
    return new NetFlood(
      await VhostUserDevice.open({
        path,
        features: offloading,
        queueCount: 2,
        queueSize: 1024,
      }),
    );
  }

  /** What was used is available again. */
  refill(): void {
    const driver = this.#driver;
    for (; this.#seen !== driver.usedIndex; this.#advance()) {
      driver.publish(driver.ring.usedElement(this.#seen).id);
    }
  }

  #advance(): void {
    this.#seen = (this.#seen + 1) & 0xffff;
  }

  kick(): void {
    this.#driver.kick();
  }
}
