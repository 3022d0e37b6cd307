/** A model of a PCI device, offered through PCI-vDPA for one test. */

import assert from "node:assert/strict";
import { VhostUserDevice } from "../../frontend/mod.ts";
import type {
  RingFormatOptions,
  VhostUserDeviceOptions,
} from "../../frontend/mod.ts";
import type { QueueDriver } from "../../driver/queue_driver.ts";
import {
  type PassedOnOptions,
  type PciVdpaOptions,
  registerTarget,
  type Target,
  type Vhost2Error,
} from "../../mod.ts";
import type { Request } from "../../virtqueue/mod.ts";
import { assertGuestMemory, guestMemoryBytes } from "../hostile/accounting.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import {
  type VirtioModelOptions,
  VirtioPciModel,
} from "../support/virtio_pci_model.ts";
import { Events, eventually, within } from "../support/wait.ts";
import { nextAddress } from "./pci_served.ts";

/** Feature bits as masks. */
export const Bit = {
  INDIRECT: 1n << 28n,
  EVENT_IDX: 1n << 29n,
  VERSION_1: 1n << 32n,
  ACCESS_PLATFORM: 1n << 33n,
  PACKED: 1n << 34n,
  IN_ORDER: 1n << 35n,
  RING_RESET: 1n << 40n,
  LOG_ALL: 1n << 26n,
} as const;

/** What a device that can do everything offers. */
export const allFeatures = Object.values(Bit).reduce((a, b) => a | b, 0n) &
  ~(Bit.IN_ORDER | Bit.LOG_ALL);

export interface VdpaOptions extends Partial<VirtioModelOptions> {
  /** Options of the target. */
  readonly target?: PassedOnOptions & Partial<PciVdpaOptions>;
  /** Errors that the test expects are taken from `errors` by it. */
  readonly errorsExpected?: boolean;
  /** Before the device is opened, each time. */
  prepare?(model: VirtioPciModel): void;
}

export interface VdpaServed {
  readonly path: string;
  readonly target: Target;
  readonly errors: Events<Vhost2Error>;
  /** Those that were opened, the current one last. */
  readonly models: readonly VirtioPciModel[];
  /** The device now. */
  readonly model: VirtioPciModel;
  /** Awaits that the device of a front-end that left has been destroyed. */
  nobody(): Promise<void>;
}

/** The bytes that came, each one more: so nobody takes an echo for the model. */
export function answer(_queue: number, request: Request): void {
  request.complete(request.write(request.read().map((byte) => byte + 1)));
}

/**
 * Serves a model for `body`; afterwards descriptors, mappings and DMA maps are
 * as before.
 */
export async function servingVdpa(
  options: VdpaOptions,
  body: (served: VdpaServed) => Promise<void>,
): Promise<void> {
  const before = guestMemoryBytes();
  using folder = new TemporaryFolder();
  const path = folder.file("vdpa.sock");
  const models: VirtioPciModel[] = [];
  await withoutDescriptorLeak(async () => {
    const errors = new Events<Vhost2Error>();
    const target = await registerTarget({
      transport: "PCI-vDPA",
      address: nextAddress(),
      socketPath: path,
      openDevice() {
        const model = new VirtioPciModel({
          deviceId: 0x1042,
          features: allFeatures,
          queueCount: 2,
          queueSize: 256,
          ...options,
        });
        model.onRequest = answer;
        models.push(model);
        options.prepare?.(model);
        return model;
      },
      onError: errors.push,
      ...options.target,
    });
    try {
      await body({
        path,
        target,
        errors,
        models,
        get model() {
          return models.at(-1)!;
        },
        nobody: () =>
          eventually(() => target.devices.length === 0, "the device is gone"),
      });
    } finally {
      await within(target.unregister(), "unregister");
      for (const model of models) await model.settled();
    }
    for (const model of models) {
      assert.ok(model.isClosed);
      assert.equal(model.dma.count, 0, "DMA mappings are undone");
    }
    if (options.errorsExpected) return;
    assert.deepEqual(errors.pending.map((error) => error.message), []);
  });
  assertGuestMemory(before);
}

/** A front-end with two queues, in two regions of memory. */
export function openVdpaGuest(
  { path }: Pick<VdpaServed, "path">,
  options: VhostUserDeviceOptions & Partial<RingFormatOptions> = {},
): Promise<VhostUserDevice<QueueDriver>> {
  return within(
    VhostUserDevice.open({
      path,
      packed: false,
      features: ~0n,
      queueCount: 2,
      queueSize: 64,
      regions: [
        { size: 1 << 20, gpa: 1n << 20n, mmapOffset: 8192 },
        { size: 1 << 20, gpa: 1n << 32n },
      ],
      ...options,
    }),
    "the handshake",
  );
}

let sequence = 0;

/** A queue works: each byte comes back as one more. */
export async function exerciseQueue(
  guest: VhostUserDevice<QueueDriver>,
  index: number,
  count = 1,
): Promise<void> {
  await within(
    Promise.all(Array.from({ length: count }, async (_, i) => {
      const bytes = Uint8Array.from(
        { length: 100 },
        (_, j) => (sequence + i + j) & 0xff,
      );
      sequence++;
      const { data, written } = await guest.queues[index].submit({
        readable: [bytes.subarray(0, 10), bytes.subarray(10)],
        writable: [64, 64],
        indirect: i % 2 === 1 && (guest.features & Bit.INDIRECT) !== 0n,
      });
      assert.equal(written, 100);
      const all = [...data[0], ...data[1]].slice(0, 100);
      assert.deepEqual(all, [...bytes.map((byte) => byte + 1)]);
    })),
    `requests on queue ${index}`,
  );
}

/** Both queues work. */
export async function exercise(
  guest: VhostUserDevice<QueueDriver>,
  count = 40,
): Promise<void> {
  for (let index = 0; index < guest.queues.length; index++) {
    await exerciseQueue(guest, index, count);
  }
}

/** Whether a queue's ring in the device is the guest's own. */
export function isDirect(
  { model }: Pick<VdpaServed, "model">,
  guest: VhostUserDevice<QueueDriver>,
  index: number,
): boolean {
  const { descriptor } = guest.queues[index].ring.addresses;
  return model.queues[index].isEnabled &&
    model.queues[index].addresses[0] === descriptor;
}
