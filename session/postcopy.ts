/**
 * Postcopy migration (PAGEFAULT): the guest runs here while its pages are
 * still on their way. The front-end gets a userfaultfd of ours and fills each
 * page that somebody here touches; whoever touches it sleeps until then.
 *
 * The order (vhost-user specification, "Postcopy"): ADVISE, whose reply
 * carries the userfaultfd; LISTEN; SET_MEM_TABLE, whose reply tells where we
 * have mapped each region; the front-end's ack of that, by the same message;
 * END. Regions are watched from when they are mapped, before anybody can touch
 * them, and no queue starts before the ack, so no fault comes before it.
 *
 * @module
 */

import { core } from "../ffi/core.ts";
import { check, Errno, errnoName, Vhost2Error } from "../ffi/errors.ts";
import type { GuestMemory } from "../ffi/guest_memory.ts";
import { Refusal } from "./refusal.ts";

type State =
  | { readonly kind: "off" }
  /** The front-end has the userfaultfd; `fd` is ours. */
  | { readonly kind: "advised"; readonly fd: number }
  /** The memory owns the userfaultfd. */
  | { readonly kind: "listening"; isAckDue: boolean };

/** A userfaultfd, the caller's. Throws SYSTEM where the kernel refuses one. */
export function openUserfault(): number {
  const fd = core.userfaultOpen();
  if (fd >= 0) return fd;
  const why = fd === -Errno.EPERM
    ? "it takes CAP_SYS_PTRACE, access to /dev/userfaultfd, or sysctl vm.unprivileged_userfaultfd=1"
    : "the kernel lacks it for shared memory";
  throw new Vhost2Error(
    "SYSTEM",
    `Cannot offer postcopy: no userfaultfd (${errnoName(-fd)}): ${why}`,
    { errno: -fd },
  );
}

/** Where one session is in it. */
export class Postcopy {
  readonly #memory: GuestMemory;
  readonly #timeoutMs: number;
  #state: State = { kind: "off" };

  /** @param timeoutMs for which this isolate may sleep on a page */
  constructor(memory: GuestMemory, timeoutMs: number) {
    this.#memory = memory;
    this.#timeoutMs = timeoutMs;
  }

  /** SET_MEM_TABLE is answered by where its regions are mapped. */
  get repliesWithBases(): boolean {
    return this.#state.kind === "listening" && !this.#state.isAckDue;
  }

  /** The front-end has been told the bases and has not said that it is ready. */
  get isAckDue(): boolean {
    return this.#state.kind === "listening" && this.#state.isAckDue;
  }

  /** The userfaultfd for the front-end, which is sent a duplicate. */
  advise(): number {
    if (this.#state.kind === "listening") {
      throw new Refusal("postcopy is under way");
    }
    this.end(false);
    const fd = openUserfault();
    this.#state = { kind: "advised", fd };
    return fd;
  }

  /** @param hangupFd what hangs up when the front-end goes */
  listen(hangupFd: number): void {
    if (this.#state.kind !== "advised") {
      throw new Refusal("POSTCOPY_ADVISE has not come before");
    }
    if (this.#memory.regions.length > 0) {
      throw new Refusal("guest memory was set before");
    }
    const { fd } = this.#state;
    this.#memory.listenForPostcopy(fd, hangupFd, this.#timeoutMs);
    this.#state = { kind: "listening", isAckDue: false };
  }

  /** The bases are about to be sent. */
  awaitAck(): void {
    if (this.#state.kind === "listening") this.#state.isAckDue = true;
  }

  /** @param payload what came where an ack is due: a u64 of 0 */
  acknowledge(payload: Uint8Array): void {
    if (payload.length !== 8 || payload.some((byte) => byte !== 0)) {
      throw new Refusal("the ack of the mapped regions is not a u64 of 0");
    }
    if (this.#state.kind === "listening") this.#state.isAckDue = false;
  }

  /**
   * The end, whatever came before. With `isGone` the pages that are missing
   * will never come: the memory is revoked if postcopy was under way.
   */
  end(isGone: boolean): void {
    const state = this.#state;
    this.#state = { kind: "off" };
    if (state.kind === "advised") {
      check(core.descriptorClose(state.fd), "Cannot close the userfaultfd");
    }
    if (state.kind === "listening") this.#memory.endPostcopy(isGone);
  }
}
