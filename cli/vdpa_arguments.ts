/**
 * The words after `vhost2 vdpa`, checked.
 *
 * @module
 */

import type { Command } from "./arguments.ts";
import {
  general,
  parse,
  parseCount,
  parseSocket,
  type SocketPlace,
  UsageError,
} from "./parsing.ts";

/** `vhost2 vdpa`, understood. */
export interface VdpaArguments {
  /** Of the PCI device. */
  readonly device: string;
  readonly place: SocketPlace;
  /** Packed rings are offered where the device has them. */
  readonly hasPacked: boolean;
  /** Undefined: all that the device has. */
  readonly numQueues: number | undefined;
  readonly isVerbose: boolean;
}

const vdpaOptions = {
  ...general,
  "socket-path": { type: "string" },
  fd: { type: "string" },
  connect: { type: "boolean" },
  packed: { type: "boolean" },
  "num-queues": { type: "string" },
  verbose: { type: "boolean", short: "v" },
} as const;

/** Understands them. */
export function parseVdpa(words: string[]): Command {
  const { values, positionals } = parse({
    args: words,
    options: vdpaOptions,
    allowPositionals: true,
  });
  if (values.help) return { name: "help", about: "vdpa" };
  if (values.version) return { name: "version" };
  if (positionals.length !== 1) {
    throw new UsageError("vdpa takes the address of one PCI device");
  }
  const queues = values["num-queues"];
  return {
    name: "vdpa",
    arguments: {
      device: positionals[0],
      place: parseSocket(values),
      hasPacked: values.packed ?? false,
      numQueues: queues === undefined
        ? undefined
        : parseCount("num-queues", queues, 1, 256),
      isVerbose: values.verbose ?? false,
    },
  };
}
