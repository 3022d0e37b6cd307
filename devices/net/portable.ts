/**
 * A network device in a Worker: made of what can travel there.
 *
 * @module
 */

import type { Vhost2Error } from "../../ffi/errors.ts";
import type { Device } from "../../session/device.ts";
import type { TargetOps } from "../../session/target_ops.ts";
import type { NetProperties } from "./config.ts";
import { NetDevice } from "./device.ts";
import { discardEnd } from "./ends/discard.ts";
import { echoEnd } from "./ends/echo.ts";
import type { NetEnd, PortableEnd } from "./ends/end.ts";
import { capturing } from "./ends/pcap.ts";
import { PcapFile } from "./ends/pcap_file.ts";
import { sharedTapEnd } from "./ends/tap.ts";
import { NetStatistics } from "./statistics.ts";

/** A device on its way to a Worker. */
export interface PortableNic {
  readonly properties: NetProperties;
  readonly pollMicroseconds: number | undefined;
  /** See `NetStatistics.memory`. */
  readonly counts: SharedArrayBuffer;
  /** Null: the module that the Worker imports makes it. */
  readonly end: PortableEnd | null;
  /** For the module, what `EndModule.options` says. */
  readonly options: unknown;
}

/** What a Worker imports. */
export const portableModule = {
  module: import.meta.url,
  name: "portableDevice",
} as const;

function open(end: PortableEnd): NetEnd {
  switch (end.kind) {
    case "echo":
      return echoEnd();
    case "discard":
      return discardEnd();
    case "tap":
      return sharedTapEnd(end.name, end.fds);
    case "pcap":
      return capturing(open(end.end), PcapFile.join(end.capture));
  }
}

/** What the registering thread's instances have in common with its handle. */
export interface Registered {
  readonly statistics: NetStatistics;
  readonly connected: Set<NetDevice>;
  readonly isLinkUp: () => boolean;
  report(error: Vhost2Error, device: Device): void;
}

/** By what is the same object in the registering thread, a copy in Workers. */
const registered = new WeakMap<PortableNic, Registered>();

/** For `netDevice`: devices of it that are made in this isolate are its own. */
export function registerNic(nic: PortableNic, owner: Registered): void {
  registered.set(nic, owner);
}

/** An end that this isolate has made, while devices of it are here. */
interface OpenEnd {
  readonly end: NetEnd;
  readonly statistics: NetStatistics;
  users: number;
}

const opened = new Map<PortableNic, OpenEnd>();

function openEnd(portable: PortableNic, make: () => NetEnd): OpenEnd {
  const found = opened.get(portable);
  if (found !== undefined) return found;
  const end = make();
  const { pairCount } = portable.properties;
  const statistics = registered.get(portable)?.statistics ??
    new NetStatistics(pairCount, portable.counts);
  const made = { end, statistics, users: 0 };
  opened.set(portable, made);
  return made;
}

function leaveEnd(portable: PortableNic, left: OpenEnd): void {
  if (--left.users > 0) return;
  opened.delete(portable);
  if (!registered.has(portable)) left.statistics.leave();
  left.end.close();
}

/** The instance of a device that serves queues in this isolate. */
function serve(
  device: Device,
  portable: PortableNic,
  make: () => NetEnd,
): NetDevice {
  const owner = registered.get(portable);
  const held = openEnd(portable, make);
  held.users++;
  const { end, statistics } = held;
  const { properties, pollMicroseconds } = portable;
  const report = owner?.report ?? ((error, device) => device.report(error));
  const leave = () => {
    owner?.connected.delete(made);
    leaveEnd(portable, held);
  };
  let made: NetDevice;
  try {
    made = new NetDevice(
      device,
      { properties, pollMicroseconds, statistics, end, report },
      leave,
    );
  } catch (error) {
    leaveEnd(portable, held);
    throw error;
  }
  return made;
}

/** The same where Workers serve the queues, and have the end. */
function represent(device: Device, portable: PortableNic): NetDevice {
  const owner = registered.get(portable)!;
  const { properties, pollMicroseconds } = portable;
  const { statistics, report } = owner;
  const made: NetDevice = new NetDevice(
    device,
    { properties, pollMicroseconds, statistics, end: null, report },
    () => owner.connected.delete(made),
  );
  return made;
}

/** Makes an instance, in whatever isolate. */
function instantiate(
  device: Device,
  portable: PortableNic,
  make: () => NetEnd,
): TargetOps {
  const owner = registered.get(portable);
  if (owner === undefined) {
    const made = serve(device, portable, make);
    // No op tells a Worker that the front-end has gone.
    device.signal.addEventListener("abort", () => made.deviceDestroy(), {
      once: true,
    });
    return made;
  }
  const made = device.servesQueues
    ? serve(device, portable, make)
    : represent(device, portable);
  owner.connected.add(made);
  made.setLink(owner.isLinkUp());
  return made;
}

/** The instance of a device with one of our ends in a Worker. */
export function portableDevice(
  device: Device,
  portable: PortableNic,
): TargetOps {
  return instantiate(device, portable, () => open(portable.end!));
}

/**
 * What a module exports whose code is behind a network device, in Workers too:
 * name the module in `NetOptions.end`. Each isolate that serves queues of the
 * device makes an end of its own when the first front-end has come, and closes
 * it when the last one has gone. What ends have to have in common must be in
 * memory of `options` (a SharedArrayBuffer).
 *
 * @param make makes the end: `burstEnd()`, `streamEnd()`, or an object of
 * one's own; its argument is `EndModule.options`
 *
 * @example The module of a card that counts frames and keeps them
 * ```ts
 * import { endFactory } from "vhost2";
 * export const counter = endFactory((shared: SharedArrayBuffer) => {
 *   const count = new Int32Array(shared);
 *   return {
 *     name: "counter",
 *     offloads: 0,
 *     endsByEvents: true,
 *     open: () => ({
 *       receive: (frames) => void Atomics.add(count, 0, frames.count),
 *       close() {},
 *     }),
 *     close() {},
 *   };
 * });
 * if (typeof counter !== "function") throw new Error();
 * ```
 */
export function endFactory<Options>(
  make: (options: Options) => NetEnd,
): (device: Device, options: unknown) => TargetOps {
  return (device, options) => {
    const portable = options as PortableNic;
    return instantiate(
      device,
      portable,
      () => make(portable.options as Options),
    );
  };
}
