// A back-end for recovery_test.ts: a disk in a file, whose requests take from 0
// to 25 ms before and after they reach it and so end in another order than they
// came. The only words: the socket's path and the file's.
import { open } from "node:fs/promises";
import process from "node:process";
import { blkDevice, registerTarget } from "../../mod.ts";

const [address, path] = process.argv.slice(2);
const file = await open(path, "r+");
const { size } = await file.stat();

function pause(): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, Math.random() * 25));
}

await registerTarget({
  transport: "vhost-user",
  address,
  ...blkDevice({
    backing: {
      size,
      async read(offset, into) {
        await pause();
        await file.read(into, 0, into.length, offset);
        await pause();
      },
      async write(offset, data) {
        await pause();
        await file.write(data, 0, data.length, offset);
        await pause();
      },
      flush: () => file.datasync(),
    },
  }),
});
console.log("listening");
