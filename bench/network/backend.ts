/**
 * The network back-end that the bench measures: one card, until it is killed.
 *
 *   network/backend.ts SOCKET loop|receive|send FRAME_BYTES
 *
 * @module
 */

import process from "node:process";
import {
  discardEnd,
  echoEnd,
  Frames,
  netDevice,
  type NetEnd,
  type NetLink,
  registerTarget,
} from "../../mod.ts";
import type { Direction } from "../sections/network.ts";

const [socketPath, direction, frameBytes] = process.argv.slice(2);

/** Bursts in one turn of the event loop. */
const burstsPerTurn = 64;

/** Sends one burst over and over, as fast as the guest gives buffers. */
function floodEnd(bytes: number): NetEnd {
  const frames = new Frames();
  while (frames.add(new Uint8Array(bytes).fill(0xff))) continue;
  return {
    name: "flood",
    offloads: 0,
    open(link: NetLink) {
      let isOpen = true;
      const fill = () => {
        if (!isOpen) return;
        for (let i = 0; i < burstsPerTurn; i++) {
          // Fewer: `ready` tells when there are buffers again.
          if (link.send(frames, 0) < frames.count) return;
        }
        setImmediate(fill);
      };
      return {
        negotiated: fill,
        ready: fill,
        receive() {},
        close() {
          isOpen = false;
        },
      };
    },
    close() {},
  };
}

const ends: Record<Direction, () => NetEnd> = {
  loop: echoEnd,
  receive: discardEnd,
  send: () => floodEnd(Number(frameBytes)),
};
await registerTarget({
  transport: "vhost-user",
  address: socketPath,
  ...netDevice({ end: ends[direction as Direction]() }),
});
