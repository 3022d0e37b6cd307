/**
 * What the kernel could not do, and what to do about it, as one sentence.
 *
 * @module
 */

import { constants } from "../../ffi/abi.gen.ts";
import { Errno, errnoName, Vhost2Error } from "../../ffi/errors.ts";
import { describeFeatures } from "../../protocol/features.ts";
import type { VduseDescription } from "./kernel.ts";

const ENODEV = 19;
const isDenied = (errno: number) =>
  errno === Errno.EPERM || errno === Errno.EACCES;

/** `/dev/vduse/NAME` cannot be opened. */
export function openError(name: string, errno: number): Vhost2Error {
  if (errno === Errno.EBUSY) {
    return new Vhost2Error(
      "IN_USE",
      `Cannot open VDUSE device ${name}: another process serves it; stop that or choose another name`,
      { errno },
    );
  }
  const reason = isDenied(errno)
    ? `this user may not open /dev/vduse/${name}`
    : errnoName(errno);
  return new Vhost2Error(
    "SYSTEM",
    `Cannot open VDUSE device ${name}: ${reason}`,
    { errno },
  );
}

/** A device cannot be created. */
export function createError(
  name: string,
  { deviceId, features, queueCount }: VduseDescription,
  errno: number,
): Vhost2Error {
  return new Vhost2Error(
    errno === Errno.EEXIST ? "IN_USE" : "SYSTEM",
    `Cannot create VDUSE device ${name}: ${reason()}`,
    { errno },
  );

  function reason(): string {
    switch (errno) {
      case Errno.ENOENT:
      case ENODEV:
        return 'the kernel\'s VDUSE is not loaded (there is no /dev/vduse/control): run "modprobe vduse" (CONFIG_VDPA_USER, in Debian from Linux 6.12 on)';
      case Errno.EPERM:
        return "this takes CAP_NET_ADMIN for a network card, and the right to open /dev/vduse/control";
      case Errno.EACCES:
        return "this user may not open /dev/vduse/control";
      case Errno.EPROTO:
        return "the kernel has another version of the VDUSE interface, not 0";
      case Errno.EINVAL:
        return `the kernel takes no device of type ${deviceId} with ${queueCount} queues that offers ${
          describeFeatures(features)
        }`;
      case Errno.EEXIST:
        return "there is one already";
      default:
        return errnoName(errno);
    }
  }
}

/** A device cannot be attached or detached. */
export function attachmentError(
  name: string,
  isAttached: boolean,
  step: number,
  errno: number,
): Vhost2Error {
  const action = isAttached ? "attach" : "detach";
  return new Vhost2Error(
    "SYSTEM",
    `Cannot ${action} VDUSE device ${name}: ${reason()}`,
    { errno },
  );

  function reason(): string {
    if (isDenied(errno)) return "this takes CAP_NET_ADMIN";
    if (step === constants.attachmentFamily) {
      return errno === Errno.ENOENT
        ? 'the kernel\'s vDPA is not loaded: run "modprobe vdpa"'
        : `the kernel does not say whether it has vDPA: ${errnoName(errno)}`;
    }
    if (step !== constants.attachmentRequest) return errnoName(errno);
    if (errno === ENODEV || errno === Errno.ENOENT) {
      return isAttached
        ? 'the kernel has no management device "vduse": run "modprobe vduse"'
        : "it is not attached";
    }
    return errnoName(errno);
  }
}
