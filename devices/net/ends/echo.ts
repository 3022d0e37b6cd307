/**
 * An end that sends each frame back to who sent it.
 *
 * @module
 */

import type { NetEnd } from "./end.ts";

/**
 * Swaps source and destination address of each frame and sends it back on the
 * same queue pair. What the guest has no buffer for is dropped.
 */
export function echoEnd(): NetEnd {
  return {
    name: "echo",
    // As it came it goes back: a guest gets complete frames if it sends such.
    offloads: 0,
    endsByEvents: true,
    toPortable: () => ({ kind: "echo" }),
    open: (link) => ({
      receive(frames, pair) {
        const { words, halves, count } = frames;
        for (let i = 0; i < count; i++) {
          // Addresses are three fields of two bytes each, at a multiple of 16.
          const at = words[2 * i] >> 1;
          for (let field = at; field < at + 3; field++) {
            const first = halves[field];
            halves[field] = halves[field + 3];
            halves[field + 3] = first;
          }
        }
        const sent = link.send(frames, pair);
        if (sent < count) link.drop(pair, count - sent);
      },
      close() {},
    }),
    close() {},
  };
}
