/**
 * What the user typed, checked: every mistake is one sentence.
 *
 * @module
 */

import { parseArgs } from "node:util";

/** A mistake on the command line. */
export class UsageError extends Error {
  override readonly name = "UsageError";
}

/** Where a disk's bytes are to be. Sizes in bytes. */
export type DiskSource =
  | { readonly kind: "file"; readonly path: string }
  | { readonly kind: "memory"; readonly size: number }
  | { readonly kind: "null"; readonly size: number };

/** `vhost2 blk`, understood. */
export interface BlkArguments {
  readonly source: DiskSource;
  readonly address: string | { readonly fd: number };
  readonly isConnecting: boolean;
  readonly isReadOnly: boolean;
  readonly isDirect: boolean;
  readonly numQueues: number;
  readonly serial: string;
  /** Undefined: what the disk asks for. */
  readonly logicalBlockSize: 512 | 4096 | undefined;
  readonly isVerbose: boolean;
}

/** What is to be done. */
export type Command =
  | { readonly name: "help"; readonly about: "all" | "blk" }
  | { readonly name: "version" }
  | { readonly name: "capabilities" }
  | { readonly name: "blk"; readonly arguments: BlkArguments };

const general = {
  help: { type: "boolean", short: "h" },
  version: { type: "boolean", short: "V" },
} as const;

const blkOptions = {
  ...general,
  "socket-path": { type: "string" },
  fd: { type: "string" },
  connect: { type: "boolean" },
  "print-capabilities": { type: "boolean" },
  "blk-file": { type: "string" },
  memory: { type: "string" },
  null: { type: "string" },
  "read-only": { type: "boolean" },
  direct: { type: "boolean" },
  "num-queues": { type: "string" },
  serial: { type: "string" },
  "logical-block-size": { type: "string" },
  verbose: { type: "boolean", short: "v" },
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

function parseCount(
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

function parse<T extends NonNullable<Parameters<typeof parseArgs>[0]>>(
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

/** Understands the words after the program's name. */
export function parseCommand(words: readonly string[]): Command {
  const [name, ...rest] = words;
  if (name === undefined || name === "help") {
    return { name: "help", about: "all" };
  }
  if (name === "blk") return parseBlk(rest);
  if (!name.startsWith("-")) {
    throw new UsageError(`there is no command "${name}" (there is: blk)`);
  }
  const { values } = parse({ args: [...words], options: general });
  return values.version ? { name: "version" } : { name: "help", about: "all" };
}

function parseBlk(words: string[]): Command {
  const { values } = parse({ args: words, options: blkOptions });
  if (values.help) return { name: "help", about: "blk" };
  if (values.version) return { name: "version" };
  if (values["print-capabilities"]) return { name: "capabilities" };
  const blockSize = values["logical-block-size"];
  if (![undefined, "512", "4096"].includes(blockSize)) {
    throw new UsageError(
      `--logical-block-size is 512 or 4096, not "${blockSize}"`,
    );
  }
  const source = parseSource(values);
  if (values.direct && source.kind !== "file") {
    throw new UsageError("--direct needs --blk-file: only files have a cache");
  }
  return {
    name: "blk",
    arguments: {
      source,
      address: parseAddress(values),
      isConnecting: values.connect ?? false,
      isReadOnly: values["read-only"] ?? false,
      isDirect: values.direct ?? false,
      numQueues: parseCount("num-queues", values["num-queues"] ?? "1", 1, 256),
      serial: values.serial ?? "",
      logicalBlockSize: blockSize === undefined
        ? undefined
        : blockSize === "512"
        ? 512
        : 4096,
      isVerbose: values.verbose ?? false,
    },
  };
}

function parseSource(
  values: { "blk-file"?: string; memory?: string; null?: string },
): DiskSource {
  const { "blk-file": path, memory, null: size } = values;
  const given = [
    path === undefined ? "" : "--blk-file",
    memory === undefined ? "" : "--memory",
    size === undefined ? "" : "--null",
  ].filter((name) => name !== "");
  if (given.length > 1) {
    throw new UsageError(
      `${given.join(" and ")} exclude each other: a disk is in one place`,
    );
  }
  if (path !== undefined) return { kind: "file", path };
  if (memory !== undefined) {
    return { kind: "memory", size: parseSize("memory", memory) };
  }
  if (size !== undefined) {
    return { kind: "null", size: parseSize("null", size) };
  }
  throw new UsageError(
    "a disk needs --blk-file PATH, --memory SIZE or --null SIZE",
  );
}

function parseAddress(
  values: { "socket-path"?: string; fd?: string; connect?: boolean },
): BlkArguments["address"] {
  const { "socket-path": path, fd, connect } = values;
  if (path !== undefined && fd !== undefined) {
    throw new UsageError("--socket-path and --fd exclude each other");
  }
  if (path !== undefined) return path;
  if (fd === undefined) {
    throw new UsageError("a socket is needed: --socket-path PATH or --fd N");
  }
  if (connect) throw new UsageError("--connect needs --socket-path");
  return { fd: parseCount("fd", fd, 0, 2 ** 31 - 1) };
}
