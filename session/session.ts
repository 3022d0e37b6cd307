/**
 * One front-end's session: its state, the loop that takes its messages one by
 * one, and the starting and stopping of its queues.
 *
 * Everything here happens in one asynchronous function, `run`: a message is
 * handled to its end, ops included, before the next is taken, so no state can
 * change under an op. What must not wait (kicks, calls) goes past it.
 *
 * @module
 */

import { GuestMemory } from "../ffi/guest_memory.ts";
import { Vhost2Error } from "../ffi/errors.ts";
import {
  featureMask,
  hasFeature,
  ProtocolFeature,
  VirtioFeature,
} from "../protocol/features.ts";
import { BackendRequest } from "../protocol/backend_request.ts";
import { VRING_FLAG_LOG } from "../protocol/payloads.ts";
import type { BackendChannel, Connection } from "../transports/transport.ts";
import { Device } from "./device.ts";
import { Dispatcher } from "./dispatcher.ts";
import { Queue } from "./queue.ts";
import { Sequencer } from "./sequencer.ts";
import type { TargetOps } from "./target_ops.ts";
import { Vring } from "./vring.ts";

/** What a session needs to know of its target. */
export interface SessionOptions {
  /** Whose ops run, for `unregister` inside an op. */
  readonly owner: unknown;
  /** Virtio features offered, the library's own included. */
  readonly features: bigint;
  readonly queueCount: number;
  readonly device: (device: Device) => TargetOps;
  report(error: Vhost2Error, device: Device): void;
  /** Receives one line per message, when wanted. */
  readonly trace: ((line: string) => void) | undefined;
}

/** After this many messages in a row the event loop gets its turn. */
const messagesPerTurn = 32;

const logAllMask = featureMask(VirtioFeature.LOG_ALL);

/** Bytes of the three areas of a split ring (virtio 1.3, section 2.7). */
export function ringAreaSizes(queueSize: number) {
  return {
    descriptor: 16 * queueSize,
    available: 6 + 2 * queueSize,
    used: 6 + 8 * queueSize,
  };
}

export class Session {
  readonly options: SessionOptions;
  readonly connection: Connection;
  readonly memory: GuestMemory = new GuestMemory();
  readonly vrings: readonly Vring[];
  readonly device: Device;
  readonly sequencer: Sequencer;
  readonly #end = new AbortController();
  ops: TargetOps = {};
  /** Negotiated virtio features; null until SET_FEATURES. */
  ackedFeatures: bigint | null = null;
  ackedProtocolFeatures = 0n;
  status = 0;
  backendChannel: BackendChannel | null = null;
  /** `deviceFeaturesChanged` is owed. */
  isFeaturesChangeOwed = false;
  /** `deviceInit` is owed before the next start. */
  isInitOwed = true;

  constructor(connection: Connection, options: SessionOptions) {
    this.connection = connection;
    this.options = options;
    this.vrings = Array.from(
      { length: options.queueCount },
      (_, index) => new Vring(index),
    );
    this.device = new Device(this);
    this.sequencer = new Sequencer(options.owner, connection.name);
    this.memory.onFault = () => {
      this.report(
        new Vhost2Error(
          "MEMORY",
          `Cannot go on with ${this.name}: the front-end took guest memory away (its file became shorter)`,
        ),
      );
      for (const vring of this.vrings) vring.error?.signal();
      this.connection.close();
    };
  }

  get name(): string {
    return this.connection.name;
  }

  get features(): bigint {
    return this.ackedFeatures ?? 0n;
  }

  get signal(): AbortSignal {
    return this.#end.signal;
  }

  get startedQueues(): readonly Queue[] {
    return this.vrings.flatMap((vring) =>
      vring.run.kind === "started" ? [vring.run.queue] : []
    );
  }

  /** Protocol features that can be offered to this front-end. */
  get offeredProtocolFeatures(): bigint {
    const offered = featureMask(
      ProtocolFeature.MQ,
      ProtocolFeature.REPLY_ACK,
      ProtocolFeature.BACKEND_REQ,
      ProtocolFeature.RESET_DEVICE,
      ProtocolFeature.CONFIGURE_MEM_SLOTS,
      ProtocolFeature.STATUS,
    );
    const config = this.ops.getConfig === undefined
      ? 0n
      : featureMask(ProtocolFeature.CONFIG);
    return (offered | config) & this.connection.protocolFeatures;
  }

  report(error: Vhost2Error): void {
    this.options.report(error, this.device);
  }

  /** Runs until the front-end has gone or the connection was closed. */
  async run(): Promise<void> {
    try {
      if (await this.#create()) {
        try {
          await this.#takeMessages();
        } catch (error) {
          this.report(error as Vhost2Error);
        }
        this.connection.close();
        await this.#destroy();
      }
    } finally {
      this.#release();
    }
  }

