/**
 * Listens on a Unix socket and accepts front-ends.
 *
 * @module
 */

import { core } from "../../ffi/core.ts";
import { check, Errno, errnoName, Vhost2Error } from "../../ffi/errors.ts";
import { eventLoop, type Watch } from "../../ffi/event_loop.ts";
import type { Transport, TransportHost } from "../transport.ts";
import { VhostUserConnection } from "./connection.ts";

const encoder = new TextEncoder();
/** After EMFILE: long enough not to spin, short enough not to be noticed. */
const acceptPauseMs = 100;

export interface ListenOptions {
  /** Path of the socket file, or a descriptor that listens already. */
  readonly address: string | { readonly fd: number };
  /** Permission bits of the socket file; the umask decides when absent. */
  readonly socketMode?: number;
}

function openSocket(path: string, mode: number): number {
  const bytes = encoder.encode(path);
  const result = core.socketListen(bytes, bytes.length, mode);
  switch (-result) {
    case Errno.EADDRINUSE:
      throw new Vhost2Error(
        "IN_USE",
        `Cannot listen on ${path}: another process is listening there; stop it or choose another path`,
        { errno: -result },
      );
    case Errno.ENOTSOCK:
      throw new Vhost2Error(
        "IN_USE",
        `Cannot listen on ${path}: a file that is not a socket is there`,
        { errno: -result },
      );
  }
  return check(result, `Cannot listen on ${path}`);
}

/** Listens; a connection is handed to the host as it is accepted. */
export function listen(options: ListenOptions, host: TransportHost): Transport {
  const { address } = options;
  const isPath = typeof address === "string";
  const fd = isPath ? openSocket(address, options.socketMode ?? 0) : address.fd;
  const name = isPath ? `vhost-user:${address}` : `vhost-user:fd ${fd}`;
  let count = 0;
  let isOpen = true;
  let lastErrno = 0;
  let retry: ReturnType<typeof setTimeout> | undefined;

  const accept = () => {
    retry = undefined;
    while (isOpen) {
      const client = core.socketAccept(fd);
      if (client === -Errno.EAGAIN) return;
      if (client < 0) {
        const error = new Vhost2Error(
          "SYSTEM",
          `Cannot accept on ${name}: ${errnoName(-client)}`,
          { errno: -client },
        );
        // Told once for a row of equal ones, not ten times a second.
        if (-client !== lastErrno) host.failed(error);
        lastErrno = -client;
        // No descriptor is free, or no memory: the peer waits in the queue.
        retry = setTimeout(accept, acceptPauseMs);
        return;
      }
      lastErrno = 0;
      let connection;
      try {
        connection = new VhostUserConnection(client, `${name} #${++count}`);
      } catch (error) {
        host.failed(error as Vhost2Error);
        continue;
      }
      host.connected(connection);
    }
  };

  let watch: Watch;
  try {
    watch = eventLoop.watch(fd, () => {
      if (retry === undefined) accept();
    });
  } catch (error) {
    core.descriptorClose(fd);
    throw error;
  }
  return {
    close() {
      if (!isOpen) return;
      isOpen = false;
      clearTimeout(retry);
      watch.close();
      core.descriptorClose(fd);
      if (isPath) {
        const bytes = encoder.encode(address);
        core.socketUnlink(bytes, bytes.length);
      }
    },
    disconnected() {},
  };
}
