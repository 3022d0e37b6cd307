// A program: a front-end that dies when the back-end waits for a page of it.

import process from "node:process";
import { PageFaults, VhostUserDevice } from "../../frontend/mod.ts";
import {
  adviseAndListen,
  dataPage,
  mapAndStart,
  postcopyOptions,
} from "./postcopy_guest.ts";

const guest = await VhostUserDevice.open({
  ...postcopyOptions,
  path: process.argv[2],
});
const fd = await adviseAndListen(guest);
new PageFaults(fd, () => process.kill(process.pid, "SIGKILL"));
await mapAndStart(guest);
const address = dataPage(guest, 3);
await guest.queues[0].submitChain([
  { address, length: 64, isWritable: false },
  { address: guest.ram.allocate(64), length: 64, isWritable: true },
]);
