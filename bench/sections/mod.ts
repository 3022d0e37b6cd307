/**
 * All sections, in the order in which they are printed.
 *
 * @module
 */

import type { Section } from "../section.ts";
import { dirtyLog } from "./dirty_log.ts";
import { disks } from "./disks.ts";
import { floor } from "./floor.ts";
import { formats } from "./formats.ts";
import { guest } from "./guest.ts";
import { heap } from "./heap.ts";
import { latency } from "./latency.ts";
import { memory } from "./memory.ts";
import { native } from "./native.ts";
import { network, networkInNode } from "./network.ts";
import { node } from "./node.ts";
import { processor } from "./processor.ts";
import { addedQueue, queues } from "./queues.ts";
import { translation } from "./translation.ts";
import { transportsBeside } from "./transports.ts";
import { verify } from "./verify.ts";

export const sections: readonly Section[] = [
  disks,
  native,
  latency,
  processor,
  queues,
  addedQueue,
  network,
  memory,
  translation,
  node,
  networkInNode,
  transportsBeside,
  formats,
  dirtyLog,
  guest,
  heap,
  verify,
  floor,
];
