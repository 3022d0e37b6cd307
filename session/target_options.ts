/**
 * The options of a target, and what of them cannot be used.
 *
 * @module
 */

import { core } from "../ffi/core.ts";
import { Vhost2Error } from "../ffi/errors.ts";
import type { DataPath, TransportOptions } from "../transports/mod.ts";
import { declarableProtocolFeatures } from "./class_messages.ts";
import type { Device } from "./device.ts";
import type { DeviceFactory, DeviceModule } from "./device_module.ts";
import { openUserfault } from "./postcopy.ts";
import { refusalOfSizes } from "./shared_memory.ts";

/** SET_VRING_KICK has 8 bits for the index. */
const maxQueueCount = 256;
/** More than a machine has processors is no use. */
const maxWorkers = 256;
const maxPollMicroseconds = 1_000_000;
const maxPostcopyTimeoutMs = 2 ** 32 - 1;

/** Options of `registerTarget`, beside those of the transport. */
export interface DeviceOptions {
  /**
   * Virtio features offered, as a mask. The library appends VERSION_1 and
   * PROTOCOL_FEATURES (LOG_ALL with LOG_SHMFD) and nothing else: ring features
   * such as INDIRECT or EVENT_IDX are the business of whoever processes the
   * rings (`virtqueueFeatures` for devices that use `virtqueue/`).
   */
  readonly features?: bigint;
  /**
   * Protocol features to offer beside the library's, as a mask: RARP, NET_MTU
   * and CRYPTO_SESSION, whose messages reach `customMessage`;
   * INBAND_NOTIFICATIONS, for front-ends that send kicks as messages (QEMU
   * does not, but acks the feature); and LOG_SHMFD, without which QEMU migrates
   * no guest, where all that the device writes into the guest is logged: so
   * does `virtqueue/` (`virtqueueProtocolFeatures`); who writes by himself uses
   * `device.markDirty` and `queue.markUsed`. INFLIGHT_SHMFD and what builds on
   * it (`recoveryProtocolFeatures`) are for devices that use `virtqueue/` and
   * whose requests may be done twice.
   */
  readonly protocolFeatures?: bigint;
  /**
   * The type of device, where somebody has to know: `"gpu"` opens
   * GPU_SET_SOCKET, and the kernel (VDUSE) takes `"block"` and `"net"`.
   */
  readonly deviceType?: string;
  /**
   * Bytes of each VIRTIO shared memory region by its id, multiples of 4096; 0
   * where there is none. With any, SHMEM is offered and `device.mapShared` maps
   * files into them.
   */
  readonly sharedMemory?: readonly number[];
  /**
   * Offers postcopy migration (PAGEFAULT) to a front-end that migrates a guest
   * here; false unless given. It takes the place of CONFIGURE_MEM_SLOTS, with
   * which the specification forbids it: guest memory then has at most 8
   * regions, of memfd, tmpfs or hugetlbfs.
   *
   * While a page of the guest is still on the other machine, **the thread that
   * touches it sleeps** until the front-end has filled it, and with it every
   * target of that thread: where other guests must not wait for the network of
   * this one, give it a process of its own. Nothing in this process is needed
   * for the page to come; the front-end must be another process. When it dies
   * first, the sleepers wake up, the memory is revoked and the device ends; so
   * it does when the front-end lives and this thread has slept for
   * `postcopyTimeoutMs`, or SIGINT or SIGTERM comes, which is handled within
   * half a second. A Worker that sleeps is waited for until the target is
   * unregistered.
   *
   * `registerTarget` throws SYSTEM, with the reason, where the kernel refuses
   * a userfaultfd that covers system calls: it takes CAP_SYS_PTRACE, access to
   * /dev/userfaultfd, or `sysctl vm.unprivileged_userfaultfd=1`.
   */
  readonly postcopy?: boolean;
  /**
   * Milliseconds for which this thread may sleep on a page of a guest's that
   * migrates here, 1000 and more or `Infinity`; 60000 unless given. A thread
   * that was busy with something else for as long is taken to have slept.
   */
  readonly postcopyTimeoutMs?: number;
  /** Queues at most, 1 to 256; 1 unless given. */
  readonly queueCount?: number;
  /**
   * Whether rings run while they are disabled (`queue.isEnabled`), as those of
   * a network card do: frames sent are dropped, none are received. Otherwise,
   * and unless given, a disabled ring is a stopped one. A change of it calls
   * `queueKick`; in Workers it stops the queue and starts it again.
   */
  readonly runsDisabledRings?: boolean;
  /**
   * Called once per front-end that connects; what it returns is the user's
   * device. Or the module that exports such a function, which Workers need.
   */
  readonly device: DeviceFactory | DeviceModule;
  /**
   * How many Workers serve the queues; 0, the event loop of this thread, unless
   * given. Each Worker makes an instance of each device, whose `queueStart`,
   * `queueStop` and `queueKick` are called there, for the Worker's queues; all
   * other ops are called here, on an instance of this thread's. `Device.shared`
   * is common to the instances of a device.
   */
  readonly workers?: number;
  /**
   * Microseconds to go on looking at a queue after its last work, before its
   * processor sleeps; 50 unless given. 0 saves processor time, more saves
   * wake-ups.
   */
  readonly pollMicroseconds?: number;
  /**
   * Told what went wrong with a front-end, an op or the transport. Unless
   * given such errors are written to the console.
   */
  readonly onError?: (error: Vhost2Error, device: Device | null) => void;
  /** Given one line for each message received and sent. */
  readonly trace?: (line: string) => void;
}

