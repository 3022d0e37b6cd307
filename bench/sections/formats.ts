/**
 * Packed rings beside split ones, under the same driver.
 *
 * @module
 */

import { comparison, ours, reads } from "../comparison.ts";
import type { Section } from "../section.ts";
import { depths } from "./disks.ts";

export const formats: Section = {
  name: "formats",
  about: "Null disk, packed ring beside split ring, of this library",
  columns: ["packed", "split", "ratio"],
  cases: [true, false].flatMap((indirect) =>
    depths.map((depth) => {
      // Three descriptors each: 128 requests of them need 384.
      const front = { indirect, queueSize: indirect ? 256 : 512 };
      return comparison(
        `4 KiB reads, ${indirect ? "indirect" : "direct"}, depth ${depth}`,
        { ...reads, depth },
        ours("null", {}, { ...front, packed: true }),
        ours("null", {}, front),
      );
    })
  ),
};
