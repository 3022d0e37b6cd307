/**
 * Targets: registering one, serving each front-end that comes, taking it down.
 *
 * @module
 */

import { Vhost2Error } from "../ffi/errors.ts";
import { eventLoop } from "../ffi/event_loop.ts";
import {
  featureMask,
  hasFeature,
  ProtocolFeature,
  VirtioFeature,
} from "../protocol/features.ts";
import {
  type Connection,
  type DataPath,
  openTransport,
  targetName,
  type Transport,
} from "../transports/mod.ts";
import { throughDataPath } from "./data_path.ts";
import type { Device } from "./device.ts";
import {
  type DeviceFactory,
  type DeviceModule,
  factoryOf,
} from "./device_module.ts";
import { isInsideOp } from "./sequencer.ts";
import { Session } from "./session.ts";
import type { TargetOps } from "./target_ops.ts";
import {
  checked,
  type CompleteOptions,
  postcopyTimeoutOf,
  queueCountOf,
  sharedBytesOf,
  type TargetOptions,
} from "./target_options.ts";
import { WorkerPool } from "./workers/pool.ts";

/** Errors reported of one front-end: it must not fill the user's log. */
const maxReports = 1000;

const registered = new Map<string, Target>();

/** A registered target. */
export class Target {
  /** "transport:address". */
  readonly name: string;
  readonly #options: CompleteOptions;
  readonly #sessions = new Map<Session, Promise<void>>();
  readonly #reports = new WeakMap<Device, number>();
  #factory: DeviceFactory | undefined;
  #pool: WorkerPool | undefined;
  #transport: Transport | undefined;
  /** Of a transport that is being opened. */
  readonly #endedEarly: Connection[] = [];
  #unregistered: Promise<void> | undefined;
  /**
   * Fulfilled when the target has ended: all devices are destroyed, and its
   * address is free. That is after `unregister`, or when it can have no other
   * front-end and the last one has gone (`reconnect: false`, an inherited
   * connection, a virtio-vhost-user device that was unplugged).
   */
  readonly closed: Promise<void>;
  #setClosed: () => void = () => {};

  /** Use `registerTarget`. */
  constructor(options: CompleteOptions, name: string) {
    this.name = name;
    this.#options = options;
    this.closed = new Promise((resolve) => this.#setClosed = resolve);
  }

  /** The devices of the front-ends that are connected now. */
  get devices(): readonly Device[] {
    return [...this.#sessions.keys()].map((session) => session.device);
  }

  /** For `registerTarget`. */
  async open(): Promise<void> {
    const { device, workers = 0 } = this.#options;
    this.#factory = await factoryOf(device);
    if (workers > 0) {
      this.#pool = await WorkerPool.open({
        targetName: this.name,
        count: workers,
        device: device as DeviceModule,
        report: (error) => this.#report(error, null),
      });
    }
    try {
      await this.#listen();
    } catch (error) {
      await this.#pool?.close();
      throw error;
    }
  }

