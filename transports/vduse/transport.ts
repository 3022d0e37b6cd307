/**
 * The life of a VDUSE device: created, or taken up where another process left
 * it; served; attached and detached; destroyed, or left for the next process.
 *
 * A session that ends by itself, for whatever reason, is as a crash: the device
 * is closed and taken up again, and the driver notices nothing but time.
 *
 * @module
 */

import { Vhost2Error } from "../../ffi/errors.ts";
import type { Transport, TransportHost } from "../transport.ts";
import { VduseConnection } from "./connection.ts";
import { deviceTypeOf } from "./device_type.ts";
import { VduseFrontEnd } from "./front_end.ts";
import {
  BrokenVduseDevice,
  type VduseDescription,
  type VduseDevice,
  type VduseKernel,
} from "./kernel.ts";
import { RecoveryLog, runtimeFolder } from "./recovery_log.ts";

/** Before a device that failed is taken up again, doubling. */
const minDelayMs = 100;
const maxDelayMs = 5_000;
/** For the kernel's driver to let go of the device. */
const detachLimitMs = 60_000;

export interface VduseTransportOptions {
  readonly name: string;
  readonly isAttached: boolean;
  readonly stays: boolean;
  readonly queueSize: number;
  /** Packed rings are wanted. */
  readonly hasPacked: boolean;
  readonly runtimeFolder: string | undefined;
}

/** What serves one session. */
interface Serving {
  readonly connection: VduseConnection;
  readonly frontEnd: VduseFrontEnd;
  device: VduseDevice | undefined;
}

export class VduseTransport implements Transport {
  readonly #kernel: VduseKernel;
  readonly #options: VduseTransportOptions;
  readonly #host: TransportHost;
  readonly #log: RecoveryLog;
  #serving: Serving | undefined;
  #count = 0;
  #delayMs = minDelayMs;
  /** When the session now began. */
  #startedAt = 0;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #isClosing = false;
  /** The kernel answers nothing more for the device as it is. */
  #isBroken = false;
  /** The device of that name is of this target: it may be destroyed. */
  #isOurs = false;
  /** A driver that does not let go is asked once. */
  #detaching: Promise<void> | undefined;
  #work: Promise<void> = Promise.resolve();
  readonly #ended: Promise<void>;
  #end: () => void = () => {};

