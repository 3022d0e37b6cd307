/**
 * A device whose requests stay open until the test completes them.
 *
 * @module
 */

import { requestOps, virtqueueFeatures } from "../../mod.ts";
import type { Request } from "../../mod.ts";
import type { Events } from "../support/wait.ts";
import type { Victim } from "./world.ts";

/** A device that hands its requests to the test. */
export function holding(
  requests: Events<Request>,
  options: Parameters<typeof requestOps>[1] = {},
): Victim {
  return {
    queueCount: 2,
    features: virtqueueFeatures,
    device: () =>
      requestOps((request) => {
        requests.push(request);
        return new Promise<number>(() => {});
      }, { stopTimeoutMs: 50, ...options }),
  };
}
