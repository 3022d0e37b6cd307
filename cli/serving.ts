/**
 * What all commands that serve have in common.
 *
 * @module
 */

import process from "node:process";
import { constants } from "../ffi/abi.gen.ts";
import { core } from "../ffi/core.ts";
import { Vhost2Error } from "../ffi/errors.ts";
import type { SocketAddress } from "./parsing.ts";

/** Whether an inherited socket is one connection, not a listener. */
export function isConnected(address: SocketAddress): boolean {
  if (typeof address === "string") return false;
  const kind = core.descriptorKind(address.fd);
  if (kind === constants.kindListener) return false;
  if (kind === constants.kindSocket) return true;
  throw new Vhost2Error(
    "OPTION",
    `Cannot use --fd ${address.fd}: it is not a socket`,
  );
}

/** `listening on /tmp/a.sock`, for the line that says so. */
export function describeSocket(
  address: SocketAddress,
  isConnecting: boolean,
): string {
  const how = isConnecting
    ? "connecting to"
    : isConnected(address)
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

/** `Promise.withResolvers` is missing in Node 20. */
export function deferred(): { promise: Promise<void>; resolve: () => void } {
  let resolve = () => {};
  const promise = new Promise<void>((settle) => resolve = settle);
  return { promise, resolve };
}
