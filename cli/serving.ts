/**
 * What all commands that serve have in common.
 *
 * @module
 */

import process from "node:process";
import { constants } from "../ffi/abi.gen.ts";
import { core } from "../ffi/core.ts";
import { Vhost2Error } from "../ffi/errors.ts";
import type { TransportOptions } from "../mod.ts";
import type { Place } from "./parsing.ts";

/** Those on which a device of ours is served. */
type SoftwareTransport = Exclude<
  TransportOptions,
  { readonly transport: "PCI-vDPA" }
>;

/** The transport for `registerTarget`. */
export function transportOf(place: Place): SoftwareTransport {
  if (place.kind === "socket") {
    const { address, isConnecting } = place;
    return { transport: "vhost-user", address, connect: isConnecting };
  }
  return {
    transport: "VDUSE",
    address: place.name,
    attach: place.isAttached,
    stay: place.stays,
  };
}

/** Whether an inherited socket is one connection, not a listener. */
function isConnected(place: Place): boolean {
  if (place.kind !== "socket" || typeof place.address === "string") {
    return false;
  }
  const { address } = place;
  const kind = core.descriptorKind(address.fd);
  if (kind === constants.kindListener) return false;
  if (kind === constants.kindSocket) return true;
  throw new Vhost2Error(
    "OPTION",
    `Cannot use --fd ${address.fd}: it is not a socket`,
  );
}

/** `listening on /tmp/a.sock`, for the line that says so. */
export function describePlace(place: Place): string {
  if (place.kind === "vduse") return `serving VDUSE device ${place.name}`;
  const { address, isConnecting } = place;
  const how = isConnecting
    ? "connecting to"
    : isConnected(place)
    ? "serving"
    : "listening on";
  const where = typeof address === "string" ? address : `fd ${address.fd}`;
  return `${how} ${where}`;
}

/** Resolves with the first SIGINT or SIGTERM; a second one ends at once. */
export function stopSignal(): Promise<void> {
  return new Promise((resolve) => {
    let isStopping = false;
    const stop = () => {
      if (isStopping) process.exit(1);
      isStopping = true;
      resolve();
    };
    process.on("SIGINT", stop);
    process.on("SIGTERM", stop);
  });
}