/**
 * The same for a device that is there already: all of it is offered, of
 * `features` and `queueCount` no more than is said, and nobody need look on.
 */
export interface PassedOnOptions extends
  Pick<
    DeviceOptions,
    | "features"
    | "protocolFeatures"
    | "deviceType"
    | "queueCount"
    | "onError"
    | "trace"
  > {
  /** Its ops observe, and change what passes by; the device does the work. */
  readonly device?: DeviceFactory | DeviceModule;
}

type PassedOn = Extract<TransportOptions, { readonly transport: "PCI-vDPA" }>;

/** Options of `registerTarget`. */
export type TargetOptions =
  | (Exclude<TransportOptions, PassedOn> & DeviceOptions)
  | (PassedOn & PassedOnOptions);

/** Options that have been looked at. */
export type CompleteOptions = TransportOptions & DeviceOptions;

/**
 * The options of a target, when they can be used. Throws OPTION, or SYSTEM
 * where the kernel refuses what they ask for.
 */
export function checked(given: TargetOptions): CompleteOptions {
  const options = complete(given);
  const { queueCount = 1, features = 0n } = options;
  if (
    !Number.isInteger(queueCount) || queueCount < 1 ||
    queueCount > maxQueueCount
  ) {
    throw new Vhost2Error(
      "OPTION",
      `Cannot use queueCount: ${queueCount} (a whole number from 1 to ${maxQueueCount})`,
    );
  }
  if (
    typeof features !== "bigint" || features !== BigInt.asUintN(64, features)
  ) {
    throw new Vhost2Error(
      "OPTION",
      `Cannot use features: ${features} (a bigint of 64 bits)`,
    );
  }
  checkWorkers(options);
  postcopyTimeoutOf(options);
  const { protocolFeatures = 0n } = options;
  if (
    typeof protocolFeatures !== "bigint" ||
    (protocolFeatures & ~declarableProtocolFeatures) !== 0n
  ) {
    throw new Vhost2Error(
      "OPTION",
      `Cannot use protocolFeatures: ${protocolFeatures} (of RARP, NET_MTU, CRYPTO_SESSION, INBAND_NOTIFICATIONS, LOG_SHMFD, INFLIGHT_SHMFD, GET_VRING_BASE_INFLIGHT and GET_VRING_BASE_SKIP_DRAIN; the library offers the others)`,
    );
  }
  const wrongSizes = refusalOfSizes(options.sharedMemory ?? []);
  if (wrongSizes !== null) {
    throw new Vhost2Error("OPTION", `Cannot use sharedMemory: ${wrongSizes}`);
  }
  // Told here, not to the first guest that migrates.
  if (options.postcopy) core.descriptorClose(openUserfault());
  return options;
}

/** Refuses what has no sense for a device that is there already. */
function complete(options: TargetOptions): CompleteOptions {
  if (options.transport !== "PCI-vDPA") return options;
  const all: PassedOn & Partial<DeviceOptions> = options;
  for (
    const name of [
      "workers",
      "pollMicroseconds",
      "runsDisabledRings",
      "postcopy",
      "sharedMemory",
    ] as const
  ) {
    if (!all[name]) continue;
    throw new Vhost2Error(
      "OPTION",
      `Cannot use ${name} with PCI-vDPA: the device itself has the queues and the memory`,
    );
  }
  return { ...all, device: all.device ?? (() => ({})) };
}

export function queueCountOf(
  { queueCount }: CompleteOptions,
  dataPath: DataPath | undefined,
): number {
  if (dataPath === undefined) return queueCount ?? 1;
  return Math.min(queueCount ?? maxQueueCount, dataPath.queueCount);
}

export function sharedBytesOf(device: DeviceFactory | DeviceModule): number {
  return typeof device === "function" ? 0 : device.sharedBytes ?? 0;
}

export function postcopyTimeoutOf(
  { postcopyTimeoutMs = 60_000 }: DeviceOptions,
): number {
  if (postcopyTimeoutMs === Infinity) return maxPostcopyTimeoutMs;
  if (
    Number.isInteger(postcopyTimeoutMs) && postcopyTimeoutMs >= 1000 &&
    postcopyTimeoutMs <= maxPostcopyTimeoutMs
  ) return postcopyTimeoutMs;
  throw new Vhost2Error(
    "OPTION",
    `Cannot use postcopyTimeoutMs: ${postcopyTimeoutMs} (a whole number from 1000 to ${maxPostcopyTimeoutMs}, or Infinity)`,
  );
}

function checkWorkers(options: CompleteOptions): void {
  const { device, workers = 0, pollMicroseconds = 0 } = options;
  const { queuesTogether = 1 } = device as Partial<DeviceModule>;
  const limits = [
    ["workers", workers, 0, maxWorkers],
    ["pollMicroseconds", pollMicroseconds, 0, maxPollMicroseconds],
    ["sharedBytes", sharedBytesOf(device), 0, 2 ** 30],
    ["queuesTogether", queuesTogether, 1, maxQueueCount],
  ] as const;
  for (const [name, value, least, most] of limits) {
    if (Number.isInteger(value) && value >= least && value <= most) continue;
    throw new Vhost2Error(
      "OPTION",
      `Cannot use ${name}: ${value} (a whole number from ${least} to ${most})`,
    );
  }
  if (workers > 0 && typeof device === "function") {
    throw new Vhost2Error(
      "OPTION",
      `Cannot use workers: ${workers} (the device is a function, which cannot travel to a Worker: name its module instead, device: { module })`,
    );
  }
}
