/**
 * The dirty log of a guest memory: which pages were written, for a front-end
 * that migrates the guest. The bits are the core's to set; here is what the
 * front-end's messages change, and the marks of those who write by themselves.
 *
 * @module
 */

import { constants, layouts } from "./abi.gen.ts";
import { core } from "./core.ts";
import { check, errnoName, Vhost2Error } from "./errors.ts";

const resultOut = new DataView(new ArrayBuffer(layouts.PrepareResult.byteSize));

/** Why a log was refused, as one clause. */
function refusal(size: bigint, offset: bigint): string {
  const field = layouts.PrepareResult;
  const value = resultOut.getBigUint64(field.value, true);
  const limit = resultOut.getBigUint64(field.limit, true);
  switch (resultOut.getUint32(field.reason, true)) {
    case constants.refuseSizeZero:
      return "its size is 0";
    case constants.refuseFileOffsetWraps:
      return `offset ${offset} with size ${size} passes 2^64`;
    case constants.refuseFileTooSmall:
      return `its file holds ${value} bytes, the log needs ${limit}`;
    case constants.refuseFileKind:
      return "its descriptor is neither shared memory nor a file that can safely be mapped";
    case constants.refuseMmap:
      return `mmap failed with ${errnoName(Number(value))}`;
    case constants.refuseMappings:
      return "this process holds too many mappings";
    default:
      return "the core refused it";
  }
}

/**
 * When a method returns, everybody goes by what it has changed, in every
 * thread: the front-end may be told.
 */
export class DirtyLog {
  readonly #memory: number;

  /** Of the core's guest memory `memory`. */
  constructor(memory: number) {
    this.#memory = memory;
  }

  /**
   * Logs into `size` bytes at `offset` of a file, whose descriptor stays the
   * caller's, instead of the log before. Throws PROTOCOL with the reason where
   * they cannot be; the log before then stays.
   */
  setBase(fd: number, size: bigint, offset: bigint): void {
    const result = core.logSetBase(this.#memory, fd, size, offset, resultOut);
    if (result >= 0) return;
    throw new Vhost2Error(
      "PROTOCOL",
      `Cannot map the dirty log: ${refusal(size, offset)}`,
      { errno: -result },
    );
  }

  /** Logs nothing any more, and lets go of the log and its event. */
  drop(): void {
    core.logSetBase(this.#memory, -1, 0n, 0n, resultOut);
    core.logSetEvent(this.#memory, -1);
  }

  /** Signals an eventfd, which it takes over, whenever bits are set. */
  setEvent(fd: number): void {
    check(core.logSetEvent(this.#memory, fd), "Cannot use a log event");
  }

  /** Whether writes into buffers are logged: LOG_ALL. */
  setLogging(isOn: boolean): void {
    core.logSetLogging(this.#memory, isOn ? 1 : 0);
  }

  /** The address that stands for a queue's used ring; null: not logged. */
  setRing(queue: number, address: bigint | null): void {
    check(
      core.logSetRing(
        this.#memory,
        queue,
        address === null ? 0 : 1,
        address ?? 0n,
      ),
      `Cannot log queue ${queue}`,
    );
  }

  /** `length` bytes of the guest at `gpa` were written. */
  mark(gpa: bigint, length: number): void {
    core.logMark(this.#memory, gpa, BigInt(length));
  }

  /** `length` bytes at `offset` of a queue's used ring were written. */
  markRing(queue: number, offset: number, length: number): void {
    core.logMarkRing(this.#memory, queue, offset, length);
  }
}
