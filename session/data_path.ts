/**
 * Ops in front of a user's where the device is a real one: its data path does
 * the work, and the user's ops look on.
 *
 * @module
 */

import type { DataPath } from "../transports/transport.ts";
import { overlay } from "./overlay.ts";
import type { TargetOps } from "./target_ops.ts";

/**
 * @param ops the user's. A queue starts when they have let it, and stops before
 * they are told; configuration space passes through them.
 */
export function throughDataPath(ops: TargetOps, path: DataPath): TargetOps {
  const front: TargetOps = {
    async deviceFeaturesChanged(device, features) {
      await ops.deviceFeaturesChanged?.(device, features);
      await path.featuresChanged(features);
    },
    async queueStart(queue) {
      await ops.queueStart?.(queue);
      try {
        await path.startQueue(queue);
      } catch (error) {
        await ops.queueStop?.(queue);
        throw error;
      }
    },
    async queueStop(queue) {
      await path.stopQueue(queue);
      await ops.queueStop?.(queue);
    },
    queueKick(queue) {
      path.kick(queue);
      ops.queueKick?.(queue);
    },
    async deviceDestroy(device) {
      await path.end();
      await ops.deviceDestroy?.(device);
    },
  };
  if (path.configSize > 0) {
    front.getConfig = (device) => {
      const own = path.readConfig();
      return ops.getConfig?.(device, own) ?? own;
    };
    front.setConfig = (device, offset, data, reason) => {
      ops.setConfig?.(device, offset, data, reason);
      path.writeConfig(offset, data);
    };
  }
  return overlay(ops, front);
}
