/**
 * PCI devices from user space: VFIO, and a driver for modern virtio devices.
 *
 * @module
 */

// A device.
export { openVfioDevice, VfioDevice } from "./vfio_device.ts";
export * from "./pci_device.ts";
export {
  bindToVfio,
  type Rebinding,
  releaseFromVfio,
} from "./binding_to_vfio.ts";

// A virtio device.
export { VirtioPciDevice, type VirtioPciOptions } from "./virtio_pci_device.ts";
export {
  type BarPlace,
  type Condition,
  type QueueAddresses,
  VIRTIO_VENDOR,
  VirtioRegisters,
} from "./virtio_registers.ts";
export { NO_VECTOR, PciInterrupts } from "./interrupts.ts";
export {
  CapabilityType,
  type VirtioCapabilities,
  virtioCapabilities,
  type VirtioCapability,
} from "./virtio_capabilities.ts";
export { DmaMemory } from "./dma_memory.ts";

// Errors.
export { type ErrorCode, Vhost2Error } from "../ffi/errors.ts";
