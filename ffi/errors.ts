/**
 * Errors of the library: closed sets of codes, a message of the form
 * "action: value", the cause kept.
 *
 * @module
 */

import { getSystemErrorName } from "node:util";

/** What an error is about, for programs; the message is for people. */
export type ErrorCode =
  /** The core refused or a system call failed; `errno` says which way. */
  | "SYSTEM"
  /** The native core could not be loaded, or is of another build. */
  | "CORE"
  /** An argument or option is not usable. */
  | "OPTION"
  /** The address is in use, by a target of this process or by another one. */
  | "IN_USE"
  /** The front-end broke the protocol. */
  | "PROTOCOL"
  /** The guest's driver broke its ring. */
  | "RING"
  /** Guest memory went away under us, or an address is not mapped. */
  | "MEMORY"
  /** The object has ended: target unregistered, queue stopped, device gone. */
  | "CLOSED"
  /** An operation took longer than its limit. */
  | "TIMEOUT"
  /** An op of the user's failed. */
  | "OP";

/**
 * Every error that this library throws.
 *
 * @example
 * ```ts
 * import { Vhost2Error } from "vhost2";
 * const error = new Vhost2Error("OPTION", "Cannot use queueCount: -1");
 * if (error.code !== "OPTION") throw error;
 * ```
 */
export class Vhost2Error extends Error {
  override readonly name: string = "Vhost2Error";
  /** What the error is about. */
  readonly code: ErrorCode;
  /** The system's error number, positive, where there is one. */
  readonly errno: number | undefined;

  /**
   * @param code what the error is about
   * @param message "action: value", one sentence
   * @param options the cause and the system's error number
   */
  constructor(
    code: ErrorCode,
    message: string,
    options: { cause?: unknown; errno?: number } = {},
  ) {
    super(
      message,
      options.cause === undefined ? undefined : { cause: options.cause },
    );
    this.code = code;
    this.errno = options.errno;
  }
}

/** `EBADF` for 9; `errno 4242` for what the system does not know. */
export function errnoName(errno: number): string {
  try {
    return getSystemErrorName(-errno);
  } catch {
    return `errno ${errno}`;
  }
}

/**
 * Turns a negative result of the core into an error; the only place that does.
 *
 * @param result what the core returned
 * @param action what was being done, for the message
 * @returns the result, 0 or more
 */
export function check(result: number, action: string): number {
  if (result >= 0) return result;
  throw new Vhost2Error("SYSTEM", `${action}: ${errnoName(-result)}`, {
    errno: -result,
  });
}

/** Numbers of the few system errors that the code tells apart. */
export const Errno = {
  EPERM: 1,
  ENOENT: 2,
  EINTR: 4,
  EBADF: 9,
  EAGAIN: 11,
  ENOMEM: 12,
  EACCES: 13,
  EFAULT: 14,
  EBUSY: 16,
  EEXIST: 17,
  EINVAL: 22,
  ENFILE: 23,
  EMFILE: 24,
  EPIPE: 32,
  ENODATA: 61,
  EPROTO: 71,
  ENOTSOCK: 88,
  EADDRINUSE: 98,
  ECONNREFUSED: 111,
  EUCLEAN: 117,
} as const;

/** An error on its way to another isolate. */
export interface ErrorMessage {
  readonly name: string;
  readonly message: string;
  readonly stack: string | undefined;
  readonly code: ErrorCode | undefined;
  readonly errno: number | undefined;
  readonly cause: ErrorMessage | undefined;
}

/** What can be sent of anything that was thrown. */
export function errorToMessage(error: unknown): ErrorMessage {
  const { name, message, stack, cause } = error instanceof Error
    ? error
    : new Error(String(error));
  const own = error instanceof Vhost2Error ? error : undefined;
  return {
    name,
    message,
    stack,
    code: own?.code,
    errno: own?.errno,
    cause: cause === undefined ? undefined : errorToMessage(cause),
  };
}

/** The error as it was, with the stack of where it was thrown. */
export function errorFromMessage(sent: ErrorMessage): Error {
  const { name, message, stack, code, errno } = sent;
  const cause = sent.cause && errorFromMessage(sent.cause);
  const error = code === undefined
    ? new Error(message, cause && { cause })
    : new Vhost2Error(code, message, { cause, errno });
  if (error.name !== name) {
    Object.defineProperty(error, "name", { value: name });
  }
  Object.defineProperty(error, "stack", { value: stack });
  return error;
}
