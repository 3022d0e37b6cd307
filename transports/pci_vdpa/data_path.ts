/**
 * A guest's queues in a PCI device: which of them the device has, by which
 * ring, and where each goes on.
 *
 * A queue that begins where a virtio PCI device begins, at index 0, is passed
 * on as it is (`DirectRing`); one that goes on somewhere else, that is packed
 * (its index could not be read back), that nobody kicks, or whose writes are
 * logged, gets a ring of ours (`ShadowRing`).
 *
 * Queues come and go one by one. A device with RING_RESET follows. One without
 * is given all of its queues before DRIVER_OK, as the standard wants: so
 * starts wait a moment for each other, and a queue that stops takes all others
 * down with the device, which is then started again with those that stay.
 *
 * @module
 */

import { Vhost2Error } from "../../ffi/errors.ts";
import {
  describeFeatures,
  featureMask,
  hasFeature,
  ProtocolFeature,
  VirtioFeature,
} from "../../protocol/features.ts";
import type { DataPath, DataPathHost, DataPathQueue } from "../transport.ts";
import type { VdpaDevice } from "./device.ts";
import { DirectRing, guestAddresses } from "./direct_ring.ts";
import { GuestDma } from "./guest_dma.ts";
import { HostNotifier } from "./host_notifier.ts";
import type { RunningRing } from "./running_ring.ts";
import { ShadowRing } from "./shadow_ring.ts";

/** For the other queues of a front-end that starts, or stops, all of them. */
const startDelayMs = 2;
const restartDelayMs = 10;

interface Run {
  readonly queue: DataPathQueue;
  /** Where the queue goes on. */
  position: number;
  /** While the device has it. */
  ring: RunningRing | undefined;
  readonly notifier: HostNotifier;
}

export class PciVdpaDataPath implements DataPath {
  readonly features: bigint;
  readonly protocolFeatures = featureMask(ProtocolFeature.LOG_SHMFD);
  readonly queueCount: number;
  readonly configSize: number;
  readonly #device: VdpaDevice;
  readonly #dma: GuestDma;
  readonly #runs = new Map<number, Run>();
  #host: DataPathHost | undefined;
  #features = 0n;
  /** A device that is given some queues must not be given them twice. */
  #work: Promise<void> = Promise.resolve();
  #timer: ReturnType<typeof setTimeout> | undefined;
  #isOpen = true;

  constructor(device: VdpaDevice) {
    this.#device = device;
    this.#dma = new GuestDma(device.pci);
    // Packed rings only for who asks: they are never passed on directly.
    this.features = device.features & ~featureMask(VirtioFeature.RING_PACKED);
    this.queueCount = device.queueCount;
    this.configSize = device.configSize;
  }

