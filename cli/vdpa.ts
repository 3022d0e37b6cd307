/**
 * `vhost2 vdpa`: a PCI device for a virtual machine, until a signal comes.
 *
 * @module
 */

import process from "node:process";
import type { Vhost2Error } from "../ffi/errors.ts";
import { registerTarget } from "../mod.ts";
import { describePlace, stopSignal } from "./serving.ts";
import type { VdpaArguments } from "./vdpa_arguments.ts";

/** All that a mask can hold: the device and the transport choose. */
const everything = (1n << 64n) - 1n;

/**
 * Serves the device until it is to stop: by a signal, or because the one
 * connection that was inherited has ended.
 *
 * @throws Vhost2Error when it cannot be served
 */
export async function serveVdpa(options: VdpaArguments): Promise<void> {
  const { device, place } = options;
  const where = describePlace(place);
  await using target = await registerTarget({
    transport: "PCI-vDPA",
    address: device,
    socketPath: place.address,
    connect: place.isConnecting,
    features: options.hasPacked ? everything : undefined,
    queueCount: options.numQueues,
    onError: (error: Vhost2Error) =>
      void process.stderr.write(`vhost2: ${error.message}\n`),
    trace: options.isVerbose
      ? (line) => process.stderr.write(`${line}\n`)
      : undefined,
  });
  const stopped = stopSignal();
  console.log(`vhost2: ${where} (${target.name})`);
  await Promise.race([stopped, target.closed]);
}
