/**
 * Network devices (virtio 1.3, section 5.1).
 *
 * @module
 */

import { Vhost2Error } from "../../ffi/errors.ts";
import { featureMask, ProtocolFeature } from "../../protocol/features.ts";
import type { Device } from "../../session/device.ts";
import type { DeviceModule } from "../../session/device_module.ts";
import {
  netFeatures,
  type NetProperties,
  parseMac,
  randomMac,
} from "./config.ts";
import { virtqueueProtocolFeatures } from "../../virtqueue/mod.ts";
import { requireInteger } from "../limits.ts";
import { NetDevice, type Nic, sharedBytes } from "./device.ts";
import type { NetEnd } from "./ends/end.ts";
import { type FrameStreams, streamEnd } from "./ends/stream.ts";
import { portableModule, type PortableNic, registerNic } from "./portable.ts";
import { NetStatistics } from "./statistics.ts";

export { type BurstEnd, burstEnd } from "./ends/burst.ts";
export { discardEnd } from "./ends/discard.ts";
export { echoEnd } from "./ends/echo.ts";
export {
  type EndPort,
  type NetEnd,
  type NetLink,
  Offload,
  type PortableCapture,
  type PortableEnd,
} from "./ends/end.ts";
export { type PcapOptions, pcapTap } from "./ends/pcap.ts";
export { type FrameStreams, streamEnd } from "./ends/stream.ts";
export { NetSwitch } from "./ends/switch.ts";
export { tapEnd, type TapOptions } from "./ends/tap.ts";
export { NetFeature } from "./config.ts";
export { Frames, NetHeader } from "./frames.ts";
export { endFactory } from "./portable.ts";
export { type NetCounts, NetStatistics } from "./statistics.ts";

/** An end named by its module, so that it can be made in Workers. */
export interface EndModule {
  /** Absolute URL, as `import.meta.resolve("./firewall.ts")` gives it. */
  readonly module: string | URL;
  /** Name of the module's `endFactory`; "default" unless given. */
  readonly name?: string;
  /**
   * What the factory is given: in each Worker a structured clone. Memory in a
   * SharedArrayBuffer is common to all.
   */
  readonly options?: unknown;
  /** `NetEnd.offloads` of the ends that it makes; 0 unless given. */
  readonly offloads?: number;
}

/** A network device's options. */
export interface NetOptions {
  /**
   * Where its frames go and come from: an end, a pair of Web Streams, or a
   * module of one's own. In Workers (`workers` of the target) an echo, discard
   * and TAP end, a capture of these, and modules; a switch, streams and a burst
   * end belong to the thread that has made them.
   */
  readonly end: NetEnd | FrameStreams | EndModule;
  /** The station's address, `52:54:00:12:34:56`; random unless given. */
  readonly mac?: string;
  /** Bytes that a frame may carry, told to the driver; 68 to 65535. */
  readonly mtu?: number;
  /** Queue pairs at most, 1 to 127; 1 unless given. */
  readonly numQueues?: number;
  /**
   * Microseconds to look for more after the last work; the target's
   * `pollMicroseconds` unless given.
   */
  readonly pollMicroseconds?: number;
  /**
   * Told what went wrong, where it was not the guest's fault. Unless given
   * such errors are written to the console. Of what Workers serve the target's
   * `onError` is told.
   */
  readonly onError?: (error: Vhost2Error, device: Device) => void;
}

/** A network device: spread it into the options of `registerTarget`. */
export interface Net {
  /** Virtio features that it offers. */
  readonly features: bigint;
  /** vhost-user's: RARP, NET_MTU and, for migration, LOG_SHMFD. */
  readonly protocolFeatures: bigint;
  readonly queueCount: number;
  readonly deviceType: "net";
  /** A disabled queue's frames are dropped. */
  readonly runsDisabledRings: true;
  /** Makes the device of a front-end, in Workers too. */
  readonly device: DeviceModule;
  /** What went through it. */
  readonly statistics: NetStatistics;
  /** The address that drivers are told. */
  readonly mac: string;
  /** Pulls the guests' cable, or plugs it in again. */
  setLink(isUp: boolean): void;
  /** Asks guests to announce themselves to their network (GUEST_ANNOUNCE). */
  announce(): void;
  /** Closes the end: after the targets were unregistered. */
  close(): Promise<void>;
  [Symbol.asyncDispose](): Promise<void>;
}

/** What a device's queues and its instances have in common. */
const common = { sharedBytes, queuesTogether: 2 } as const;

