// A back-end for recovery_test.ts and vduse_test.ts: a disk in a file, whose
// requests take from 0 to 25 ms before and after they reach it and so end in
// another order than they came. The words: the socket's path and the file's; or
// the name of a VDUSE device, the file's path and the format of its rings.
import { open } from "node:fs/promises";
import process from "node:process";
import { blkDevice, registerTarget, type TransportOptions } from "../../mod.ts";

const [address, path, format] = process.argv.slice(2);
const file = await open(path, "r+");
const { size } = await file.stat();

function pause(): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, Math.random() * 25));
}

const disk = blkDevice({
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
});
const transport: TransportOptions = format === undefined
  ? { transport: "vhost-user", address }
  : { transport: "VDUSE", address, packed: format === "packed" };
await registerTarget({ ...transport, ...disk });
console.log("listening");
