/**
 * What the user typed, checked: every mistake is one sentence.
 *
 * @module
 */

import { type NetArguments, parseNet } from "./net_arguments.ts";
import {
  general,
  parse,
  parseCount,
  parsePlace,
  parseSize,
  type Place,
  placeOptions,
  UsageError,
} from "./parsing.ts";
import { parseVdpa, type VdpaArguments } from "./vdpa_arguments.ts";

/** Where a disk's bytes are to be. Sizes in bytes. */
export type DiskSource =
  | { readonly kind: "file"; readonly path: string }
  | { readonly kind: "memory"; readonly size: number }
  | { readonly kind: "null"; readonly size: number };

/** `vhost2 blk`, understood. */
export interface BlkArguments {
  readonly source: DiskSource;
  readonly place: Place;
  readonly isReadOnly: boolean;
  readonly isDirect: boolean;
  /** Guests may be migrated here by postcopy. */
  readonly hasPostcopy: boolean;
  readonly numQueues: number;
  readonly serial: string;
  /** Undefined: what the disk asks for. */
  readonly logicalBlockSize: 512 | 4096 | undefined;
  /** 0: the event loop. */
  readonly workers: number;
  readonly pollMicroseconds: number | undefined;
  readonly isVerbose: boolean;
}

/** What is to be done. */
export type Command =
  | {
    readonly name: "help";
    readonly about: "all" | "blk" | "net" | "vdpa" | "bind";
  }
  | { readonly name: "version" }
  | { readonly name: "capabilities"; readonly of: "blk" | "net" }
  | { readonly name: "blk"; readonly arguments: BlkArguments }
  | { readonly name: "net"; readonly arguments: NetArguments }
  | { readonly name: "vdpa"; readonly arguments: VdpaArguments }
  | {
    readonly name: "bind";
    readonly address: string;
    /** To the kernel's own driver. */
    readonly isBack: boolean;
  };

const blkOptions = {
  ...general,
  ...placeOptions,
  "socket-path": { type: "string" },
  "print-capabilities": { type: "boolean" },
  "blk-file": { type: "string" },
  memory: { type: "string" },
  null: { type: "string" },
  "read-only": { type: "boolean" },
  direct: { type: "boolean" },
  postcopy: { type: "boolean" },
  "num-queues": { type: "string" },
  serial: { type: "string" },
  "logical-block-size": { type: "string" },
  workers: { type: "string" },
  "poll-us": { type: "string" },
  verbose: { type: "boolean", short: "v" },
} as const;

/** Understands the words after the program's name. */
export function parseCommand(words: readonly string[]): Command {
  const [name, ...rest] = words;
  if (name === undefined || name === "help") {
    return { name: "help", about: "all" };
  }
  if (name === "blk") return parseBlk(rest);
  if (name === "net") return parseNet(rest);
  if (name === "vdpa") return parseVdpa(rest);
  if (name === "bind") return parseBind(rest);
  if (!name.startsWith("-")) {
    throw new UsageError(
      `there is no command "${name}" (there is: blk, net, vdpa, bind)`,
    );
  }
  const { values } = parse({ args: [...words], options: general });
  return values.version ? { name: "version" } : { name: "help", about: "all" };
}

const bindOptions = { ...general, back: { type: "boolean" } } as const;

function parseBind(words: string[]): Command {
  const { values, positionals } = parse({
    args: words,
    options: bindOptions,
    allowPositionals: true,
  });
  if (values.help) return { name: "help", about: "bind" };
  if (values.version) return { name: "version" };
  if (positionals.length === 1) {
    return {
      name: "bind",
      address: positionals[0],
      isBack: values.back ?? false,
    };
  }
  throw new UsageError("bind takes the address of one PCI device");
}

function parseBlk(words: string[]): Command {
  const { values } = parse({ args: words, options: blkOptions });
  if (values.help) return { name: "help", about: "blk" };
  if (values.version) return { name: "version" };
  if (values["print-capabilities"]) return { name: "capabilities", of: "blk" };
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
  if (values.postcopy && values.vduse !== undefined) {
    throw new UsageError(
      "--postcopy is of virtual machines on a socket: --vduse has none",
    );
  }
  return {
    name: "blk",
    arguments: {
      source,
      place: parsePlace(values),
      isReadOnly: values["read-only"] ?? false,
      isDirect: values.direct ?? false,
      hasPostcopy: values.postcopy ?? false,
      numQueues: parseCount("num-queues", values["num-queues"] ?? "1", 1, 256),
      serial: values.serial ?? "",
      logicalBlockSize: blockSize === undefined
        ? undefined
        : blockSize === "512"
        ? 512
        : 4096,
      workers: parseCount("workers", values.workers ?? "0", 0, 256),
      pollMicroseconds: values["poll-us"] === undefined
        ? undefined
        : parseCount("poll-us", values["poll-us"], 0, 1_000_000),
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
