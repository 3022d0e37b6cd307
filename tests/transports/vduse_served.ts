/** A target behind a model of the kernel's VDUSE, for one test. */

import assert from "node:assert/strict";
import { GuestRam } from "../../driver/guest_ram.ts";
import { PackedDriver } from "../../driver/packed_driver.ts";
import type { QueueDriver } from "../../driver/queue_driver.ts";
import { SplitDriver } from "../../driver/split_driver.ts";
import {
  type DeviceOptions,
  registerTarget,
  type Target,
  type VduseOptions,
  type Vhost2Error,
} from "../../mod.ts";
import { assertGuestMemory, guestMemoryBytes } from "../hostile/accounting.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { type ModelDevice, VduseModel } from "../support/vduse_model.ts";
import { Events, within } from "../support/wait.ts";

const packed = 1n << 34n;
/** What any driver is offered: VERSION_1 and ACCESS_PLATFORM. */
export const needed = 3n << 32n;

/** Memory as the kernel's own, or as a process's behind `vhost_vdpa`. */
export type MemoryKind = "window" | "files";

export interface DriverOptions {
  readonly isPacked?: boolean;
  readonly memory?: MemoryKind;
  readonly queueSize?: number;
  /** Not yet made ready. */
  readonly late?: readonly number[];
  /** Features that it does not accept. */
  readonly refused?: bigint;
}

/** The kernel's driver of a device, with memory and queues. */
export class ModelDriver {
  readonly device: ModelDevice;
  readonly ram: GuestRam;
  readonly queues: QueueDriver[];

  private constructor(
    device: ModelDevice,
    ram: GuestRam,
    options: DriverOptions,
  ) {
    this.device = device;
    this.ram = ram;
    const { queueSize = 64 } = options;
    const { driverFeatures: features } = device;
    this.queues = device.queues.map((_, index) => {
      const setup = {
        queueSize,
        features,
        notify: () => device.kick(index),
      };
      return (features & packed) !== 0n
        ? new PackedDriver(ram, setup)
        : new SplitDriver(ram, setup);
    });
  }

  /** All that a driver does until its queues work. */
  static async probe(
    device: ModelDevice,
    options: DriverOptions = {},
  ): Promise<ModelDriver> {
    assert.ok(await device.setStatus(0));
    assert.ok(await device.setStatus(3));
    device.driverFeatures = device.description.features &
      (options.isPacked ?? true ? -1n : ~packed) & ~(options.refused ?? 0n);
    assert.ok(await device.setStatus(11));
    const driver = new ModelDriver(
      device,
      makeRam(device, options.memory ?? "window"),
      options,
    );
    driver.queues.forEach((_, index) => {
      if (!options.late?.includes(index)) driver.makeReady(index);
    });
    if (!await device.setStatus(15)) {
      driver.close();
      throw new Error("the device refuses DRIVER_OK");
    }
    return driver;
  }

  makeReady(index: number, base?: number): void {
    const queue = this.queues[index];
    const { descriptor, available, used } = queue.deviceAddresses;
    const state = this.device.queues[index];
    state.called = () => void queue.poll();
    state.info = {
      descriptor,
      driver: available,
      device: used,
      size: queue.queueSize,
      base: base ?? queue.firstBase,
      isReady: true,
    };
  }

  close(): void {
    for (const queue of this.queues) queue.close();
    this.device.entries = [];
    this.ram.close();
  }
}

const size = 4 << 20;

function makeRam(device: ModelDevice, kind: MemoryKind): GuestRam {
  if (kind === "window") {
    const start = 1 << 20;
    const ram = new GuestRam([{ gpa: BigInt(start), size, mmapOffset: start }]);
    // As large as all that the kernel's own could have, and mostly nothing.
    ram.regions[0].resizeFile(0x4800_0000 - start);
    device.entries = [entryOf(ram, 0, true)];
    return ram;
  }
  const ram = new GuestRam([
    { gpa: 0n, size },
    { gpa: 1n << 32n, size, mmapOffset: 8192 },
  ]);
  device.entries = [entryOf(ram, 0, false), entryOf(ram, 1, false)];
  return ram;
}

export function entryOf(ram: GuestRam, index: number, isDomain: boolean) {
  const { gpa, size, mmapOffset, fd } = ram.regions[index];
  return {
    start: gpa as bigint,
    last: gpa + BigInt(size) - 1n,
    offset: BigInt(mmapOffset),
    access: 3,
    isDomain,
    file: fd,
  };
}

export interface VduseServed {
  readonly kernel: VduseModel;
  readonly device: ModelDevice;
  readonly target: Target;
  readonly errors: Events<Vhost2Error>;
  /** The transport's options, for another target of the same device. */
  readonly options: VduseOptions;
}

export interface VduseServeOptions extends Partial<VduseOptions> {
  /** A kernel that there is already. */
  readonly kernel?: VduseModel;
  /** Errors that the test expects are taken from `errors` by it. */
  readonly errorsExpected?: boolean;
}

let names = 0;

/** Serves a device behind a model for `body`; nothing may be left over. */
export async function servingVduse(
  options: VduseServeOptions,
  device: DeviceOptions,
  body: (served: VduseServed) => Promise<void>,
): Promise<void> {
  using folder = new TemporaryFolder();
  const before = guestMemoryBytes();
  const kernel = options.kernel ?? new VduseModel();
  await withoutDescriptorLeak(async () => {
    const errors = new Events<Vhost2Error>();
    const transport: VduseOptions = {
      runtimeFolder: folder.path,
      packed: true,
      ...options,
      transport: "VDUSE",
      address: options.address ?? `model${names++}`,
      kernel,
    };
    const target = await within(
      registerTarget({ ...device, ...transport, onError: errors.push }),
      "registerTarget",
    );
    try {
      await body({
        kernel,
        device: kernel.devices.get(transport.address)!,
        target,
        errors,
        options: transport,
      });
    } finally {
      await within(target.unregister(), "unregister");
    }
    for (const one of kernel.devices.values()) one.destroy();
    if (options.errorsExpected) return;
    assert.deepEqual(errors.pending.map((error) => error.message), []);
  });
  assertGuestMemory(before);
}
