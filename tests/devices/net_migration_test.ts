// What a network card writes into its guest is in the dirty log.
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { echoEnd, featureMask, NetFeature } from "../../mod.ts";
import { supportedFeatures } from "../../frontend/mod.ts";
import { test } from "../harness.ts";
import { within } from "../support/wait.ts";
import { frameOf, ServedNet, swapped } from "./net_guest.ts";

const base = supportedFeatures | featureMask(NetFeature.MAC, NetFeature.STATUS);

function placesOf(memory: Buffer, part: Uint8Array): number[] {
  const places: number[] = [];
  for (
    let at = memory.indexOf(part);
    at >= 0;
    at = memory.indexOf(part, at + 1)
  ) places.push(at);
  return places;
}

for (const packed of [false, true]) {
  for (const mergeable of [0n, featureMask(NetFeature.MRG_RXBUF)]) {
    test(
      `a frame received is marked in the log, in each of its buffers (${
        packed ? "packed" : "split"
      }${mergeable === 0n ? "" : ", mergeable"})`,
      async () => {
        await using served = await ServedNet.start({ end: echoEnd() });
        const card = await served.card({
          packed,
          features: base | mergeable,
          bufferShape: mergeable === 0n ? [5000] : [1004],
        });
        const log = await card.device.startLog({ rings: false });
        const frame = frameOf(3000);
        const back = swapped(frame);
        const [{ bytes, gpa }] = card.device.ram.regions;
        const memory = Buffer.from(
          bytes.buffer,
          bytes.byteOffset,
          bytes.length,
        );
        // With mergeable buffers three of them hold it and its header. Its
        // beginning and its end, where they are in the guest until the
        // driver makes the buffers available again: the end also as it was sent.
        const parts = [back.subarray(0, 200), back.subarray(-200)];
        const found: number[][] = [];
        card.device.queues[0].onUsed = () => {
          if (found.length > 0) return;
          found.push(...parts.map((part) => placesOf(memory, part)));
        };
        await within(card.send(frame), "sent");
        await within(card.receive(), "received");
        assert.equal(found.length, 2);
        for (const places of found) {
          const marked = places.filter((at) =>
            log.isDirty(gpa + BigInt(at)) && log.isDirty(gpa + BigInt(at + 199))
          );
          assert.equal(marked.length, 1, `of ${places.length} places`);
        }
        await card.device.stopLog();
      },
    );
  }
}
