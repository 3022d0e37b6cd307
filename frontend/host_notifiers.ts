/**
 * Registers of a device by which a queue is kicked without a way through the
 * back-end: what VRING_HOST_NOTIFIER_MSG hands out.
 *
 * @module
 */

import { binding, core } from "../ffi/core.ts";
import { check } from "../ffi/errors.ts";
import type { BackendPayloadOf } from "../protocol/backend_request.ts";
import type { BackendRequest } from "../protocol/backend_request.ts";
import type { Descriptors } from "../transports/transport.ts";

type Area = BackendPayloadOf<
  typeof BackendRequest.BACKEND_VRING_HOST_NOTIFIER_MSG
>;

interface Page {
  readonly words: Uint16Array<ArrayBuffer>;
  readonly address: bigint;
}

/** More than a page is no notification register. */
const maxSize = 1 << 16;
const canDetach = typeof ArrayBuffer.prototype.transfer === "function";

/** Those of one device. */
export class HostNotifiers {
  readonly #pages = new Map<number, Page>();

  /** Takes what the back-end gives, or takes away. Throws for what is no area. */
  take({ vring, offset, size }: Area, descriptors: Descriptors): void {
    const { index } = vring;
    this.#drop(index);
    const fd = descriptors.take();
    if (fd === undefined) return;
    try {
      const bytes = Math.min(Number(size), maxSize);
      const out = new BigUint64Array(1);
      check(
        core.mapPages(fd, Number(offset), bytes, out),
        `Cannot map the host notifier of queue ${index}`,
      );
      const words = new Uint16Array(binding.view(out[0], bytes));
      this.#pages.set(index, { words, address: out[0] });
    } finally {
      core.descriptorClose(fd);
    }
  }

  /** Kicks a queue; false where its register is not known. */
  kick(index: number): boolean {
    const page = this.#pages.get(index);
    if (page === undefined) return false;
    // A virtio device is told the queue's number (VIRTIO 1.3, 4.1.5.2).
    Atomics.store(page.words, 0, index);
    return true;
  }

  /** Whether a queue is kicked so. */
  has(index: number): boolean {
    return this.#pages.has(index);
  }

  #drop(index: number): void {
    const page = this.#pages.get(index);
    if (page === undefined) return;
    this.#pages.delete(index);
    const size = page.words.byteLength;
    // Where views cannot be emptied the mapping stays, as guest memory does.
    if (!canDetach) return;
    page.words.buffer.transfer();
    check(core.unmap(page.address, size), "Cannot unmap a host notifier");
  }

  close(): void {
    for (const index of [...this.#pages.keys()]) this.#drop(index);
  }
}
