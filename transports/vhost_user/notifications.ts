/**
 * Kicks, calls and errors of a vhost-user connection: eventfds.
 *
 * @module
 */

import { constants } from "../../ffi/abi.gen.ts";
import { core } from "../../ffi/core.ts";
import { Vhost2Error } from "../../ffi/errors.ts";
import { eventLoop } from "../../ffi/event_loop.ts";
import type {
  Descriptors,
  KickSource,
  NotificationSink,
} from "../transport.ts";

/**
 * Takes the message's eventfd. Anything else is refused: a write to, or a poll
 * of, a pipe, a file or a FUSE file could block or mislead us at the
 * front-end's will.
 */
function takeEventfd(descriptors: Descriptors, use: string): number | null {
  const fd = descriptors.take();
  if (fd === undefined) return null;
  if (core.descriptorKind(fd) === constants.kindEventfd) return fd;
  core.descriptorClose(fd);
  throw new Vhost2Error(
    "PROTOCOL",
    `Cannot use descriptor ${fd} as ${use}: it is not an eventfd`,
  );
}

/**
 * Watches the eventfd of SET_VRING_KICK, unless somebody else does; null: the
 * front-end wants polling.
 */
export function openKick(
  descriptors: Descriptors,
  onKick: (() => void) | null,
): KickSource | null {
  const fd = takeEventfd(descriptors, "kick");
  if (fd === null) return null;
  try {
    const watch = onKick === null ? null : eventLoop.watch(fd, onKick);
    return {
      fd,
      close() {
        watch?.close();
        core.descriptorClose(fd);
      },
    };
  } catch (error) {
    core.descriptorClose(fd);
    throw error;
  }
}

/** The eventfd of SET_VRING_CALL or SET_VRING_ERR. */
export function openSink(
  descriptors: Descriptors,
  use: string,
): NotificationSink | null {
  const fd = takeEventfd(descriptors, use);
  if (fd === null) return null;
  let isOpen = true;
  return {
    fd,
    signal() {
      if (isOpen) core.eventfdSignal(fd);
    },
    close() {
      if (!isOpen) return;
      isOpen = false;
      core.descriptorClose(fd);
    },
  };
}
