/**
 * A disk that answers at once and copies nothing, for measuring what all the
 * rest costs. Reads leave the guest's buffers as they were.
 *
 * @module
 */

import type { Backing, BackingClient, BackingQueue } from "./backing.ts";
import { Status } from "./backing.ts";

class NullQueue implements BackingQueue {
  readonly movesData = false;
  readonly isCongested = false;
  readonly endsByEvents = true;
  readonly #client: BackingClient;

  constructor(client: BackingClient) {
    this.#client = client;
  }

  read(head: number): void {
    this.#client.finish(head, Status.OK);
  }

  write(head: number): void {
    this.#client.finish(head, Status.OK);
  }

  flush(head: number): void {
    this.#client.finish(head, Status.OK);
  }

  discard(head: number): void {
    this.#client.finish(head, Status.OK);
  }

  writeZeroes(head: number): void {
    this.#client.finish(head, Status.OK);
  }

  submit(): void {}

  close(): void {}
}

/**
 * A disk of `size` bytes without any bytes.
 *
 * @param size bytes, a multiple of the logical block
 */
export function nullBacking(size: number): Backing {
  let current = size;
  return {
    name: "null",
    get size() {
      return current;
    },
    isReadOnly: false,
    canDiscard: true,
    canWriteZeroes: true,
    openQueue: (client) => new NullQueue(client),
    toPortable: () => ({ kind: "null", size: current }),
    resize(size) {
      current = size;
    },
    close() {},
  };
}
