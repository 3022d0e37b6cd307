/** A front-end that listens, for back-ends that connect. */

import { core } from "../../ffi/core.ts";
import { check } from "../../ffi/errors.ts";
import { eventLoop, type Watch } from "../../ffi/event_loop.ts";
import { Events } from "../support/wait.ts";

const encoder = new TextEncoder();

/** Listens at `path`; the descriptor is the caller's. */
export function listenAt(path: string): number {
  const bytes = encoder.encode(path);
  return check(core.socketListen(bytes, bytes.length, 0), `listen ${path}`);
}

/** Accepts connections and hands out their descriptors. */
export class FrontendListener {
  readonly accepted: Events<number> = new Events();
  readonly #fd: number;
  readonly #watch: Watch;

  constructor(path: string) {
    this.#fd = listenAt(path);
    eventLoop.ref();
    this.#watch = eventLoop.watch(this.#fd, () => {
      for (;;) {
        const fd = core.socketAccept(this.#fd);
        if (fd < 0) return;
        this.accepted.push(fd);
      }
    });
  }

  [Symbol.dispose](): void {
    this.#watch.close();
    core.descriptorClose(this.#fd);
    for (const fd of this.accepted.pending) core.descriptorClose(fd);
    eventLoop.unref();
  }
}
