/**
 * Ops of the library's in front of a user's.
 *
 * @module
 */

import type { TargetOps } from "./target_ops.ts";

/**
 * The ops of `front`, and all others, whatever there are, of `ops`, with the
 * `this` of the object that they are.
 */
export function overlay(ops: TargetOps, front: TargetOps): TargetOps {
  return new Proxy(ops, {
    get(target, name) {
      if (name in front) return Reflect.get(front, name);
      const value = Reflect.get(target, name);
      return typeof value === "function" ? value.bind(target) : value;
    },
  });
}
