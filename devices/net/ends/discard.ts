/**
 * An end that takes everything and sends nothing.
 *
 * @module
 */

import { type NetEnd, Offload } from "./end.ts";

const all = Object.values(Offload).reduce((mask, bit) => mask | bit, 0);

/** An end where frames end, for measuring what all the rest costs. */
export function discardEnd(): NetEnd {
  return {
    name: "discard",
    offloads: all,
    endsByEvents: true,
    toPortable: () => ({ kind: "discard" }),
    open: () => ({ receive() {}, close() {} }),
    close() {},
  };
}
