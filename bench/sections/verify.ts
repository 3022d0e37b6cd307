/**
 * Data that was written is what is read: no rate of a liar is worth much.
 *
 * @module
 */

import { diskOf } from "../comparison.ts";
import { LoadGenerator } from "../generator.ts";
import { startOurs } from "../peers.ts";
import type { Section } from "../section.ts";

export const verify: Section = {
  name: "verify",
  about: "Blocks written at random and read back",
  columns: ["requests", "wrong"],
  cases: (["memory", "file"] as const).flatMap((kind) =>
    [false, true].map((packed) => ({
      name: `${kind} disk, ${packed ? "packed" : "split"} ring`,
      goal: "0 wrong",
      async measure(run) {
        const peer = await startOurs({ disk: diskOf(kind, run) });
        try {
          const options = { packed };
          const path = peer.socketPath();
          const generator = await LoadGenerator.open(path, options);
          const { requests, errors } = generator.run({
            operation: "write",
            depth: 64,
            requestBytes: 4096,
            requestCount: 10_000,
            isRandom: true,
            verifies: true,
          });
          await generator.close();
          return [
            { value: requests, unit: "count" as const },
            { value: errors, unit: "count" as const },
          ];
        } finally {
          await peer.stop();
        }
      },
    }))
  ),
};
