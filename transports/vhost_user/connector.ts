/**
 * Connects to a front-end that listens, and again when it has gone.
 *
 * @module
 */

import { constants } from "../../ffi/abi.gen.ts";
import { core } from "../../ffi/core.ts";
import { errnoName, Vhost2Error } from "../../ffi/errors.ts";
import type { Connection, Transport, TransportHost } from "../transport.ts";
import { VhostUserConnection } from "./connection.ts";

const encoder = new TextEncoder();

/** Delays between attempts, doubling from the first to the last. */
export interface ReconnectDelays {
  /** Milliseconds; 100 unless given. */
  readonly minDelayMs?: number;
  /** Milliseconds; 5000 unless given. */
  readonly maxDelayMs?: number;
}

export interface ConnectOptions {
  /** Path of the socket, or a descriptor that is connected already. */
  readonly address: string | { readonly fd: number };
  /** `false`: one attempt, one connection; the host is told of its end. */
  readonly reconnect?: boolean | ReconnectDelays;
}

/**
 * Connects. Without `reconnect` a failed attempt throws; with it the attempts
 * go on, each failure is told to the host once for a row of equal ones.
 */
export function connect(
  options: ConnectOptions,
  host: TransportHost,
): Transport {
  const { address } = options;
  const isPath = typeof address === "string";
  const delays = typeof options.reconnect === "object" ? options.reconnect : {};
  const isRepeated = isPath && options.reconnect !== false;
  const minDelayMs = Math.max(1, delays.minDelayMs ?? 100);
  const maxDelayMs = Math.max(minDelayMs, delays.maxDelayMs ?? 5000);
  let delayMs = minDelayMs;
  let lastErrno: number | undefined = 0;
  let timer: ReturnType<typeof setTimeout> | undefined;
  let current: Connection | undefined;
  let isOpen = true;
  let count = 0;

  const open = (): number => {
    if (!isPath) return address.fd;
    const bytes = encoder.encode(address);
    return core.socketConnect(bytes, bytes.length);
  };

  const retry = () => {
    // The host may have closed us when it was told of the failure.
    if (!isOpen) return;
    timer = setTimeout(attempt, delayMs);
    delayMs = Math.min(delayMs * 2, maxDelayMs);
  };

  const failed = (error: Vhost2Error) => {
    if (!isRepeated) throw error;
    if (error.errno !== lastErrno) host.failed(error);
    lastErrno = error.errno;
    retry();
  };

  const attempt = () => {
    timer = undefined;
    if (!isOpen) return;
    const fd = open();
    if (fd < 0) {
      const error = new Vhost2Error(
        "SYSTEM",
        `Cannot connect to ${address}: ${errnoName(-fd)}`,
        { errno: -fd },
      );
      failed(error);
      return;
    }
    const name = isPath ? `vhost-user:${address}` : `vhost-user:fd ${fd}`;
    try {
      current = new VhostUserConnection(fd, `${name} #${++count}`);
    } catch (error) {
      failed(error as Vhost2Error);
      return;
    }
    lastErrno = 0;
    delayMs = minDelayMs;
    host.connected(current);
  };

  if (!isPath && core.descriptorKind(address.fd) !== constants.kindSocket) {
    throw new Vhost2Error(
      "OPTION",
      `Cannot use descriptor ${address.fd}: it is not a connected socket`,
    );
  }
  attempt();
  return {
    close() {
      isOpen = false;
      clearTimeout(timer);
    },
    disconnected(connection) {
      if (connection !== current) return;
      current = undefined;
      if (!isOpen) return;
      if (isRepeated) retry();
      else host.ended();
    },
  };
}
