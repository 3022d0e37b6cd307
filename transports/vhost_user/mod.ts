/**
 * The transport "vhost-user": a front-end on a Unix socket.
 *
 * @module
 */

import { constants } from "../../ffi/abi.gen.ts";
import { core } from "../../ffi/core.ts";
import type { Transport, TransportHost } from "../transport.ts";
import { connect, type ReconnectDelays } from "./connector.ts";
import { listen } from "./listener.ts";

export type { ReconnectDelays } from "./connector.ts";

/** Options of the transport "vhost-user". */
export interface VhostUserOptions {
  readonly transport: "vhost-user";
  /**
   * Path of the socket, or an inherited descriptor: a listening socket or a
   * connected one, told apart by SO_ACCEPTCONN. The library owns it then.
   */
  readonly address: string | { readonly fd: number };
  /** Connects to a front-end that listens, instead of listening. */
  readonly connect?: boolean;
  /**
   * With `connect`: whether to try again when the front-end is not there or
   * has gone (true unless given), and after which delays. `false`, and a
   * connected descriptor as address: the target ends with its one connection
   * (`target.closed`).
   */
  readonly reconnect?: boolean | ReconnectDelays;
  /** Permission bits of the socket file; the umask decides when absent. */
  readonly socketMode?: number;
}

/** What names the target, for messages and to find doubles. */
export function addressName(options: VhostUserOptions): string {
  return typeof options.address === "string"
    ? options.address
    : `fd ${options.address.fd}`;
}

/** Opens the transport: listening or connecting. */
export function open(
  options: VhostUserOptions,
  host: TransportHost,
): Transport {
  const isConnected = typeof options.address !== "string" &&
    core.descriptorKind(options.address.fd) !== constants.kindListener;
  return options.connect || isConnected
    ? connect(options, host)
    : listen(options, host);
}
