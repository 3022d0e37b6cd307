/**
 * vhost2: virtual devices for virtual machines, in TypeScript.
 *
 * @module
 */

// A target, and what a device implements.
export { registerTarget, Target } from "./session/target.ts";
export type {
  DeviceOptions,
  PassedOnOptions,
  TargetOptions,
} from "./session/target_options.ts";
export type {
  DeviceFactory,
  DeviceModule,
  ModuleFactory,
} from "./session/device_module.ts";
export type { ClassMessage, CustomReply } from "./session/class_messages.ts";
export type {
  CustomMessage,
  SetConfigReason,
  StateTransfer,
  TargetOps,
} from "./session/target_ops.ts";
export { Device, MemoryRegion } from "./session/device.ts";
export type { Access } from "./ffi/iotlb.ts";
export {
  type HostNotifier,
  Queue,
  type RingAddresses,
} from "./session/queue.ts";
export type { SharedMapping } from "./session/shared_memory.ts";

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

export {
  type AsymmetricSession,
  CryptoOpcode,
  type CryptoSession,
  type SymmetricSession,
} from "./protocol/crypto_payload.ts";

// How front-ends reach a target.
export {
  BrokenVduseDevice,
  type PciVdpaOptions,
  type PciVhostUserOptions,
  type ProfileName,
  type ReconnectDelays,
  type TransportName,
  type TransportOptions,
  type VduseDescription,
  type VduseDevice,
  type VduseEntry,
  type VduseKernel,
  type VduseOptions,
  type VduseQueueInfo,
  type VduseRequest,
  type VduseResponse,
  type VhostUserOptions,
} from "./transports/mod.ts";

// Errors.
export { type ErrorCode, Vhost2Error } from "./ffi/errors.ts";
