// A program: a disk with postcopy, until SIGINT.
//
//   postcopy_backend PATH WORKERS [listens]

import process from "node:process";
import { blkDevice, memoryBacking, registerTarget } from "../../mod.ts";

const [address, workers, how] = process.argv.slice(2);
const target = await registerTarget({
  transport: "vhost-user",
  address,
  ...blkDevice({ backing: memoryBacking(1 << 20) }),
  postcopy: true,
  workers: Number(workers),
  onError: () => {},
});
if (how === "listens") {
  process.on("SIGINT", async () => {
    await target.unregister();
    process.exit(0);
  });
}
console.log("ready");
