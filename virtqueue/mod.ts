/**
 * Requests in batches over a started queue, without a copy.
 *
 * @module
 */

export * from "./batch.ts";
export * from "./features.ts";
export * from "./request.ts";
export * from "./request_ops.ts";
export * from "./started_queue.ts";
export { Virtqueue, type VirtqueueOptions } from "./virtqueue.ts";
