/**
 * Whether anything is allocated per request.
 *
 * @module
 */

import { LoadGenerator } from "../generator.ts";
import { diskOf, reads } from "../comparison.ts";
import { startOurs } from "../peers.ts";
import type { Section } from "../section.ts";

export const heap: Section = {
  name: "heap",
  about: "Growth of the heap, after collection",
  columns: ["per request", "requests"],
  cases: [{
    name: "null disk, 4 KiB reads, depth 128",
    goal: "< 1 B",
    async measure(run) {
      const peer = await startOurs({ disk: diskOf("null", run) });
      try {
        const generator = await LoadGenerator.open(peer.socketPath());
        const load = { ...reads, depth: 128 };
        const requestCount = run.heapRequests;
        generator.run({ ...load, requestCount: Math.ceil(requestCount / 5) });
        const before = Number(await peer.ask("heap"));
        const { requests } = generator.run({ ...load, requestCount });
        const after = Number(await peer.ask("heap"));
        await generator.close();
        return [
          { value: (after - before) / requests, unit: "bytes" },
          { value: requests, unit: "count" },
        ];
      } finally {
        await peer.stop();
      }
    },
  }],
};
