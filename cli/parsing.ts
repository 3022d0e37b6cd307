/**
 * What the options of all commands have in common.
 *
 * @module
 */

import { parseArgs } from "node:util";

/** A mistake on the command line. */
export class UsageError extends Error {
  override readonly name = "UsageError";
}

/** The socket: its path, or inherited. */
export type SocketAddress = string | { readonly fd: number };

/** A socket, and which side of it is ours. */
export interface SocketPlace {
  readonly kind: "socket";
  readonly address: SocketAddress;
  readonly isConnecting: boolean;
}

/** How the front-end comes: over a socket, or it is this machine's kernel. */
export type Place =
  | SocketPlace
  | {
    readonly kind: "vduse";
    readonly name: string;
    readonly isAttached: boolean;
    readonly stays: boolean;
  };

/** Options of every command. */
export const general = {
  help: { type: "boolean", short: "h" },
  version: { type: "boolean", short: "V" },
} as const;

const units: Record<string, number> = {
  "": 1,
  K: 2 ** 10,
  M: 2 ** 20,
  G: 2 ** 30,
  T: 2 ** 40,
};

/** Bytes of `64M`, `1GiB`, `512`. */
export function parseSize(option: string, text: string): number {
  const found = /^(\d+)(?:([KMGT])(?:i?B)?)?$/i.exec(text);
  const size = found === null
    ? NaN
    : Number(found[1]) * units[(found[2] ?? "").toUpperCase()];
  if (Number.isSafeInteger(size) && size > 0) return size;
  throw new UsageError(
    `--${option} takes a size such as 512M or 2G, not "${text}"`,
  );
}

/** A whole number within limits. */
export function parseCount(
  option: string,
  text: string,
  least: number,
  most: number,
): number {
  const value = /^\d+$/.test(text) ? Number(text) : NaN;
  if (value >= least && value <= most) return value;
  throw new UsageError(
    `--${option} takes a number from ${least} to ${most}, not "${text}"`,
  );
}

/** The parser's own mistakes as ours. */
export function parse<T extends NonNullable<Parameters<typeof parseArgs>[0]>>(
  config: T,
): ReturnType<typeof parseArgs<T>> {
  try {
    return parseArgs(config);
  } catch (error) {
    // The parser adds advice about "--" after its first sentence.
    const [sentence] = (error as Error).message.split(". ");
    throw new UsageError(sentence.replace(/\.$/, ""));
  }
}

/** Of `parsePlace`; some commands take more than one socket. */
export const placeOptions = {
  fd: { type: "string" },
  connect: { type: "boolean" },
  vduse: { type: "string" },
  "no-attach": { type: "boolean" },
  stay: { type: "boolean" },
} as const;

interface PlaceValues {
  "socket-path"?: string;
  fd?: string;
  connect?: boolean;
  vduse?: string;
  "no-attach"?: boolean;
  stay?: boolean;
}

/** Where the front-end is. */
export function parsePlace(values: PlaceValues): Place {
  const { vduse: name, "no-attach": isLeftOut = false, stay = false } = values;
  if (name === undefined) {
    if (isLeftOut || stay) {
      throw new UsageError("--no-attach and --stay need --vduse");
    }
    return parseSocket(values, "; or --vduse NAME");
  }
  const { "socket-path": path, fd, connect } = values;
  if (path !== undefined || fd !== undefined || connect) {
    throw new UsageError(
      "--vduse excludes --socket-path, --fd and --connect: there is no socket",
    );
  }
  return { kind: "vduse", name, isAttached: !isLeftOut, stays: stay };
}

interface SocketValues {
  "socket-path"?: string;
  fd?: string;
  connect?: boolean;
}

/** Which socket; `instead`: what else the command takes, for its message. */
export function parseSocket(values: SocketValues, instead = ""): SocketPlace {
  const address = parseAddress(values, instead);
  return { kind: "socket", address, isConnecting: values.connect ?? false };
}

function parseAddress(values: SocketValues, instead: string): SocketAddress {
  const { "socket-path": path, fd, connect } = values;
  if (path !== undefined && fd !== undefined) {
    throw new UsageError("--socket-path and --fd exclude each other");
  }
  if (path !== undefined) return path;
  if (fd === undefined) {
    throw new UsageError(
      `a socket is needed: --socket-path PATH or --fd N${instead}`,
    );
  }
  if (connect) throw new UsageError("--connect needs --socket-path");
  return { fd: parseCount("fd", fd, 0, 2 ** 31 - 1) };
}
