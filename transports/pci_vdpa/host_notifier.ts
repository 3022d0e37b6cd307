/**
 * A queue's notification register in the guest, in place of its kick: message
 * 3 of the back channel, with the device's own descriptor.
 *
 * @module
 */

import type { DataPathQueue } from "../transport.ts";
import type { VdpaDevice } from "./device.ts";

export class HostNotifier {
  readonly #queue: DataPathQueue;
  #isGiven: Promise<boolean> = Promise.resolve(false);

  constructor(queue: DataPathQueue) {
    this.#queue = queue;
  }

  /**
   * Where the register has a page of its own. A front-end that takes none goes
   * on kicking; so nobody waits for its answer, nor may: it may be waiting for
   * ours.
   */
  give(device: VdpaDevice): void {
    const page = device.notificationPage(this.#queue.index);
    if (page === null) return;
    this.#isGiven = this.#queue.setHostNotifier(page).then(
      () => true,
      () => false,
    );
  }

  /** Calls `then` when kicks come by their eventfd again, all of them. */
  async takeBack(then: () => void): Promise<void> {
    const isGiven = this.#isGiven;
    this.#isGiven = Promise.resolve(false);
    if (!await isGiven) return;
    // The queue may have stopped, which takes it back as well.
    await this.#queue.setHostNotifier(null).catch(() => {});
    then();
  }
}
