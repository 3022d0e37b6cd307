/**
 * The Workers of one target: queues are spread over them, and one that has
 * died is replaced when a queue needs it.
 *
 * @module
 */

import { Vhost2Error } from "../../ffi/errors.ts";
import type { Device } from "../device.ts";
import type { DeviceModule } from "../device_module.ts";
import type { TargetOps } from "../target_ops.ts";
import { DeviceRelay } from "./relay.ts";
import { WorkerThread } from "./thread.ts";

/** What a pool is made of. */
export interface PoolOptions {
  readonly targetName: string;
  readonly count: number;
  readonly device: DeviceModule;
  /** Told of a Worker's death, where no device can tell. */
  report(error: Vhost2Error): void;
}

export class WorkerPool {
  readonly #options: PoolOptions;
  readonly #threads: (WorkerThread | undefined)[];
  /** All that have not ended; more than slots while one is being replaced. */
  readonly #living = new Set<WorkerThread>();
  readonly #relays = new Set<DeviceRelay>();
  #deviceCount = 0;
  #isClosed = false;

  private constructor(options: PoolOptions) {
    this.#options = options;
    this.#threads = Array.from({ length: options.count });
  }

  /**
   * Starts the Workers; fulfilled when all have imported the device's module.
   *
   * @throws Vhost2Error OPTION when one cannot
   */
  static async open(options: PoolOptions): Promise<WorkerPool> {
    const pool = new WorkerPool(options);
    try {
      const slots = pool.#threads.map((_, slot) => slot);
      await Promise.all(slots.map((slot) => pool.#serving(slot)));
    } catch (error) {
      await pool.close();
      if (error instanceof Vhost2Error) throw error;
      const { module } = options.device;
      throw new Vhost2Error(
        "OPTION",
        `Cannot serve ${module} in a Worker: ${(error as Error).message}`,
        { cause: error },
      );
    }
    return pool;
  }

  #start(slot: number): WorkerThread {
    const { module, name = "default", options } = this.#options.device;
    const thread: WorkerThread = new WorkerThread({
      module: String(module),
      name,
      options,
      onMessage: (message) => {
        for (const relay of this.#relays) {
          if (relay.take(message, thread)) return;
        }
      },
      onLost: (cause) => this.#lost(thread, slot, cause),
      onDeath: (_, accounts) => {
        for (const relay of this.#relays) relay.threadDied(thread, accounts);
      },
    });
    this.#threads[slot] = thread;
    this.#living.add(thread);
    thread.ended.then(() => this.#living.delete(thread));
    return thread;
  }

  /** The Worker of a slot, when it serves. */
  async #serving(slot: number): Promise<WorkerThread> {
    if (this.#isClosed) {
      throw new Vhost2Error(
        "CLOSED",
        `Cannot start a Worker: ${this.#options.targetName} is unregistered`,
      );
    }
    let thread = this.#threads[slot];
    if (thread === undefined || thread.isOver) thread = this.#start(slot);
    await thread.ready;
    return thread;
  }

  #lost(thread: WorkerThread, slot: number, cause: Error): void {
    let isTold = false;
    for (const relay of this.#relays) {
      isTold = relay.threadLost(thread, cause) || isTold;
    }
    // Whoever waits for it to become ready is told by that.
    if (isTold || !thread.wasReady) return;
    this.#options.report(
      new Vhost2Error(
        "OP",
        `Worker ${slot} of ${this.#options.targetName} has ended: ${cause.message}`,
        { cause },
      ),
    );
  }

  /** The ops of a device, those of its queues relayed to Workers. */
  relay(device: Device, ops: TargetOps): TargetOps {
    // Devices with one queue each are spread too.
    const first = this.#deviceCount++;
    const { queuesTogether = 1 } = this.#options.device;
    const relay: DeviceRelay = new DeviceRelay(
      device,
      ops,
      ({ index }) => {
        const group = Math.floor(index / queuesTogether);
        return this.#serving((first + group) % this.#options.count);
      },
      () => this.#relays.delete(relay),
    );
    this.#relays.add(relay);
    return relay.ops;
  }

  /** Ends all Workers. Their devices have been destroyed. */
  async close(): Promise<void> {
    this.#isClosed = true;
    await Promise.all([...this.#living].map((thread) => thread.end()));
  }
}
