// A complete device: a source of entropy (virtio-rng). The guest hands in empty
// buffers, and gets them back filled with random bytes.
//
//   deno run --allow-ffi examples/entropy.ts /tmp/entropy.sock
//   qemu-system-x86_64 ... -chardev socket,id=c,path=/tmp/entropy.sock \
//     -device vhost-user-rng-pci,chardev=c
import process from "node:process";
import {
  registerTarget,
  requestOps,
  type Target,
  virtqueueFeatures,
} from "../mod.ts";

/** Serves entropy to whoever connects to the socket at `address`. */
export function serveEntropy(address: string): Promise<Target> {
  return registerTarget({
    transport: "vhost-user",
    address,
    features: virtqueueFeatures,
    queueCount: 1,
    device: () =>
      requestOps((request) => {
        // A view of the guest's own memory. Fewer bytes than asked are allowed;
        // 65536 is what getRandomValues gives at once.
        const bytes = request.writable[0]?.subarray(0, 65536);
        if (bytes === undefined) return 0;
        crypto.getRandomValues(bytes);
        return bytes.length;
      }),
  });
}

if (import.meta.main) await serveEntropy(process.argv[2]);
