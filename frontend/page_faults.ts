/**
 * The front-end's side of postcopy: it learns which of the guest's pages the
 * back-end waits for, and fills them.
 *
 * @module
 */

import { core } from "../ffi/core.ts";
import { check, Errno } from "../ffi/errors.ts";
import { eventLoop, type Watch } from "../ffi/event_loop.ts";

/** Addresses per call of the core. */
const capacity = 64;

/**
 * A back-end's userfaultfd, as the reply of POSTCOPY_ADVISE carries it
 * (`FrontendConnection.advisePostcopy`). All addresses are the back-end's: a
 * region begins where `FrontendConnection.mapPostcopy` has told.
 */
export class PageFaults {
  readonly #fd: number;
  readonly #watch: Watch;
  readonly #addresses = new BigUint64Array(capacity);
  readonly #onFault: (address: bigint, faults: PageFaults) => void;
  #isOpen = true;

  /**
   * @param fd from here on this object's
   * @param onFault told the address of each page that somebody waits for
   */
  constructor(
    fd: number,
    onFault: (address: bigint, faults: PageFaults) => void,
  ) {
    this.#fd = fd;
    this.#onFault = onFault;
    this.#watch = eventLoop.watch(fd, () => this.#read());
    this.#read();
  }

  #read(): void {
    while (this.#isOpen) {
      const count = core.userfaultRead(this.#fd, this.#addresses, capacity);
      check(count, "Cannot read a userfaultfd");
      if (count === 0) return;
      for (const address of this.#addresses.slice(0, count)) {
        this.#onFault(address, this);
      }
    }
  }

  /**
   * Fills missing pages, and wakes who waits for them. Returns false where the
   * first one is there already.
   *
   * @param address of the first page
   * @param bytes whole pages
   */
  fill(address: bigint, bytes: Uint8Array): boolean {
    const result = core.userfaultCopy(
      this.#fd,
      address,
      bytes,
      bytes.length,
    );
    if (result === -Errno.EEXIST) return false;
    check(result, `Cannot fill the page at 0x${address.toString(16)}`);
    return true;
  }

  /**
   * Wakes who waits for pages that came through the front-end's own mapping.
   *
   * @param address of the first page
   * @param size bytes, whole pages
   */
  wake(address: bigint, size: number): void {
    check(core.userfaultWake(this.#fd, address, size), "Cannot wake a page");
  }

  /** Closes the userfaultfd. */
  close(): void {
    if (!this.#isOpen) return;
    this.#isOpen = false;
    this.#watch.close();
    core.descriptorClose(this.#fd);
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
