/**
 * The other side of vhost-user: a front-end that opens any vhost-user device
 * from a script, and a virtio driver for its queues.
 *
 * @module
 */

// A disk.
export * from "./blk.ts";

// A network card.
export * from "./net.ts";

// Any device.
export * from "./device.ts";
export type { StartQueueOptions, StopQueueOptions } from "./device_queues.ts";
export {
  type RingFormatOptions,
  supportedFeatures,
  supportedProtocolFeatures,
  type VhostUserDeviceOptions,
} from "./negotiation.ts";

// Its parts: memory, the driver's side of a ring, messages.
export * from "../driver/guest_ram.ts";
export * from "./dirty_log.ts";
export * from "./iommu.ts";
export { HostNotifiers } from "./host_notifiers.ts";
export {
  type AddressMap,
  type ChainOptions,
  type DriverAddresses,
  type DriverCompletion,
  type DriverRequest,
  type GuestBuffer,
  type IndirectTable,
  QueueDriver,
  type QueueDriverOptions,
  type RingLayout,
  type UsedElement,
} from "../driver/queue_driver.ts";
export * from "../driver/split_driver.ts";
export * from "../driver/packed_driver.ts";
export {
  AVAILABLE_FLAG_NO_INTERRUPT,
  type Descriptor,
  DescriptorFlag,
  type SplitAddresses,
  SplitLayout,
  USED_FLAG_NO_NOTIFY,
} from "../driver/split_layout.ts";
export {
  EventFlag,
  type EventSuppression,
  type PackedDescriptor,
  PackedFlag,
  PackedLayout,
} from "../driver/packed_layout.ts";
export * from "./connection.ts";
export * from "./page_faults.ts";
export * from "./message_socket.ts";
export type {
  BackendAnswer,
  BackendRequestHandler,
  BackendRequests,
} from "./backend_requests.ts";
export { RefusedError } from "./refused_error.ts";
export type { Descriptors, Message } from "../transports/transport.ts";

// The words of the protocol.
export * from "../protocol/address.ts";
export * from "../protocol/features.ts";
export {
  FrontendRequest,
  type FrontendRequestId,
} from "../protocol/frontend_request.ts";
export { BackendRequest } from "../protocol/backend_request.ts";
export {
  type IotlbMessage,
  IotlbPermission,
  IotlbType,
} from "../protocol/payloads.ts";
export type { Access } from "../ffi/iotlb.ts";
export { type ErrorCode, Vhost2Error } from "../ffi/errors.ts";
