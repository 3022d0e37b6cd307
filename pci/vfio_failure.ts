/**
 * What went wrong with VFIO, and what to do, as one sentence.
 *
 * @module
 */

import { constants } from "../ffi/abi.gen.ts";
import { errnoName, Vhost2Error } from "../ffi/errors.ts";

/** Which step of the core failed, and how. */
export interface VfioFailure {
  /** `constants.vfio...` */
  readonly step: number;
  /** 0 where the answer itself is the failure. */
  readonly errno: number;
  readonly value: number;
}

/** What is known of the device, for the sentence. */
export interface VfioContext {
  readonly address: string;
  /** Number of the IOMMU group. */
  readonly group: number;
  /** Others of the group that have another driver, as `ADDRESS (DRIVER)`. */
  readonly obstacles: readonly string[];
}

const EPERM = 1;
const ENOENT = 2;
const ENOMEM = 12;
const EACCES = 13;
const EBUSY = 16;
const ENODEV = 19;

const answers = "its answer makes no sense";

function reason(
  { step, errno, value }: VfioFailure,
  { group, address, obstacles }: VfioContext,
): string {
  const how = errno === 0 ? answers : errnoName(errno);
  switch (step) {
    case constants.vfioContainer:
      if (errno === ENOENT || errno === ENODEV) {
        return 'the kernel\'s VFIO is not loaded (there is no /dev/vfio/vfio): run "modprobe vfio-pci"';
      }
      return errno === EACCES || errno === EPERM
        ? "this user may not open /dev/vfio/vfio"
        : `/dev/vfio/vfio cannot be opened: ${how}`;
    case constants.vfioApi:
      return `the kernel has version ${value} of the VFIO interface, not 0`;
    case constants.vfioIommuType:
      return 'the kernel has no type1 IOMMU support: run "modprobe vfio_iommu_type1", and see that the IOMMU is on';
    case constants.vfioGroup:
      if (errno === EBUSY) {
        return `IOMMU group ${group} is in use by another process`;
      }
      if (errno === EACCES || errno === EPERM) {
        return `this user may not open /dev/vfio/${group}: change its owner`;
      }
      return errno === ENOENT || errno === ENODEV
        ? `there is no /dev/vfio/${group}: bind the device to vfio-pci ("vhost2 bind ${address}")`
        : `/dev/vfio/${group} cannot be opened: ${how}`;
    case constants.vfioGroupStatus:
      return `IOMMU group ${group} does not say how it is: ${how}`;
    case constants.vfioGroupViable:
      return `IOMMU group ${group} is not viable: ${
        obstacles.length === 0
          ? "another device of it is in use by the kernel"
          : `also bind or unbind ${obstacles.join(", ")}`
      }`;
    case constants.vfioSetContainer:
      return `IOMMU group ${group} cannot be put into a container: ${how}`;
    case constants.vfioSetIommu:
      return errno === ENODEV || errno === EPERM
        ? "there is no IOMMU that isolates it, or its interrupts are not remapped: turn the IOMMU on (intel_iommu=on), and interrupt remapping"
        : `its IOMMU cannot be set up: ${how}`;
    case constants.vfioIommuInfo:
      return `its IOMMU does not say which addresses it allows: ${how}`;
    case constants.vfioDeviceFd:
      return errno === ENODEV
        ? `it is not in IOMMU group ${group} of vfio-pci: bind it ("vhost2 bind ${address}")`
        : `VFIO does not hand it out: ${how}`;
    case constants.vfioDeviceInfo:
      return errno === 0 ? "it is no PCI device" : `it does not answer: ${how}`;
    case constants.vfioRegionInfo:
      return `region ${value} cannot be used: ${how}`;
    case constants.vfioIrqInfo:
      return `interrupts of kind ${value} cannot be used: ${how}`;
    case constants.vfioConfigSpace:
      return value === 1
        ? "its list of capabilities leads in a circle or nowhere"
        : `its configuration space cannot be read: ${how}`;
    default:
      return `this process cannot hold one more: ${how}`;
  }
}

/** The error of a device that could not be opened. */
export function vfioError(
  failure: VfioFailure,
  context: VfioContext,
): Vhost2Error {
  return new Vhost2Error(
    "SYSTEM",
    `Cannot open PCI device ${context.address}: ${reason(failure, context)}`,
    { errno: failure.errno === 0 ? undefined : failure.errno },
  );
}

const EINVAL = 22;
const EEXIST = 17;
const EADDRNOTAVAIL = 99;

/** The error of memory that could not be mapped for DMA. */
export function dmaError(
  address: string,
  size: number,
  iova: bigint,
  errno: number,
  lockedLimit: string,
): Vhost2Error {
  const place = `${size} bytes at I/O address 0x${iova.toString(16)}`;
  let why = errnoName(errno);
  if (errno === ENOMEM) {
    why =
      `the limit of locked memory (${lockedLimit}) is too low: raise it ("ulimit -l", or LimitMEMLOCK= of systemd)`;
  } else if (errno === EADDRNOTAVAIL) {
    why = "the IOMMU does not allow that range";
  } else if (errno === EEXIST) why = "something is mapped there already";
  else if (errno === EINVAL) {
    why = "it is not whole pages of memory of this library";
  }
  return new Vhost2Error(
    "SYSTEM",
    `Cannot let PCI device ${address} reach ${place}: ${why}`,
    { errno },
  );
}
