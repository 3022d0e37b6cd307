/**
 * One front-end's block device: the ops that the session calls.
 *
 * @module
 */

import { Vhost2Error } from "../../ffi/errors.ts";
import { featureMask, hasFeature } from "../../protocol/features.ts";
import type { Device } from "../../session/device.ts";
import type { Queue } from "../../session/queue.ts";
import type { SetConfigReason, TargetOps } from "../../session/target_ops.ts";
import type { Backing } from "./backings/backing.ts";
import {
  BlkFeature,
  type BlkGeometry,
  configField,
  encodeConfig,
} from "./config.ts";
import { type BlkSession, RequestQueue } from "./requests.ts";

/** What all front-ends of a disk share. */
export interface Disk {
  readonly geometry: BlkGeometry;
  readonly backing: Backing;
  readonly counts: Float64Array;
  readonly id: Uint8Array<ArrayBuffer>;
  readonly stopTimeoutMs: number | undefined;
  readonly pollMicroseconds: number | undefined;
  /** Whether a new front-end finds the disk in writeback mode. */
  readonly isWriteback: boolean;
  /** One element, in sectors of 512 bytes; a resize changes it. */
  readonly capacity: Float64Array;
  report(error: Vhost2Error, device: Device): void;
}

/** Bytes of `Device.shared`: an i32, whether writes are not stable at once. */
export const sharedBytes = 4;

const cacheFeatures = featureMask(BlkFeature.FLUSH, BlkFeature.CONFIG_WCE);

/** A disk as one front-end sees it. */
export class BlkDevice implements TargetOps, BlkSession {
  readonly geometry: BlkGeometry;
  readonly backing: Backing;
  readonly counts: Float64Array;
  readonly id: Uint8Array<ArrayBuffer>;
  readonly stopTimeoutMs: number | undefined;
  readonly pollMicroseconds: number | undefined;
  readonly #disk: Disk;
  readonly #device: Device;
  readonly #ended: () => void;
  readonly #queues = new Map<Queue, RequestQueue>();
  #features: bigint | null = null;
  /** In the memory of all instances: the one that is configured tells. */
  readonly #writeback: Int32Array;

  /** `ended` is called when the front-end has gone. */
  constructor(device: Device, disk: Disk, ended: () => void) {
    this.geometry = disk.geometry;
    this.backing = disk.backing;
    this.counts = disk.counts;
    this.id = disk.id;
    this.stopTimeoutMs = disk.stopTimeoutMs;
    this.pollMicroseconds = disk.pollMicroseconds;
    this.#disk = disk;
    this.#device = device;
    this.#ended = ended;
    // A factory that was wrapped in a function of a user's own has none.
    const { shared } = device;
    this.#writeback = new Int32Array(
      shared.byteLength < sharedBytes
        ? new SharedArrayBuffer(sharedBytes)
        : shared,
    );
  }

  get capacity(): number {
    return this.#disk.capacity[0];
  }

  get #isWriteback(): boolean {
    return this.#writeback[0] === 1;
  }

  /** Virtio 1.3, 5.2.6.2: when a write is stable as soon as it completes. */
  get isWriteThrough(): boolean {
    return !this.#isWriteback;
  }

  /** In the registering thread: as a new front-end finds the disk. */
  deviceCreate(): void {
    this.#setWriteback(this.#disk.isWriteback);
  }

  report(error: Vhost2Error): void {
    this.#disk.report(error, this.#device);
  }

  deviceFeaturesChanged(_device: Device, features: bigint): void {
    const isSame = this.#features !== null &&
      ((features ^ this.#features) & cacheFeatures) === 0n;
    this.#features = features;
    if (isSame) return;
    // Who cannot flush must not need to (5.2.5.2).
    this.#setWriteback(
      this.#disk.isWriteback && hasFeature(features, BlkFeature.FLUSH),
    );
  }

  queueStart(queue: Queue): void {
    this.#queues.set(queue, new RequestQueue(queue, this));
  }

  async queueStop(queue: Queue): Promise<void> {
    await this.#queues.get(queue)?.stop();
    this.#queues.delete(queue);
  }

  queueKick(queue: Queue): void {
    this.#queues.get(queue)?.kick();
  }

  deviceDestroy(): void {
    this.#ended();
  }

  getConfig(): Uint8Array {
    return encodeConfig(this.geometry, this.capacity, this.#isWriteback);
  }

  setConfig(
    _device: Device,
    offset: number,
    data: Uint8Array,
    reason: SetConfigReason,
  ): void {
    const at = configField.writeback - offset;
    if (reason === "migration") {
      // All of it comes back; the rest is what this disk says anyway.
      if (at >= 0 && at < data.length) this.#configureWriteback(data[at]);
      return;
    }
    if (at !== 0 || data.length !== 1) {
      throw new Vhost2Error(
        "PROTOCOL",
        `Cannot write ${data.length} bytes at ${offset} of the configuration: only the byte at ${configField.writeback} can be written`,
      );
    }
    if (!hasFeature(this.#features ?? 0n, BlkFeature.CONFIG_WCE)) {
      throw new Vhost2Error(
        "PROTOCOL",
        "Cannot change the write cache: CONFIG_WCE was not negotiated",
      );
    }
    this.#configureWriteback(data[0]);
  }

  #configureWriteback(value: number): void {
    if (value > 1) {
      throw new Vhost2Error(
        "PROTOCOL",
        `Cannot set the write cache: ${value} is neither 0 nor 1`,
      );
    }
    this.#setWriteback(value === 1);
  }

  #setWriteback(isWriteback: boolean): void {
    Atomics.store(this.#writeback, 0, isWriteback ? 1 : 0);
  }
}
