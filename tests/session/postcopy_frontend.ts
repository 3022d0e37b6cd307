// A program: a front-end that dies when the back-end waits for a page of it, or
// stays and does not fill it.
//
//   postcopy_frontend PATH [stays]

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
const stays = process.argv[3] === "stays";
new PageFaults(fd, () => {
  if (!stays) process.kill(process.pid, "SIGKILL");
});
await mapAndStart(guest);
const address = dataPage(guest, 3);
await guest.queues[0].submitChain([
  { address, length: 64, isWritable: false },
  { address: guest.ram.allocate(64), length: 64, isWritable: true },
]);
