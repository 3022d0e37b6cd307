/**
 * vhost2: virtual devices for virtual machines, in TypeScript.
 *
 * @module
 */

// A target, and what a device implements.
export { registerTarget, Target } from "./session/target.ts";
export type { DeviceOptions, TargetOptions } from "./session/target.ts";
export type {
  CustomMessage,
  SetConfigReason,
  TargetOps,
} from "./session/target_ops.ts";
export { Device, MemoryRegion } from "./session/device.ts";
export { Queue, type RingAddresses } from "./session/queue.ts";

// Requests over a started queue.
export * from "./virtqueue/mod.ts";

// Devices.
export * from "./devices/mod.ts";

// The words of the protocol.
export {
  type Gpa,
  gpa,
  type Iova,
  iova,
  type RingAddress,
  type Uva,
  uva,
} from "./protocol/address.ts";
export {
  describeFeatures,
  featureMask,
  hasFeature,
  ProtocolFeature,
  VirtioFeature,
} from "./protocol/features.ts";

// How front-ends reach a target.
export type {
  ReconnectDelays,
  TransportName,
  TransportOptions,
  VhostUserOptions,
} from "./transports/mod.ts";

// Errors.
export { type ErrorCode, Vhost2Error } from "./ffi/errors.ts";
