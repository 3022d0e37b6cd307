/** Queues behind a virtio-vhost-user device, served by Workers. */

import { test } from "../harness.ts";
// The runtime's own descriptors for Workers are there from then on.
import "../session/worker_world.ts";
import { exercise, openGuest, withDisk } from "./pci_disk.ts";

const kicks = {
  "a vector for each queue": { vectorCount: 64 },
  "a vector shared by the queues": { vectorCount: 4 },
  "nothing but looking": { vectorCount: 0 },
};

for (const [name, options] of Object.entries(kicks)) {
  test(`Workers serve queues that are kicked by ${name}`, () =>
    withDisk(options, async (served) => {
      for (let round = 0; round < 2; round++) {
        const guest = await openGuest(served);
        await exercise(guest, 20);
        await guest.close();
        await served.nobody();
      }
    }, { workers: 2 }));
}
