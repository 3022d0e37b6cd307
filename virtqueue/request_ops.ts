/**
 * The shortest way to a device: one function that answers requests.
 *
 * @module
 */

import type { Request } from "./request.ts";
import type { StartedQueue } from "./started_queue.ts";
import { Virtqueue, type VirtqueueOptions } from "./virtqueue.ts";

/** Answers a request: the number of bytes written, now or later. */
export type RequestHandler = (
  request: Request,
  queue: StartedQueue,
) => number | void | Promise<number | void>;

/** The three ops that process queues; spread them into a device's own. */
export interface RequestOps {
  queueStart(queue: StartedQueue): void;
  queueStop(queue: StartedQueue): Promise<void>;
  queueKick(queue: StartedQueue): void;
}

/**
 * Ops that pop requests, call `handler` for each, and complete it with what
 * the handler answers, in whatever order answers come. A handler that fails
 * completes its request with 0 bytes written.
 *
 * @example An entropy source
 * ```ts
 * import { requestOps } from "vhost2";
 * const ops = requestOps((request) => {
 *   for (const view of request.writable) crypto.getRandomValues(view);
 *   return request.writableBytes;
 * });
 * ```
 */
export function requestOps(
  handler: RequestHandler,
  options: Omit<VirtqueueOptions, "process" | "expire" | "suspend"> = {},
): RequestOps {
  const running = new Map<StartedQueue, Virtqueue>();
  const answer = (
    request: Request,
    queue: StartedQueue,
    open: Set<Request>,
  ) => {
    const complete = (written: number | void) => {
      open.delete(request);
      request.complete(written ?? 0);
    };
    const fail = (error: unknown) => {
      console.error(`Cannot answer a request of queue ${queue.index}:`, error);
      complete(0);
    };
    try {
      const written = handler(request, queue);
      if (written instanceof Promise) {
        open.add(request);
        written.then(complete, fail);
      } else complete(written);
    } catch (error) {
      fail(error);
    }
  };
  return {
    queueStart(queue) {
      const open = new Set<Request>();
      const virtqueue = new Virtqueue(queue, {
        ...options,
        process(count) {
          for (const request of virtqueue.requests(count)) {
            answer(request, queue, open);
          }
        },
        expire() {
          for (const request of open) request.complete(0);
        },
      });
      running.set(queue, virtqueue);
    },
    async queueStop(queue) {
      await running.get(queue)?.stop();
      running.delete(queue);
    },
    queueKick(queue) {
      running.get(queue)?.kick();
    },
  };
}