  async #create(): Promise<boolean> {
    try {
      await this.sequencer.call("deviceCreate", async () => {
        this.ops = this.options.device(this.device);
        await this.ops.deviceCreate?.(this.device);
      });
      return true;
    } catch (error) {
      this.report(error as Vhost2Error);
      return false;
    }
  }

  async #takeMessages(): Promise<void> {
    const dispatcher = new Dispatcher(this);
    for (let count = 1;; count++) {
      const message = await this.connection.receive();
      if (message === null) return;
      try {
        await dispatcher.dispatch(message);
      } finally {
        message.descriptors.close();
      }
      await this.#settle();
      if (count % messagesPerTurn === 0) {
        await new Promise((resolve) => setImmediate(resolve));
      }
    }
  }

  async #destroy(): Promise<void> {
    this.#end.abort();
    await this.stopQueues(() => true);
    await this.sequencer.insist(
      "deviceDestroy",
      () => this.ops.deviceDestroy?.(this.device),
      (error) => this.report(error),
    );
  }

  #release(): void {
    this.#end.abort();
    this.connection.close();
    this.backendChannel?.close();
    this.backendChannel = null;
    for (const vring of this.vrings) vring.close();
    this.memory.close();
  }

  /** Owed ops, then the start of every queue that can run. */
  async #settle(): Promise<void> {
    if (this.isFeaturesChangeOwed) {
      this.isFeaturesChangeOwed = false;
      await this.sequencer.call(
        "deviceFeaturesChanged",
        () => this.ops.deviceFeaturesChanged?.(this.device, this.features),
      );
    }
    for (const vring of this.vrings) {
      if (!vring.isReady || this.memory.state !== "ok") continue;
      const queue = this.#makeQueue(vring);
      if (queue === null) continue;
      if (this.isInitOwed) {
        await this.sequencer.call(
          "deviceInit",
          () => this.ops.deviceInit?.(this.device),
        );
        this.isInitOwed = false;
      }
      await this.#start(vring, queue);
    }
  }

  /** The queue of a vring, or null (and an error event) if it is not mapped. */
  #makeQueue(vring: Vring): Queue | null {
    const addresses = vring.addresses!;
    const sizes = ringAreaSizes(vring.size);
    const area = (name: "descriptor" | "available" | "used") =>
      this.memory.whole("uva", addresses[name], sizes[name]);
    const descriptorTable = area("descriptor");
    const availableRing = area("available");
    const usedRing = area("used");
    if (
      descriptorTable === null || availableRing === null || usedRing === null
    ) {
      if (this.memory.regions.length > 0) this.#refuseRing(vring);
      return null;
    }
    return new Queue({
      device: this.device,
      index: vring.index,
      size: vring.size,
      features: this.features & ~logAllMask,
      addresses: { space: "uva", ...addresses },
      descriptorTable,
      availableRing,
      usedRing,
      base: vring.base,
      logAddress: () => {
        const now = vring.addresses;
        return now !== null && (now.flags & VRING_FLAG_LOG) !== 0
          ? now.log
          : null;
      },
      isPolled: vring.kick.kind === "polled",
      memory: this.memory,
      call: () => vring.call?.signal(),
      fail: (reason) => {
        vring.error?.signal();
        this.report(
          new Vhost2Error(
            "RING",
            `Cannot go on with queue ${vring.index} of ${this.name}: ${reason}`,
          ),
        );
      },
    });
  }

  /** Told once: it stays stopped until it, or the memory, is set up anew. */
  #refuseRing(vring: Vring): void {
    vring.run = { kind: "failed" };
    vring.error?.signal();
    this.report(
      new Vhost2Error(
        "MEMORY",
        `Cannot start queue ${vring.index} of ${this.name}: its ring of ${vring.size} descriptors is not inside one memory region`,
      ),
    );
  }

  async #start(vring: Vring, queue: Queue): Promise<void> {
    vring.run = { kind: "starting", queue };
    try {
      await this.sequencer.call(
        "queueStart",
        () => this.ops.queueStart?.(queue),
      );
    } catch (error) {
      queue.markStopped();
      vring.run = { kind: "failed" };
      vring.error?.signal();
      this.report(error as Vhost2Error);
      return;
    }
    vring.run = { kind: "started", queue };
    // Used buffers of an earlier run may never have been announced, and a kick
    // may have come while nobody listened: both sides look once.
    queue.call();
    this.kick(vring);
  }

  /** A kick arrived, or may have: the user's op, if the queue has started. */
  kick(vring: Vring): void {
    if (vring.run.kind !== "started" || vring.run.queue.isBroken) return;
    try {
      this.ops.queueKick?.(vring.run.queue);
    } catch (cause) {
      this.report(
        new Vhost2Error("OP", `Op queueKick of ${this.name} failed: ${cause}`, {
          cause,
        }),
      );
    }
  }

  /** Stops each started queue for which `which` holds, one after the other. */
  async stopQueues(which: (vring: Vring) => boolean): Promise<void> {
    for (const vring of this.vrings) {
      if (vring.run.kind === "started" && which(vring)) await this.stop(vring);
    }
  }

  /** Stops one queue, if it runs, and keeps where it stopped. */
  async stop(vring: Vring): Promise<void> {
    if (vring.run.kind !== "started") return;
    const { queue } = vring.run;
    vring.run = { kind: "stopping", queue };
    const isStopped = await this.sequencer.insist(
      "queueStop",
      () => this.ops.queueStop?.(queue),
      (error) => this.report(error),
    );
    if (!isStopped) {
      // The device cannot be trusted to keep its hands off the guest.
      this.memory.revoke();
      this.connection.close();
    }
    vring.base = queue.availableIndex & 0xffff;
    queue.markStopped();
    vring.run = { kind: "stopped" };
  }

  configChanged(): void {
    if (
      !hasFeature(this.ackedProtocolFeatures, ProtocolFeature.CONFIG) ||
      !hasFeature(this.ackedProtocolFeatures, ProtocolFeature.BACKEND_REQ)
    ) return;
    this.backendChannel
      ?.request(BackendRequest.BACKEND_CONFIG_CHANGE_MSG, new Uint8Array(0))
      .catch((error) => this.report(error));
  }
}
