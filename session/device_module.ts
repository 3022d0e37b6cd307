/**
 * How a device is made: by a function, or, where Workers are to make it too,
 * by a module that has the function.
 *
 * @module
 */

import { Vhost2Error } from "../ffi/errors.ts";
import type { Device } from "./device.ts";
import type { TargetOps } from "./target_ops.ts";

/** Called once per front-end; what it returns is the user's device. */
export type DeviceFactory = (device: Device) => TargetOps;

/**
 * A device named by its module, so that it can be made in any isolate: a
 * closure cannot travel to a Worker, the address of its module can.
 */
export interface DeviceModule {
  /** Absolute URL, as `import.meta.resolve("./my_disk.ts")` gives it. */
  readonly module: string | URL;
  /**
   * Name of the module's export `(device, options) => ops`; "default" unless
   * given.
   */
  readonly name?: string;
  /**
   * The factory's second argument. Each Worker gets a structured clone of it,
   * once; memory in a SharedArrayBuffer is common to all.
   */
  readonly options?: unknown;
  /** Bytes of `Device.shared`; 0 unless given. */
  readonly sharedBytes?: number;
  /**
   * So many neighbouring queues belong together and are served by the same
   * Worker: 2 for the queue pairs of a network card, 256 at most; 1 unless
   * given.
   */
  readonly queuesTogether?: number;
  /**
   * Makes the device in the registering thread; unless given, the module's
   * factory does.
   */
  readonly create?: DeviceFactory;
}

/** A module's factory. */
export type ModuleFactory = (device: Device, options: unknown) => TargetOps;

/** Imports the factory that a module exports under a name. */
export async function importFactory(
  module: string,
  name: string,
): Promise<ModuleFactory> {
  let exports: Record<string, unknown>;
  try {
    exports = await import(module);
  } catch (cause) {
    throw new Vhost2Error(
      "OPTION",
      `Cannot import the device's module ${module}: ${
        cause instanceof Error ? cause.message : cause
      }`,
      { cause },
    );
  }
  const factory = exports[name];
  if (typeof factory === "function") return factory as ModuleFactory;
  throw new Vhost2Error(
    "OPTION",
    `Cannot use the device's module ${module}: its export "${name}" is no function`,
  );
}

/** The factory for the registering thread. */
export async function factoryOf(
  device: DeviceFactory | DeviceModule,
): Promise<DeviceFactory> {
  if (typeof device === "function") return device;
  if (device.create !== undefined) return device.create;
  // Options are looked at only where they are needed: they may be a getter
  // that refuses.
  const { module, name = "default", options } = device;
  const factory = await importFactory(String(module), name);
  return (device) => factory(device, options);
}
