/** A target behind a model of a virtio-vhost-user device, for one test. */

import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import {
  FrontendConnection,
  type VhostUserDeviceOptions,
} from "../../frontend/mod.ts";
import {
  type DeviceOptions,
  type PciVhostUserOptions,
  registerTarget,
  type Target,
  type Vhost2Error,
} from "../../mod.ts";
import { assertGuestMemory, guestMemoryBytes } from "../hostile/accounting.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";
import {
  VhostUserPciModel,
  type VhostUserPciModelOptions,
} from "../support/vhost_user_pci_model.ts";
import { Events, eventually, within } from "../support/wait.ts";

export interface PciServed {
  /** The device now: a target that starts again opens another. */
  readonly model: VhostUserPciModel;
  readonly target: Target;
  readonly errors: Events<Vhost2Error>;
  /** A socket that ends at the model's other side. */
  attach(): number;
  /** The same as a connection. */
  connect(): FrontendConnection;
  /** Awaits that the device of a front-end that left has been destroyed. */
  nobody(): Promise<void>;
}

export interface PciServeOptions extends VhostUserPciModelOptions {
  readonly profile?: "qemu" | "crosvm";
  /** Errors that the test expects are taken from `errors` by it. */
  readonly errorsExpected?: boolean;
}

/** Options of the transport with a model in the place of VFIO. */
export function pciOptions(
  model: VhostUserPciModel,
  profile?: "qemu" | "crosvm",
): PciVhostUserOptions {
  return {
    transport: "PCI-vhost-user",
    address: nextAddress(),
    profile,
    openDevice: () => model,
  };
}

let addresses = 0;

/** One that no other test of this process has. */
export function nextAddress(): string {
  const number = addresses++;
  const hex = (value: number) => value.toString(16).padStart(2, "0");
  return `${hex(number >> 8).padStart(4, "0")}:${hex(number & 0xff)}:05.0`;
}

/**
 * Serves a device behind a model for `body`; afterwards descriptors, mappings
 * and DMA maps are as before.
 */
export async function servingPci(
  options: PciServeOptions,
  device: DeviceOptions,
  body: (served: PciServed) => Promise<void>,
): Promise<void> {
  const before = guestMemoryBytes();
  await withoutDescriptorLeak(async () => {
    const errors = new Events<Vhost2Error>();
    const model = new VhostUserPciModel(options);
    const target = await registerTarget({
      ...pciOptions(model, options.profile),
      onError: errors.push,
      ...device,
    });
    const attach = () => {
      const ends = new Int32Array(2);
      assert.equal(core.socketPair(ends), 0);
      model.attach(ends[1]);
      return ends[0];
    };
    try {
      await body({
        model,
        target,
        errors,
        attach,
        connect: () => FrontendConnection.fromFd(attach()),
        nobody: () =>
          eventually(() => target.devices.length === 0, "the device is gone"),
      });
    } finally {
      await within(target.unregister(), "unregister");
      await model.settled();
    }
    assert.ok(model.isClosed);
    assert.equal(model.dma.count, 0, "DMA mappings are undone");
    assert.equal(model.mappedBars, 0, "BARs are unmapped");
    if (options.errorsExpected) return;
    assert.deepEqual(errors.pending.map((error) => error.message), []);
  });
  assertGuestMemory(before);
}

/** How a front-end is opened over a socket of the model's. */
export type GuestOptions = Omit<VhostUserDeviceOptions, "fd" | "path">;
