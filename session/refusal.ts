/**
 * A message that cannot be accepted.
 *
 * @module
 */

import { Vhost2Error } from "../ffi/errors.ts";

/** Thrown by a handler: the front-end is told, the reason is reported. */
export class Refusal extends Vhost2Error {
  override readonly name = "Refusal";

  /** @param reason the value that was wrong, and why */
  constructor(reason: string) {
    super("PROTOCOL", reason);
  }
}