  async #listen(): Promise<void> {
    eventLoop.ref();
    try {
      const opened = openTransport(this.#options, {
        queueCount: this.#options.queueCount ?? 1,
        deviceType: this.#options.deviceType,
        connected: (connection) => this.#serve(connection),
        failed: (error) => this.#report(error, null),
        ended: () => this.#end(),
      });
      // Not later than need be: a front-end may be there already.
      this.#transport = opened instanceof Promise ? await opened : opened;
      for (const connection of this.#endedEarly.splice(0)) {
        this.#transport.disconnected(connection);
      }
    } catch (error) {
      eventLoop.unref();
      throw error;
    }
  }

  #report(error: Vhost2Error, device: Device | null): void {
    const isLast = device !== null && this.#count(device) === maxReports;
    if (device !== null && this.#count(device) > maxReports) return;
    if (device !== null) this.#reports.set(device, this.#count(device) + 1);
    try {
      if (this.#options.onError === undefined) console.error(error.message);
      else this.#options.onError(error, device);
      if (isLast) {
        console.error(
          `${device.name}: ${maxReports} errors reported, no more are`,
        );
      }
    } catch (failure) {
      // Whoever is told of a failure must not make another one of it.
      console.error(`onError of ${this.name} failed:`, failure);
    }
  }

  #count(device: Device): number {
    return this.#reports.get(device) ?? 0;
  }

  #serve(connection: Connection): Promise<void> {
    let session: Session;
    const { dataPath } = connection;
    const own = this.#options;
    const declared = own.protocolFeatures ?? dataPath?.protocolFeatures ?? 0n;
    try {
      session = new Session(connection, {
        owner: this,
        features: connection.features &
          offered(own.features ?? dataPath?.features ?? 0n, declared),
        protocolFeatures: declared,
        deviceType: this.#options.deviceType,
        sharedMemory: this.#options.sharedMemory ?? [],
        postcopy: this.#options.postcopy ?? false,
        postcopyTimeoutMs: postcopyTimeoutOf(this.#options),
        queueCount: queueCountOf(own, dataPath),
        runsDisabledRings: this.#options.runsDisabledRings ?? false,
        device: (device) => this.#makeDevice(device, dataPath),
        sharedBytes: sharedBytesOf(this.#options.device),
        isServedElsewhere: this.#pool !== undefined,
        pollMicroseconds: this.#options.pollMicroseconds,
        report: (error, device) => this.#report(error, device),
        trace: this.#options.trace,
      });
    } catch (error) {
      connection.close();
      this.#report(error as Vhost2Error, null);
      queueMicrotask(() => this.#disconnected(connection));
      return Promise.resolve();
    }
    const ended = session.run()
      .catch((error) => this.#report(error, session.device))
      .finally(() => {
        this.#sessions.delete(session);
        this.#disconnected(connection);
      });
    this.#sessions.set(session, ended);
    return ended;
  }

  #disconnected(connection: Connection): void {
    if (this.#transport === undefined) this.#endedEarly.push(connection);
    else this.#transport.disconnected(connection);
  }

  #makeDevice(device: Device, dataPath: DataPath | undefined): TargetOps {
    const ops = this.#factory!(device);
    if (dataPath !== undefined) return throughDataPath(ops, dataPath);
    return this.#pool?.relay(device, ops) ?? ops;
  }

  /**
   * Stops accepting front-ends, stops all queues, destroys all devices, and
   * resolves when the last has gone. Calling it again answers the same.
   * Rejects when called inside an op of this target, which could never end.
   */
  unregister(): Promise<void> {
    if (isInsideOp(this)) {
      return Promise.reject(
        new Vhost2Error(
          "OP",
          `Cannot unregister ${this.name} inside one of its ops: let the op complete first`,
        ),
      );
    }
    return this.#end();
  }

  #end(): Promise<void> {
    this.#unregistered ??= this.#close();
    return this.#unregistered;
  }

  async #close(): Promise<void> {
    await this.#transport?.dismiss?.();
    const closed = this.#transport?.close();
    for (const session of this.#sessions.keys()) session.close();
    while (this.#sessions.size > 0) {
      await Promise.all(this.#sessions.values());
    }
    await closed;
    await this.#pool?.close();
    registered.delete(this.name);
    eventLoop.unref();
    this.#setClosed();
  }

  /** `await using target = await registerTarget(...)` unregisters it. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.unregister();
  }
}

/** What the library appends to the features of a device. */
function offered(features: bigint, protocolFeatures: bigint): bigint {
  const isLogged = hasFeature(protocolFeatures, ProtocolFeature.LOG_SHMFD);
  return features |
    featureMask(VirtioFeature.VERSION_1, VirtioFeature.PROTOCOL_FEATURES) |
    (isLogged ? featureMask(VirtioFeature.LOG_ALL) : 0n);
}

/**
 * Registers a target: from here on front-ends can connect, and a device is
 * made for each.
 *
 * @param given the transport's options and the device's
 * @returns the target, listening (or connecting) when the promise resolves
 * @throws Vhost2Error OPTION for unusable options, IN_USE for an address in
 * use, SYSTEM when the transport cannot be opened
 *
 * @example A device that offers nothing, on a socket
 * ```ts
 * import { registerTarget } from "vhost2";
 * await using target = await registerTarget({
 *   transport: "vhost-user",
 *   address: `${Deno.makeTempDirSync()}/example.sock`,
 *   device: () => ({}),
 * });
 * if (target.devices.length !== 0) throw new Error("nobody has connected");
 * ```
 */
export async function registerTarget(given: TargetOptions): Promise<Target> {
  const options = checked(given);
  const name = targetName(options);
  if (registered.has(name)) {
    throw new Vhost2Error(
      "IN_USE",
      `Cannot register ${name}: this process has registered it already`,
    );
  }
  const target = new Target(options, name);
  registered.set(name, target);
  try {
    await target.open();
  } catch (error) {
    registered.delete(name);
    throw error;
  }
  return target;
}
