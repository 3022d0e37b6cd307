/**
 * The words after `vhost2 net`, checked.
 *
 * @module
 */

import type { Command } from "./arguments.ts";
import {
  general,
  parse,
  parseCount,
  parsePlace,
  type Place,
  placeOptions,
  UsageError,
} from "./parsing.ts";

/** What is at the other end of the cable. */
export type CableEnd =
  | { readonly kind: "tap" | "switch"; readonly name: string }
  | { readonly kind: "echo" | "discard" };

/** `vhost2 net`, understood. */
export interface NetArguments {
  readonly end: CableEnd;
  /** More than one for a switch only. */
  readonly places: readonly Place[];
  readonly pcap: string | undefined;
  /** Queue pairs. */
  readonly numQueues: number;
  readonly mac: string | undefined;
  readonly mtu: number | undefined;
  readonly workers: number;
  readonly pollMicroseconds: number | undefined;
  readonly isVerbose: boolean;
}

const netOptions = {
  ...general,
  ...placeOptions,
  "socket-path": { type: "string", multiple: true },
  "print-capabilities": { type: "boolean" },
  tap: { type: "string" },
  switch: { type: "string" },
  echo: { type: "boolean" },
  discard: { type: "boolean" },
  pcap: { type: "string" },
  "num-queues": { type: "string" },
  mac: { type: "string" },
  mtu: { type: "string" },
  workers: { type: "string" },
  "poll-us": { type: "string" },
  verbose: { type: "boolean", short: "v" },
} as const;

/** Understands them. */
export function parseNet(words: string[]): Command {
  const { values } = parse({ args: words, options: netOptions });
  if (values.help) return { name: "help", about: "net" };
  if (values.version) return { name: "version" };
  if (values["print-capabilities"]) return { name: "capabilities", of: "net" };
  const end = parseEnd(values);
  const paths = values["socket-path"] ?? [];
  if (paths.length > 1 && end.kind !== "switch") {
    throw new UsageError("only a --switch takes more than one --socket-path");
  }
  const { mac, mtu } = values;
  if (paths.length > 1 && mac !== undefined) {
    throw new UsageError("--mac needs a single --socket-path");
  }
  const workers = parseCount("workers", values.workers ?? "0", 0, 256);
  if (workers > 0 && end.kind === "switch") {
    throw new UsageError(
      "a --switch is in one thread: it takes no --workers",
    );
  }
  const numQueues = parseCount(
    "num-queues",
    values["num-queues"] ?? "1",
    1,
    127,
  );
  if (numQueues > 1 && values.vduse !== undefined) {
    throw new UsageError(
      `--num-queues ${numQueues} is too much for --vduse: the kernel takes cards with one queue pair`,
    );
  }
  const polled = values["poll-us"];
  return {
    name: "net",
    arguments: {
      end,
      places: (paths.length > 1 ? paths : [paths[0]]).map((path) =>
        parsePlace({ ...values, "socket-path": path })
      ),
      pcap: values.pcap,
      numQueues,
      mac,
      mtu: mtu === undefined ? undefined : parseCount("mtu", mtu, 68, 65535),
      workers,
      pollMicroseconds: polled === undefined
        ? undefined
        : parseCount("poll-us", polled, 0, 1_000_000),
      isVerbose: values.verbose ?? false,
    },
  };
}

function parseEnd(
  values: {
    tap?: string;
    switch?: string;
    echo?: boolean;
    discard?: boolean;
  },
): CableEnd {
  const kinds = ["tap", "switch", "echo", "discard"] as const;
  const given = kinds.filter((kind) => values[kind] !== undefined);
  if (given.length > 1) {
    throw new UsageError(
      `${
        given.map((kind) => `--${kind}`).join(" and ")
      } exclude each other: a cable has one other end`,
    );
  }
  const [kind] = given;
  switch (kind) {
    case undefined:
      throw new UsageError(
        "a card needs --tap NAME, --switch NAME, --echo or --discard",
      );
    case "tap":
    case "switch": {
      const name = values[kind]!;
      if (name === "") throw new UsageError(`--${kind} takes a name`);
      return { kind, name };
    }
    default:
      return { kind };
  }
}
