/**
 * A target whose device answers as the test says, and a front-end on it with
 * rings of either format.
 *
 * @module
 */

import assert from "node:assert/strict";
import {
  type PackedDriver,
  type QueueDriver,
  supportedFeatures,
  VhostUserDevice,
  type VhostUserDeviceOptions,
} from "../../frontend/mod.ts";
import {
  type DeviceOptions,
  registerTarget,
  type RequestHandler,
  requestOps,
  type Target,
  virtqueueFeatures,
} from "../../mod.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { Events } from "../support/wait.ts";

export type Guest = VhostUserDevice<QueueDriver>;
export type PackedGuest = VhostUserDevice<PackedDriver>;

export interface ServeOptions {
  /** Of the device; those of `virtqueue/` unless given. */
  readonly features?: bigint;
  readonly handler?: RequestHandler;
  readonly queueCount?: number;
}

export interface Served {
  readonly path: string;
  readonly target: Target;
  /** What the target reported; a test takes what it expects. */
  readonly errors: Events<Error>;
}

/** Answers each request with the bytes that came with it. */
const echo: RequestHandler = (request) => request.write(request.read());

/** Serves for `body`; no descriptor and no error may be left over. */
export async function serving(
  options: ServeOptions,
  body: (served: Served) => Promise<void>,
): Promise<void> {
  using folder = new TemporaryFolder();
  await withoutDescriptorLeak(async () => {
    const path = folder.file("socket");
    const errors = new Events<Error>();
    const device: DeviceOptions["device"] = () =>
      requestOps(options.handler ?? echo);
    const target = await registerTarget({
      transport: "vhost-user",
      address: path,
      features: options.features ?? virtqueueFeatures,
      queueCount: options.queueCount ?? 1,
      device,
      onError: errors.push,
    });
    try {
      await body({ path, target, errors });
    } finally {
      await target.unregister();
    }
    assert.deepEqual(errors.pending.map(({ message }) => message), []);
  });
}

/** A front-end with packed rings, closed after `body`. */
export async function withPacked(
  { path }: Served,
  options: VhostUserDeviceOptions,
  body: (guest: PackedGuest) => Promise<void>,
): Promise<void> {
  await using guest = await VhostUserDevice.open({
    path,
    features: supportedFeatures,
    queueSize: 16,
    ramSize: 4 << 20,
    ...options,
    packed: true,
  });
  await body(guest);
}