/** What depends on where the end is. */
interface Parts {
  readonly device: DeviceModule;
  close(): void | Promise<void>;
}

/**
 * A network device, for as many front-ends at once as its end has ports.
 *
 * @param options its end, and what it says of itself
 * @returns what `registerTarget` needs, and the handle of the device
 * @throws Vhost2Error OPTION for unusable options
 *
 * @example A network card that sends each frame back
 * ```ts
 * import { echoEnd, netDevice, registerTarget } from "vhost2";
 * await using nic = netDevice({ end: echoEnd(), mac: "52:54:00:12:34:56" });
 * await using target = await registerTarget({
 *   transport: "vhost-user",
 *   address: `${Deno.makeTempDirSync()}/net.sock`,
 *   ...nic,
 * });
 * const { fromGuest } = nic.statistics.snapshot();
 * if (fromGuest.packets !== 0) throw new Error(target.name);
 * ```
 *
 * @example Two queue pairs, each in a Worker of its own
 * ```ts
 * import { echoEnd, netDevice, registerTarget } from "vhost2";
 * await using nic = netDevice({ end: echoEnd(), numQueues: 2 });
 * await using target = await registerTarget({
 *   transport: "vhost-user",
 *   address: `${Deno.makeTempDirSync()}/net.sock`,
 *   ...nic,
 *   workers: 2,
 * });
 * if (target.devices.length !== 0) throw new Error("nobody has connected");
 * ```
 */
export function netDevice(options: NetOptions): Net {
  const end = "readable" in options.end ? streamEnd(options.end) : options.end;
  const mac = options.mac === undefined ? randomMac() : parseMac(options.mac);
  const properties: NetProperties = {
    mac,
    pairCount: requireInteger("numQueues", options.numQueues ?? 1, 1, 127),
    mtu: options.mtu === undefined
      ? 0
      : requireInteger("mtu", options.mtu, 68, 65535),
    offloads: end.offloads ?? 0,
  };
  const statistics = new NetStatistics(properties.pairCount);
  const connected = new Set<NetDevice>();
  let isLinkUp = true;
  const report = (error: Vhost2Error, device: Device) => {
    try {
      if (options.onError === undefined) console.error(error.message);
      else options.onError(error, device);
    } catch (failure) {
      console.error("onError of a network device failed:", failure);
    }
  };
  const portable = {
    properties,
    pollMicroseconds: options.pollMicroseconds,
    counts: statistics.memory,
  };
  const parts = "module" in end
    ? moduleParts(end, { ...portable, end: null, options: end.options })
    : endParts(end);

  /** Of an end that a module makes, where it is needed. */
  function moduleParts(end: EndModule, nic: PortableNic): Parts {
    registerNic(nic, {
      statistics,
      connected,
      isLinkUp: () => isLinkUp,
      report,
    });
    const { module, name } = end;
    return { device: { module, name, options: nic, ...common }, close() {} };
  }

  /** Of an end that is here. */
  function endParts(end: NetEnd): Parts {
    const { pollMicroseconds } = options;
    const nic: Nic = { properties, pollMicroseconds, statistics, end, report };
    const device: DeviceModule = {
      ...portableModule,
      ...common,
      create(device) {
        const made = new NetDevice(device, nic, () => connected.delete(made));
        connected.add(made);
        made.setLink(isLinkUp);
        return made;
      },
      get options(): PortableNic {
        if (end.toPortable !== undefined) {
          return { ...portable, end: end.toPortable(), options: undefined };
        }
        throw new Vhost2Error(
          "OPTION",
          `Cannot serve this network device in Workers: its end (${end.name}) is of this isolate (name a module with an endFactory)`,
        );
      },
    };
    return { device, close: () => end.close() };
  }

  let closed: Promise<void> | undefined;
  const close = (): Promise<void> =>
    closed ??= (async () => await parts.close())();
  return {
    features: netFeatures(properties),
    protocolFeatures: virtqueueProtocolFeatures | featureMask(
      ProtocolFeature.RARP,
      ProtocolFeature.NET_MTU,
    ),
    // And the control queue.
    queueCount: 2 * properties.pairCount + 1,
    deviceType: "net",
    runsDisabledRings: true,
    device: parts.device,
    statistics,
    mac: Array.from(mac, (byte) => byte.toString(16).padStart(2, "0"))
      .join(":"),
    setLink(isUp) {
      isLinkUp = isUp;
      for (const device of connected) device.setLink(isUp);
    },
    announce() {
      for (const device of connected) device.announce();
    },
    close,
    [Symbol.asyncDispose]: close,
  };
}
