/**
 * The transport "VDUSE": the front-end is this machine's kernel. Its own
 * drivers use the device (`virtio_vdpa`: a disk is `/dev/vda` here), or a
 * virtual machine does through `vhost_vdpa`.
 *
 * @module
 */

import { Vhost2Error } from "../../ffi/errors.ts";
import type { Transport, TransportHost } from "../transport.ts";
import type { VduseKernel } from "./kernel.ts";
import { linuxKernel } from "./linux.ts";
import { VduseTransport } from "./transport.ts";

export { BrokenVduseDevice } from "./kernel.ts";
export type {
  VduseDescription,
  VduseDevice,
  VduseEntry,
  VduseKernel,
  VduseQueueInfo,
  VduseRequest,
  VduseResponse,
} from "./kernel.ts";

/** Options of the transport "VDUSE". */
export interface VduseOptions {
  readonly transport: "VDUSE";
  /** The device's name, as in `/dev/vduse/NAME` and `vdpa dev`. */
  readonly address: string;
  /**
   * Whether the device is put on the kernel's vDPA bus, where a driver takes
   * it, and taken off it when the target is unregistered; true unless given.
   * Otherwise that is up to `vdpa dev add NAME mgmtdev vduse`.
   */
  readonly attach?: boolean;
  /**
   * Leaves the device as it is when the target is unregistered: its driver
   * waits (30 s, if it wants something) for the process that takes it up.
   */
  readonly stay?: boolean;
  /** The most descriptors that a queue may have; 256 unless given. */
  readonly queueSize?: number;
  /**
   * Offers packed rings, if the device's requests may be done twice
   * (INFLIGHT_SHMFD); false unless given. Only for the kernel's own drivers: a
   * monitor that stops and continues its guest resets the device, is not told
   * where a packed ring was, and goes on at its beginning.
   */
  readonly packed?: boolean;
  /**
   * The folder of what outlives a crash of this process, nobody else's; the
   * first of $RUNTIME_DIRECTORY, /run/vhost2, $XDG_RUNTIME_DIR/vhost2 and one
   * among the temporary files that can be had, unless given.
   */
  readonly runtimeFolder?: string;
  /** The kernel; this machine's unless given. */
  readonly kernel?: VduseKernel;
}

/** What names the target, for messages and to find doubles. */
export function addressName({ address }: VduseOptions): string {
  // A file name, also with what is added to it for the log.
  const isUsable = /^[A-Za-z0-9_][A-Za-z0-9_.:-]{0,199}$/.test(address) &&
    address !== "control";
  if (isUsable) return address;
  throw new Vhost2Error(
    "OPTION",
    `Cannot use as the name of a VDUSE device: ${address} (letters, digits and _ . : -)`,
  );
}

function checkQueueSize(size: number): number {
  const isPower = Number.isInteger(size) && (size & (size - 1)) === 0;
  if (isPower && size > 0 && size <= 32768) return size;
  throw new Vhost2Error(
    "OPTION",
    `Cannot use queueSize: ${size} (a power of two from 1 to 32768)`,
  );
}

/**
 * Opens the transport; the device is there, and attached, when the promise
 * resolves. Throws when the kernel lacks something, and says what.
 */
export async function open(
  options: VduseOptions,
  host: TransportHost,
): Promise<Transport> {
  const transport = new VduseTransport(options.kernel ?? linuxKernel, {
    name: addressName(options),
    isAttached: options.attach ?? true,
    stays: options.stay ?? false,
    queueSize: checkQueueSize(options.queueSize ?? 256),
    hasPacked: options.packed ?? false,
    runtimeFolder: options.runtimeFolder,
  }, host);
  try {
    await transport.start();
  } catch (error) {
    await transport.close();
    throw error;
  }
  return transport;
}