  get #name(): string {
    return `PCI device ${this.#device.pci.name}`;
  }

  attach(host: DataPathHost): void {
    this.#host = host;
    host.memory.watcher = this.#dma;
    this.#device.onChange = () => this.#deviceChanged();
  }

  /** One thing at a time is done to the device. */
  #exclusively(work: () => Promise<void>): Promise<void> {
    const done = this.#work.then(work);
    this.#work = done.catch(() => {});
    return done;
  }

  get #isLogging(): boolean {
    return hasFeature(this.#features, VirtioFeature.LOG_ALL);
  }

  featuresChanged(features: bigint): Promise<void> {
    return this.#exclusively(async () => {
      const wasLogging = this.#isLogging;
      this.#features = features;
      if (this.#isLogging && !wasLogging) await this.#beginLog();
    });
  }

  /**
   * What the device writes by itself nobody sees: it gets rings of ours. All
   * that it may have written before is logged at once.
   */
  async #beginLog(): Promise<void> {
    const direct = this.#inDevice.filter(({ ring }) =>
      ring instanceof DirectRing
    );
    if (direct.length > 0) {
      await this.#takeDown(direct);
      await this.#launch();
    }
    const { memory } = this.#host!;
    for (const { gpa, size } of memory.regions) memory.log.mark(gpa, size);
  }

  startQueue(queue: DataPathQueue): Promise<void> {
    return this.#exclusively(async () => {
      this.#requireUsable(queue);
      const position = queue.availableIndex;
      const notifier = new HostNotifier(queue);
      const run: Run = { queue, position, ring: undefined, notifier };
      this.#runs.set(queue.index, run);
      queue.onChanged = () => run.ring?.changed();
      const { isUp, canResetQueues, condition } = this.#device;
      // Before DRIVER_OK all queues are there.
      if (isUp && (!canResetQueues || condition !== "ok")) {
        await this.#takeDown(this.#inDevice);
      }
      if (!canResetQueues) return this.#launchLater(startDelayMs);
      try {
        await this.#launch();
      } catch (error) {
        this.#runs.delete(queue.index);
        queue.onChanged = undefined;
        throw error;
      }
    });
  }

  #requireUsable({ index, features }: DataPathQueue): void {
    if (this.#device.condition === "gone") {
      throw new Vhost2Error(
        "CLOSED",
        `Cannot start queue ${index}: ${this.#name} has gone`,
      );
    }
    const needed = featureMask(VirtioFeature.VERSION_1);
    if ((features & needed) === 0n) {
      throw new Vhost2Error(
        "PROTOCOL",
        `Cannot start queue ${index}: the guest's driver has not acked ${
          describeFeatures(needed)
        }`,
      );
    }
    if (index < this.queueCount) return;
    throw new Vhost2Error(
      "OPTION",
      `Cannot start queue ${index}: ${this.#name} has ${this.queueCount} to pass on`,
    );
  }

  get #inDevice(): Run[] {
    return [...this.#runs.values()].filter(({ ring }) => ring !== undefined);
  }

  #launchLater(delayMs: number): void {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      this.#timer = undefined;
      this.#exclusively(() => this.#launch()).catch((error: Vhost2Error) => {
        for (const { queue } of this.#runs.values()) {
          queue.fail(error.message, error);
        }
      });
    }, delayMs);
  }

  /** Gives the device those queues that it has not. */
  async #launch(): Promise<void> {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    const waiting = [...this.#runs.values()].filter((run) =>
      run.ring === undefined
    );
    if (waiting.length === 0) return;
    try {
      for (const run of waiting) run.ring = this.#makeRing(run);
      const rings = waiting.map(({ ring }) => ring!);
      const refused = new Set<number>();
      if (this.#device.isUp) {
        for (const ring of rings) {
          if (!this.#device.add(ring)) refused.add(ring.index);
        }
      } else {
        for (const index of await this.#device.start(this.#features, rings)) {
          refused.add(index);
        }
      }
      for (const run of waiting) {
        run.ring!.started(!refused.has(run.queue.index));
        this.#notify(run);
      }
      await this.#useQueues(this.#inDevice);
    } catch (error) {
      await this.#giveUp(waiting);
      throw error;
    }
  }

  /** By whom the device is told of the guest's buffers. */
  #notify(run: Run): void {
    if (run.ring instanceof DirectRing) run.notifier.give(this.#device);
    // What was written to the register has not reached our own ring.
    else run.notifier.takeBack(() => run.ring?.kick());
  }

  /** A start failed: of the queues to be started the device has none. */
  async #giveUp(waiting: readonly Run[]): Promise<void> {
    const others = this.#inDevice.filter((run) => !waiting.includes(run));
    if (others.length === 0) await this.#device.reset();
    for (const run of waiting) {
      if (run.ring === undefined) continue;
      if (others.length > 0) await this.#device.resetQueue(run.queue.index);
      run.position = await run.ring.end();
      run.ring = undefined;
    }
  }

  #makeRing({ queue, position }: Run): RunningRing {
    const options = {
      queue,
      device: this.#device,
      report: (error: Vhost2Error) => this.#host!.report(error),
    };
    const isPassedOn = position === 0 && !this.#isLogging && !queue.isPolled &&
      !hasFeature(queue.features, VirtioFeature.RING_PACKED) &&
      queue.size <= this.#device.largestQueue(queue.index) &&
      // QEMU's devices take that for a queue that was not set up.
      guestAddresses(queue).descriptor !== 0n;
    return isPassedOn
      ? new DirectRing(options)
      : new ShadowRing(options, position);
  }

  /**
   * Takes queues away from the device, and, where it can only be reset as a
   * whole, all others with them.
   */
  async #takeDown(wanted: readonly Run[]): Promise<void> {
    const all = this.#inDevice;
    const isWhole = !this.#device.canResetQueues ||
      wanted.length === all.length;
    const runs = isWhole ? all : wanted;
    await Promise.all(runs.map(({ ring }) => ring!.quiesce()));
    if (isWhole) this.#told(await this.#device.reset());
    else {
      await this.#useQueues(all.filter((run) => !runs.includes(run)));
      for (const { queue } of runs) {
        this.#told(await this.#device.resetQueue(queue.index));
      }
    }
    for (const run of runs) {
      run.position = await run.ring!.end();
      run.ring = undefined;
    }
  }

  async #useQueues(runs: readonly Run[]): Promise<void> {
    const indices = runs.map(({ queue }) => queue.index);
    this.#told(await this.#device.useQueues(indices));
  }

  /** A reset that failed leaves the device off the bus, or it has gone. */
  #told(failure: Vhost2Error | null): void {
    if (failure !== null) this.#host!.report(failure);
  }

  stopQueue(queue: DataPathQueue): Promise<void> {
    return this.#exclusively(async () => {
      const run = this.#runs.get(queue.index);
      if (run === undefined || run.queue !== queue) return;
      if (run.ring !== undefined) await this.#takeDown([run]);
      this.#runs.delete(queue.index);
      queue.onChanged = undefined;
      queue.availableIndex = run.position;
      const isOver = this.#runs.size === 0;
      if (isOver) clearTimeout(this.#timer);
      else if (this.#inDevice.length < this.#runs.size) {
        this.#launchLater(restartDelayMs);
      }
    });
  }

  kick({ index }: DataPathQueue): void {
    this.#runs.get(index)?.ring?.kick();
  }

  readConfig(): Uint8Array {
    return this.#device.readConfig();
  }

  writeConfig(offset: number, data: Uint8Array): void {
    this.#device.writeConfig(offset, data);
  }

  #deviceChanged(): void {
    const { condition } = this.#device;
    if (condition === "ok") return this.#host!.configChanged();
    const reason = condition === "gone"
      ? `${this.#name} has gone`
      : `${this.#name} says that it needs a reset`;
    for (const { queue } of this.#runs.values()) queue.fail(reason);
    if (condition !== "gone" || !this.#isOpen) return;
    this.#host!.report(
      new Vhost2Error(
        "CLOSED",
        `Cannot go on with ${this.#host!.name}: ${this.#name} has gone`,
      ),
    );
    this.#host!.close();
  }

  end(): Promise<void> {
    return this.#exclusively(async () => {
      if (this.#inDevice.length > 0) await this.#takeDown(this.#inDevice);
      else if (this.#device.isUp) this.#told(await this.#device.reset());
      this.#runs.clear();
      this.detach();
    });
  }

  detach(): void {
    if (!this.#isOpen) return;
    this.#isOpen = false;
    clearTimeout(this.#timer);
    this.#device.onChange = undefined;
    // Somebody's stop has failed, again and again.
    if (this.#device.isUp) this.#device.cutOff();
    this.#dma.close();
  }
}
