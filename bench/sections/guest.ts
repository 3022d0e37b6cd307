/**
 * The rate that a Linux guest sees: random 4 KiB reads at depth 32 from inside
 * QEMU (without KVM, so most of the time is the guest's own).
 *
 * @module
 */

import { startGuest } from "../../tests/qemu/guest.ts";
import { diskOf } from "../comparison.ts";
import { median } from "../measure.ts";
import {
  startOurs,
  startStorageDaemon,
  storageDaemonMissing,
} from "../peers.ts";
import { isInstalled } from "../programs.ts";
import type { Figure, Run, Section } from "../section.ts";

/** Both disks in one guest, measured in turns. */
async function measure(run: Run): Promise<Figure[]> {
  const disk = diskOf("null", run);
  const ours = await startOurs({ disk });
  const theirs = await startStorageDaemon({ disk });
  const rates = { vda: [] as number[], vdb: [] as number[] };
  try {
    const once = (name: string) =>
      `verify bench /dev/${name} --depth=32 --count=20000 | sed "s/^verify bench ok/${name}/"`;
    await using guest = await startGuest({
      disks: [
        { id: "ours", socketPath: ours.socketPath() },
        { id: "theirs", socketPath: theirs.socketPath() },
      ],
      script: Array.from(
        { length: run.rounds },
        (_, i) =>
          (i % 2 === 0 ? ["vda", "vdb"] : ["vdb", "vda"])
            .map(once).join("\n"),
      ).join("\n"),
      onLine: (line) => {
        const found = /^(vda|vdb): .* (\d+) requests\/s/.exec(line);
        if (found) rates[found[1] as "vda" | "vdb"].push(Number(found[2]));
      },
    });
    await guest.exited;
  } finally {
    await ours.stop();
    await theirs.stop();
  }
  return [
    { value: median(rates.vda), unit: "perSecond" },
    { value: median(rates.vdb), unit: "perSecond" },
    {
      value: median(rates.vda.map((rate, i) => rate / rates.vdb[i])),
      unit: "ratio",
    },
  ];
}

export const guest: Section = {
  name: "guest",
  about: "From inside a Linux guest (QEMU without KVM)",
  columns: ["vhost2", "storage daemon", "ratio"],
  missing: () =>
    isInstalled("qemu-system-x86_64")
      ? storageDaemonMissing()
      : "QEMU is missing; run: node tools/setup.mjs guest",
  cases: [{ name: "null disk, 4 KiB reads, depth 32", measure }],
};
