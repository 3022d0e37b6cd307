/**
 * The transports by name. Siblings have the same inner shape: options, a name
 * for the address, `open`.
 *
 * @module
 */

import { Vhost2Error } from "../ffi/errors.ts";
import type { Transport, TransportHost } from "./transport.ts";
import * as pciVdpa from "./pci_vdpa/mod.ts";
import * as pciVhostUser from "./pci_vhost_user/mod.ts";
import * as vduse from "./vduse/mod.ts";
import * as vhostUser from "./vhost_user/mod.ts";

export * from "./transport.ts";
export type { ReconnectDelays, VhostUserOptions } from "./vhost_user/mod.ts";
export type { PciVhostUserOptions, ProfileName } from "./pci_vhost_user/mod.ts";
export { BrokenVduseDevice } from "./vduse/mod.ts";
export type * from "./vduse/mod.ts";
export type { PciVdpaOptions } from "./pci_vdpa/mod.ts";

/** Options of any transport, told apart by `transport`. */
export type TransportOptions =
  | vhostUser.VhostUserOptions
  | pciVhostUser.PciVhostUserOptions
  | pciVdpa.PciVdpaOptions
  | vduse.VduseOptions;

/** `vhost-user`, and so on. */
export type TransportName = TransportOptions["transport"];

/** What each transport offers; the one that fits the options is called. */
interface TransportModule {
  addressName(options: TransportOptions): string;
  open(
    options: TransportOptions,
    host: TransportHost,
  ): Transport | Promise<Transport>;
}

// Each takes its own options; `find` picks by their `transport`.
const transports = {
  "vhost-user": vhostUser,
  "PCI-vhost-user": pciVhostUser,
  "PCI-vDPA": pciVdpa,
  VDUSE: vduse,
} as const satisfies Record<TransportName, unknown>;

function find(options: TransportOptions): TransportModule {
  const transport = Object.hasOwn(transports, options.transport)
    ? transports[options.transport]
    : undefined;
  if (transport !== undefined) return transport as TransportModule;
  throw new Vhost2Error(
    "OPTION",
    `Cannot use transport: ${String(options.transport)} (known: ${
      Object.keys(transports).join(", ")
    })`,
  );
}

/** "transport:address", which one process may register once. */
export function targetName(options: TransportOptions): string {
  return `${options.transport}:${find(options).addressName(options)}`;
}

/** Opens the transport that the options name. */
export function openTransport(
  options: TransportOptions,
  host: TransportHost,
): Transport | Promise<Transport> {
  return find(options).open(options, host);
}
