/**
 * A ring of our own in the device, beside the guest's: requests are taken out
 * of the guest's ring by `virtqueue/` and put into ours by `driver/`; their
 * buffers stay where the guest has them. It knows at any time which requests
 * are where, so the guest's ring may begin at any index, stops at a consistent
 * point, and what the device writes is logged.
 *
 * @module
 */

import { constants } from "../../ffi/abi.gen.ts";
import { Vhost2Error } from "../../ffi/errors.ts";
import type { GuestBuffer, QueueDriver } from "../../driver/queue_driver.ts";
import type { QueueAddresses } from "../../pci/virtio_registers.ts";
import { hasFeature, VirtioFeature } from "../../protocol/features.ts";
import {
  accessWrite,
  RequestWord,
  SegmentWord,
} from "../../virtqueue/batch.ts";
import { Virtqueue } from "../../virtqueue/virtqueue.ts";
import type { DataPathQueue } from "../transport.ts";
import { OwnRing } from "./own_ring.ts";
import {
  type RingOptions,
  type RunningRing,
  watchInterrupts,
  whenIdle,
} from "./running_ring.ts";

/** Bytes of a descriptor, and at most of one request's indirect table. */
const descriptorSize = 16;
const maxTableSize = 2048 * descriptorSize;
/** Room for the tables of the requests in flight. */
const tablesSize = 16 * maxTableSize;

/** A request in the device. */
interface InFlight {
  /** Where the guest's ring goes on should it not be done. */
  readonly position: number;
  readonly serial: number;
}

export class ShadowRing implements RunningRing {
  readonly index: number;
  readonly size: number;
  readonly addresses: QueueAddresses;
  readonly #options: RingOptions;
  readonly #queue: DataPathQueue;
  readonly #own: OwnRing;
  readonly #driver: QueueDriver;
  readonly #isIndirect: boolean;
  readonly #inFlight = new Map<number, InFlight>();
  #virtqueue: Virtqueue | undefined;
  #unwatch: (() => void) | undefined;
  #tableBytes = 0;
  /** Where the guest's ring goes on after what was taken last. */
  #position = 0;
  #serial = 0;
  /** The youngest of the requests that are done. */
  #lastDone = -1;
  #isStopping = false;

  /** @param position where the guest's ring goes on */
  constructor(options: RingOptions, position: number) {
    const { queue, device } = options;
    this.#options = options;
    this.#queue = queue;
    this.index = queue.index;
    this.#isIndirect = hasFeature(
      queue.features,
      VirtioFeature.RING_INDIRECT_DESC,
    );
    queue.availableIndex = position;
    this.#own = new OwnRing(device.pci, {
      index: queue.index,
      most: Math.min(queue.size, device.largestQueue(queue.index)),
      features: queue.features,
      roomFor: tablesSize,
      notify: device.notifier(queue.index),
    });
    this.#driver = this.#own.driver;
    this.size = this.#own.size;
    this.addresses = this.#own.addresses;
  }

  started(hasVector: boolean): void {
    this.#unwatch = watchInterrupts(
      this.#options,
      hasVector,
      () => void this.#driver.poll(),
    );
    this.#virtqueue = new Virtqueue(this.#queue, {
      // One at a time: so it is known where in the ring each one was.
      maxBatch: 1,
      process: () => this.#take(),
      isCongested: () =>
        this.#isStopping || this.#tableBytes > tablesSize - maxTableSize,
      stopTimeoutMs: 0,
    });
    this.#position = this.#virtqueue.position;
    this.#virtqueue.kick();
  }

  /** The request that was popped goes to the device. */
  #take(): void {
    const { batch } = this.#virtqueue!;
    const { words } = batch;
    const head = words[RequestWord.head];
    const buffers = this.#buffers(
      words[RequestWord.segmentFirst],
      words[RequestWord.readableCount] + words[RequestWord.writableCount],
    );
    const indirect = this.#isIndirect && buffers.length > 1;
    const tableBytes = indirect ? descriptorSize * buffers.length : 0;
    const serial = this.#serial++;
    this.#inFlight.set(head, { position: this.#position, serial });
    this.#position = this.#virtqueue!.position;
    this.#tableBytes += tableBytes;
    this.#driver.submitChain(buffers, { indirect }).then((written) => {
      this.#tableBytes -= tableBytes;
      this.#inFlight.delete(head);
      this.#lastDone = Math.max(this.#lastDone, serial);
      this.#virtqueue?.complete(head, written);
    }, (error: Vhost2Error) => {
      this.#tableBytes -= tableBytes;
      if (!this.#isStopping) this.#queue.fail(error.message, error);
    });
  }

  /** The segments of a request by the guest's, and so the device's, addresses. */
  #buffers(first: number, count: number): GuestBuffer[] {
    const { words, segments } = this.#virtqueue!.batch;
    const buffers: GuestBuffer[] = [];
    for (let i = first; i < first + count; i++) {
      const at = segments + i * SegmentWord.count;
      buffers.push({
        address: this.#guestAddress(
          words[at + SegmentWord.view],
          words[at + SegmentWord.offset],
        ),
        length: words[at + SegmentWord.length],
        isWritable: words[at + SegmentWord.access] === accessWrite,
      });
    }
    return buffers;
  }

  #guestAddress(view: number, offset: number): bigint {
    for (const { viewFirst, size, gpa } of this.#queue.memory.regions) {
      const at = (view - viewFirst) * constants.viewSize + offset;
      if (view >= viewFirst && at < size) return gpa + BigInt(at);
    }
    throw new Vhost2Error("MEMORY", "Cannot find a region: it has gone");
  }

  kick(): void {
    this.#virtqueue?.kick();
  }

  changed(): void {
    // Calls are made by the guest's queue itself.
  }

  async quiesce(): Promise<void> {
    this.#isStopping = true;
    await whenIdle(
      this.#options,
      // Of a ring that the device has broken nothing comes any more.
      () => this.#inFlight.size === 0 || this.#driver.failure !== undefined,
    );
  }

  async end(): Promise<number> {
    this.#isStopping = true;
    this.#unwatch?.();
    // What the device did last may have come without an interrupt.
    this.#driver.poll();
    // Its completions reach the guest's ring before that ends.
    await new Promise((resolve) => setImmediate(resolve));
    await this.#virtqueue?.stop();
    this.#own.close();
    return this.#rest() ?? this.#queue.availableIndex;
  }

  /**
   * What is still in flight lies behind all that is done, and is to be done
   * again: where it begins. Otherwise it is lost, because a ring's index
   * cannot tell it from what is done. Null where nothing is left.
   */
  #rest(): number | null {
    const [oldest] = this.#inFlight.values();
    if (oldest === undefined) return null;
    if (oldest.serial > this.#lastDone) {
      // Packed: what is available begins where what is used does.
      return this.#own.isPacked
        ? ((oldest.position & 0xffff) * 0x1_0001) >>> 0
        : oldest.position & 0xffff;
    }
    this.#options.report(
      new Vhost2Error(
        "RING",
        `Cannot go on with ${this.#inFlight.size} requests of queue ${this.index} of PCI device ${this.#options.device.pci.name}: it was stopped before it had done them`,
      ),
    );
    return null;
  }
}
