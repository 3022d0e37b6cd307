/**
 * The rate that a Linux guest sees: random 4 KiB reads at depth 32 from inside
 * QEMU (without KVM, so most of the time is the guest's own).
 *
 * @module
 */

import { startGuest } from "../tests/qemu/guest.ts";
import { median } from "./measure.ts";
import { type Disk, startOurs, startStorageDaemon } from "./peers.ts";

/** Requests per second, ours and theirs, as medians. */
export interface GuestRate {
  readonly name: string;
  readonly ours: number;
  readonly theirs: number;
}

/** Both disks in one guest, measured in turns. */
export async function guestRates(rounds: number): Promise<GuestRate[]> {
  const disk: Disk = { kind: "null", size: 2 ** 30 };
  const ours = await startOurs(disk, 1);
  const theirs = await startStorageDaemon(disk, 1);
  const rates = { vda: [] as number[], vdb: [] as number[] };
  try {
    const once = (name: string) =>
      `verify bench /dev/${name} --depth=32 --count=20000 | sed "s/^verify bench ok/${name}/"`;
    await using guest = await startGuest({
      disks: [
        { id: "ours", socketPath: ours.socketPath },
        { id: "theirs", socketPath: theirs.socketPath },
      ],
      script: Array.from(
        { length: rounds },
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
  return [{
    name: "null disk, from inside a guest (no KVM), depth 32",
    ours: median(rates.vda),
    theirs: median(rates.vdb),
  }];
}