  constructor(
    kernel: VduseKernel,
    options: VduseTransportOptions,
    host: TransportHost,
  ) {
    this.#kernel = kernel;
    this.#options = options;
    this.#host = host;
    this.#log = new RecoveryLog(
      options.runtimeFolder ?? runtimeFolder(),
      options.name,
    );
    this.#ended = new Promise((resolve) => this.#end = resolve);
  }

  get #name(): string {
    return `VDUSE:${this.#options.name}`;
  }

  /** Serves the device, and attaches it. */
  async start(): Promise<void> {
    const { name, queueSize, hasPacked, isAttached } = this.#options;
    const type = deviceTypeOf(this.#host.deviceType);
    const connection = new VduseConnection(`${this.#name} #${++this.#count}`);
    const frontEnd = new VduseFrontEnd(connection, {
      type,
      queueCount: this.#host.queueCount,
      queueSize,
      hasPacked,
      failed: (error) => this.#host.failed(error),
    });
    const serving: Serving = { connection, frontEnd, device: undefined };
    this.#serving = serving;
    this.#startedAt = performance.now();
    this.#host.connected(connection).then(() => this.#sessionEnded(serving));
    try {
      const description = await frontEnd.introduce();
      const device = await this.#open(connection, description);
      if (!connection.isOpen) {
        device.close();
        throw connection.ended();
      }
      serving.device = device;
      frontEnd.onBroken = (reason) => this.#broke(serving, reason);
      frontEnd.serve(device, this.#log);
      if (!isAttached) return;
      await this.#attach();
      if (this.#kernel.driverOf(name) !== null) return;
      this.#host.failed(
        new Vhost2Error(
          "SYSTEM",
          `Cannot find a driver for VDUSE device ${name}, which is attached: run "modprobe virtio_vdpa" for one of this kernel, or "modprobe vhost_vdpa" for virtual machines`,
        ),
      );
    } catch (error) {
      connection.hangUp();
      throw error;
    }
  }

  async #attach(): Promise<void> {
    const { name } = this.#options;
    // By a process before this one, or by somebody else.
    if (this.#kernel.isAttached(name)) return;
    await this.#kernel.attach(name);
  }

  /** The device of that name if it is the same; otherwise a new one. */
  async #open(
    connection: VduseConnection,
    description: VduseDescription,
  ): Promise<VduseDevice> {
    const { name } = this.#options;
    const found = this.#kernel.open(name);
    if (found !== null) {
      const isSame = this.#log.read(description) !== null && !this.#isBroken;
      if (isSame && this.#takeUp(found, description)) return found;
      found.close();
      // Only the driver's end ends a broken device.
      if (this.#isBroken && this.#options.isAttached) await this.#detach();
      // Nobody would serve a new one, nor detach it.
      if (!connection.isOpen) throw connection.ended();
      if (!this.#kernel.destroy(name)) {
        throw new Vhost2Error(
          "IN_USE",
          `Cannot take up VDUSE device ${name}: it is attached, and ${
            this.#isBroken ? "broken" : "another one"
          }; run "vdpa dev del ${name}"`,
        );
      }
    }
    this.#isBroken = false;
    // Before the device: one without a log is another's.
    this.#log.begin(description, "none");
    try {
      this.#kernel.create(name, description);
    } catch (error) {
      this.#log.remove();
      throw error;
    }
    this.#isOurs = true;
    const device = this.#kernel.open(name);
    if (device === null) {
      throw new Vhost2Error(
        "SYSTEM",
        `Cannot open VDUSE device ${name}: it was created, and is not in /dev/vduse`,
      );
    }
    try {
      for (let index = 0; index < description.queueCount; index++) {
        device.setUpQueue(index, description.queueSize);
      }
      return device;
    } catch (error) {
      device.close();
      if (!(error instanceof BrokenVduseDevice)) throw error;
      this.#isBroken = true;
      throw new Vhost2Error(
        "SYSTEM",
        `Cannot set up VDUSE device ${name}: it is broken (${error.message})`,
      );
    }
  }

  /** False for a device that has broken while nobody served it. */
  #takeUp(found: VduseDevice, { config }: VduseDescription): boolean {
    try {
      found.setConfig(config);
    } catch (error) {
      if (error instanceof BrokenVduseDevice) {
        this.#isBroken = true;
        return false;
      }
      found.close();
      throw error;
    }
    this.#isOurs = true;
    return true;
  }

  #broke(serving: Serving, reason: string): void {
    this.#isBroken = true;
    this.#host.failed(
      new Vhost2Error(
        "CLOSED",
        `Cannot go on with VDUSE device ${this.#options.name}: it is broken (${reason})`,
      ),
    );
    serving.connection.hangUp();
  }

  /** `connected` tells it. */
  disconnected(): void {}

  #sessionEnded(serving: Serving): void {
    if (serving !== this.#serving) return;
    this.#serving = undefined;
    serving.frontEnd.end();
    serving.device?.close();
    this.#work = this.#work.then(() => this.#next());
  }

  /** Nobody serves the device: takes it up again, or ends. */
  #next(): void {
    if (this.#isClosing) return this.#release();
    const servedMs = performance.now() - this.#startedAt;
    if (servedMs > maxDelayMs) this.#delayMs = minDelayMs;
    this.#timer = setTimeout(() => {
      this.#timer = undefined;
      this.#work = this.#work.then(() => this.#restart());
    }, this.#delayMs);
    this.#delayMs = Math.min(2 * this.#delayMs, maxDelayMs);
  }

  async #restart(): Promise<void> {
    if (this.#isClosing) return this.#release();
    try {
      await this.start();
    } catch (error) {
      // The session ends too, and `#next` follows. One that has ended before
      // was told of then.
      const { code } = error as Vhost2Error;
      if (code !== "CLOSED") this.#host.failed(error as Vhost2Error);
    }
  }

  /**
   * While the session still serves: the driver finishes what it has begun. It
   * does not ask whether a disk is mounted. From a virtual machine it is not
   * taken away: that waits for the next process.
   */
  async dismiss(): Promise<void> {
    this.#isClosing = true;
    const { isAttached, stays } = this.#options;
    // Where nobody answers the driver cannot let go.
    const isServed = this.#serving?.device !== undefined;
    if (isAttached && !stays && isServed && !this.#isLent()) {
      await this.#detach();
    }
  }

  /**
   * A virtual machine runs with it. The kernel would wait for its end, with
   * all of vDPA locked, and a process whose thread waits there cannot end.
   */
  #isLent(): boolean {
    const driver = this.#kernel.driverOf(this.#options.name);
    return driver === "vhost_vdpa" && this.#serving!.frontEnd.isRunning;
  }

  async #detach(): Promise<void> {
    const { name } = this.#options;
    if (!this.#kernel.isAttached(name)) return;
    let timer: ReturnType<typeof setTimeout> | undefined;
    const limit = new Promise<never>((_, reject) => {
      timer = setTimeout(
        () =>
          reject(
            new Vhost2Error(
              "TIMEOUT",
              `Cannot detach VDUSE device ${name}: its driver does not let go of it`,
            ),
          ),
        detachLimitMs,
      );
    });
    try {
      this.#detaching ??= this.#kernel.detach(name)
        .finally(() => this.#detaching = undefined);
      await Promise.race([this.#detaching, limit]);
    } catch (error) {
      this.#host.failed(error as Vhost2Error);
    } finally {
      clearTimeout(timer);
    }
  }

  /** Resolves when the device is closed, and destroyed unless it stays. */
  close(): Promise<void> {
    this.#isClosing = true;
    if (this.#serving === undefined) {
      clearTimeout(this.#timer);
      this.#work = this.#work.then(() => this.#release());
    }
    return this.#ended;
  }

  #isReleased = false;

  #release(): void {
    if (this.#isReleased || this.#serving !== undefined) return;
    this.#isReleased = true;
    const { name, stays } = this.#options;
    try {
      if (stays || !this.#isOurs) return;
      if (this.#kernel.destroy(name)) this.#log.remove();
      else {
        this.#host.failed(
          new Vhost2Error(
            "IN_USE",
            `Cannot destroy VDUSE device ${name}: it is attached, and waits for the next process; run "vdpa dev del ${name}" first`,
          ),
        );
      }
    } catch (error) {
      this.#host.failed(error as Vhost2Error);
    } finally {
      this.#end();
    }
  }
}
