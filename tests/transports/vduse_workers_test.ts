/** Queues of the kernel's own driver, served by Workers. */

import { test } from "../harness.ts";
// The runtime's own descriptors for Workers are there from then on.
import "../session/worker_world.ts";
import { exercise, withDisk } from "./vduse_disk.ts";
import { ModelDriver } from "./vduse_served.ts";

test("Workers serve queues that the kernel kicks and that are called through it", () =>
  withDisk(
    async ({ device }) => {
      for (let round = 0; round < 2; round++) {
        const driver = await ModelDriver.probe(device);
        await exercise(driver, 20);
        await device.setStatus(0);
        driver.close();
      }
    },
    {},
    { workers: 2 },
  ));
