/**
 * Limits of what a device's options say.
 *
 * @module
 */

import { Vhost2Error } from "../ffi/errors.ts";

/** `value`; throws OPTION where it is no whole number from `least` to `most`. */
export function requireInteger(
  name: string,
  value: number,
  least: number,
  most: number,
): number {
  if (Number.isInteger(value) && value >= least && value <= most) return value;
  throw new Vhost2Error(
    "OPTION",
    `Cannot use ${name}: ${value} (a whole number from ${least} to ${most})`,
  );
}
