/** A target on a socket of its own with a recorded device, for one test. */

import assert from "node:assert/strict";
import {
  VhostUserDevice,
  type VhostUserDeviceOptions,
} from "../../frontend/mod.ts";
import {
  type DeviceFactory,
  type DeviceModule,
  registerTarget,
  requestOps,
  type Target,
  type TargetOps,
  type TargetOptions,
  type Vhost2Error,
  virtqueueFeatures,
} from "../../mod.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { Events, within } from "../support/wait.ts";
import { Recording } from "./recording.ts";

/** What a target is made of, where it is not the usual. */
export interface ServeOptions {
  readonly features?: bigint;
  readonly protocolFeatures?: bigint;
  readonly deviceType?: string;
  readonly sharedMemory?: readonly number[];
  readonly postcopy?: boolean;
  readonly postcopyTimeoutMs?: number;
  /** 4 unless given. */
  readonly queueCount?: number;
  /** The device that does the work; an echo unless given. */
  readonly device?: DeviceFactory | { readonly create: DeviceFactory };
  /** The same, named by its module; not recorded. */
  readonly module?: DeviceModule;
  readonly workers?: number;
  readonly pollMicroseconds?: number;
  readonly trace?: (line: string) => void;
  /** Errors that the test expects are taken from `errors` by it. */
  readonly errorsExpected?: boolean;
}

/** A target being served. */
export interface Served {
  readonly path: string;
  readonly target: Target;
  readonly recording: Recording;
  readonly errors: Events<Vhost2Error>;
}

/** Answers each request with the bytes that came with it. */
export function echo(): TargetOps {
  return requestOps((request) => request.write(request.read()));
}

/** Options of a target on a socket. */
export type SocketTargetOptions = Extract<
  TargetOptions,
  { readonly transport: "vhost-user" }
>;

/** The target's options, at another address if need be. */
export function targetOptions(
  address: SocketTargetOptions["address"],
  recording: Recording,
  errors: Events<Vhost2Error>,
  options: ServeOptions = {},
): SocketTargetOptions {
  const { device = echo } = options;
  const make = "create" in device ? device.create : device;
  return {
    transport: "vhost-user",
    address,
    features: options.features ?? virtqueueFeatures,
    protocolFeatures: options.protocolFeatures,
    deviceType: options.deviceType,
    sharedMemory: options.sharedMemory,
    postcopy: options.postcopy,
    postcopyTimeoutMs: options.postcopyTimeoutMs,
    queueCount: options.queueCount ?? 4,
    device: options.module ??
      ((device) => recording.ops(device, make(device))),
    workers: options.workers,
    pollMicroseconds: options.pollMicroseconds,
    onError: errors.push,
    trace: options.trace,
  };
}

/**
 * Serves a target for `body`, unregisters it, and requires that ops came one
 * at a time, that no error is left over, and that no descriptor is.
 */
export async function serving(
  options: ServeOptions,
  body: (served: Served) => Promise<void>,
): Promise<void> {
  const folder = new TemporaryFolder();
  try {
    await withoutDescriptorLeak(async () => {
      const path = folder.file("socket");
      const recording = new Recording();
      const errors = new Events<Vhost2Error>();
      const target = await registerTarget(
        targetOptions(path, recording, errors, options),
      );
      try {
        await body({ path, target, recording, errors });
      } finally {
        await within(target.unregister(), "unregister");
      }
      recording.assertOneAtATime();
      if (options.errorsExpected) return;
      assert.deepEqual(errors.pending.map((error) => error.message), []);
    });
  } finally {
    folder.remove();
  }
}

/** A front-end on the target, nothing started; closed after `body`. */
export async function opened(
  served: Pick<Served, "path">,
  options: VhostUserDeviceOptions,
  body: (guest: VhostUserDevice) => Promise<void>,
): Promise<void> {
  const guest = await VhostUserDevice.open({
    path: served.path,
    start: false,
    queueCount: 4,
    queueSize: 16,
    ramSize: 1 << 20,
    ...options,
  });
  try {
    await body(guest);
  } finally {
    // Some tests leave the back-end with nothing to answer.
    guest.connection.close();
    await guest.close();
  }
}

/** `serving` and `opened` in one. */
export function withGuest(
  options: ServeOptions & { readonly guest?: VhostUserDeviceOptions },
  body: (guest: VhostUserDevice, served: Served) => Promise<void>,
): Promise<void> {
  return serving(
    options,
    (served) =>
      opened(served, options.guest ?? {}, (guest) => body(guest, served)),
  );
}

/**
 * The view's region has gone: it is empty, or, where a runtime cannot empty
 * views (Node 20), shows zeros in place of what the guest has there.
 */
export function assertGone(view: Uint8Array): void {
  const canDetach = typeof ArrayBuffer.prototype.transfer === "function";
  if (canDetach) assert.equal(view.length, 0);
  else assert.ok(view.every((byte) => byte === 0));
}

let sequence = 0;

/** The queue works: bytes that nobody sent before come back. */
export async function assertWorks(
  guest: VhostUserDevice,
  index = 0,
): Promise<void> {
  const bytes = new TextEncoder().encode(`request ${sequence++} on ${index}`);
  const answer = await within(
    guest.queues[index].submit({ readable: [bytes], writable: [64] }),
    `a request on queue ${index}`,
  );
  assert.equal(answer.written, bytes.length);
  assert.deepEqual(answer.data[0].subarray(0, bytes.length), bytes);
}
