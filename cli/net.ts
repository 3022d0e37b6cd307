/**
 * `vhost2 net`: a network card, served until a signal comes.
 *
 * @module
 */

import process from "node:process";
import {
  discardEnd,
  echoEnd,
  type Net,
  netDevice,
  type NetEnd,
  NetSwitch,
  pcapTap,
  tapEnd,
} from "../devices/mod.ts";
import type { Vhost2Error } from "../ffi/errors.ts";
import { registerTarget, type Target } from "../mod.ts";
import type { NetArguments } from "./net_arguments.ts";
import { describePlace, stopSignal, transportOf } from "./serving.ts";

/** The back-end program conventions of the vhost-user specification. */
export const capabilities = { type: "net" } as const;

function openEnd({ end, numQueues }: NetArguments): NetEnd {
  switch (end.kind) {
    case "tap":
      return tapEnd({ name: end.name, numQueues });
    case "switch":
      return new NetSwitch(end.name);
    case "echo":
      return echoEnd();
    case "discard":
      return discardEnd();
  }
}

function readyLine(options: NetArguments, end: NetEnd): string {
  const { places, numQueues } = options;
  const where = places.map(describePlace).join(", ");
  const { kind } = options.end;
  const what = kind === end.name ? kind : `${kind} ${end.name}`;
  const pairs = numQueues === 1 ? "1 queue pair" : `${numQueues} queue pairs`;
  return `vhost2: ${where} (${what}, ${pairs})`;
}

/**
 * Serves a card until it is to stop: by a signal, or because the one
 * connection that was inherited has ended.
 *
 * @throws Vhost2Error when it cannot be served
 */
export async function serveNet(options: NetArguments): Promise<void> {
  const report = (error: Vhost2Error) =>
    process.stderr.write(`vhost2: ${error.message}\n`);
  const { places, pcap, numQueues, mac, mtu } = options;
  const { workers, pollMicroseconds } = options;
  const targets: Target[] = [];
  let cable: NetEnd = openEnd(options);
  try {
    if (pcap !== undefined) cable = pcapTap(cable, { path: pcap });
    for (const place of places) {
      const nic: Net = netDevice({
        end: cable,
        mac,
        mtu,
        numQueues,
        onError: report,
      });
      targets.push(
        await registerTarget({
          ...transportOf(place),
          ...nic,
          workers,
          pollMicroseconds,
          onError: report,
          trace: options.isVerbose
            ? (line) => process.stderr.write(`${line}\n`)
            : undefined,
        }),
      );
    }
    const stopped = stopSignal();
    console.log(readyLine(options, cable));
    await Promise.race([stopped, ...targets.map(({ closed }) => closed)]);
  } finally {
    for (const target of targets) await target.unregister();
    await cable.close();
  }
}
