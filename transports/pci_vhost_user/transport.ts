/**
 * Front-ends come and go behind one device. It serves one at a time: BACKEND_UP
 * lets one come; when both bits of the status are cleared it has gone, and
 * BACKEND_UP is set again once everything of it has ended.
 *
 * @module
 */

import { Vhost2Error } from "../../ffi/errors.ts";
import type { PciDevice } from "../../pci/pci_device.ts";
import type { Connection, Transport, TransportHost } from "../transport.ts";
import { PciVhostUserConnection } from "./connection.ts";
import { VhostUserPciDevice, VhostUserStatus } from "./device.ts";
import type { MessageReceiver, RawMessage } from "./message_queues.ts";
import type { ProfileName } from "./profiles.ts";

/** Before a device that failed is started again, doubling. */
const minDelayMs = 100;
const maxDelayMs = 5_000;
/** For a device to take the last answers to a front-end that has gone. */
const drainLimitMs = 1_000;

export interface PciTransportOptions {
  readonly profile: ProfileName | undefined;
  readonly queueCount: number;
}

export class PciVhostUserTransport implements Transport, MessageReceiver {
  readonly #pci: PciDevice;
  readonly #options: PciTransportOptions;
  readonly #host: TransportHost;
  #device: VhostUserPciDevice | undefined;
  #connection: PciVhostUserConnection | undefined;
  /** Front-ends may come: BACKEND_UP is set and nobody is here. */
  #isWaiting = false;
  #isOpen = true;
  /** The device has gone for good. */
  #isGone = false;
  /** The device must be reset before it can be used again. */
  #isBroken = false;
  #count = 0;
  #delayMs = minDelayMs;
  #timer: ReturnType<typeof setTimeout> | undefined;
  /** What is being done between two front-ends. */
  #work: Promise<void> = Promise.resolve();
  readonly #ended: Promise<void>;
  #end: () => void = () => {};

  constructor(
    pci: PciDevice,
    options: PciTransportOptions,
    host: TransportHost,
  ) {
    this.#pci = pci;
    this.#options = options;
    this.#host = host;
    this.#ended = new Promise((resolve) => this.#end = resolve);
    pci.onRemoval = () => this.#vanished("it is being taken away");
  }

  get #name(): string {
    return `PCI-vhost-user:${this.#pci.name}`;
  }

  /** Starts the device and lets a front-end come. */
  async start(): Promise<void> {
    this.#isBroken = false;
    const device = await VhostUserPciDevice.open(this.#pci, {
      ...this.#options,
      receiver: this,
      onChange: () => this.#changed(),
    });
    this.#device = device;
    this.#offer();
  }

  /** A front-end may come; perhaps one waits already. */
  #offer(): void {
    this.#isWaiting = true;
    this.#device!.setBackendUp(true);
    this.#changed();
  }

  /** Configuration has changed. What was sent before that comes first. */
  #changed(): void {
    const device = this.#device;
    if (device === undefined) return;
    if (!this.#isWorking()) return;
    device.queues.poll();
    setImmediate(() => {
      if (device === this.#device && this.#isWorking()) this.#look();
    });
  }

  /** Whether the device works; otherwise its end is begun. */
  #isWorking(): boolean {
    if (this.#isGone || this.#isBroken || this.#device === undefined) {
      return false;
    }
    switch (this.#device.condition) {
      case "gone":
        this.#vanished("it answers all ones");
        return false;
      case "needsReset":
        this.broken("it says that it needs a reset");
        return false;
      case "ok":
        return true;
    }
  }

  #look(): void {
    const { status } = this.#device!;
    const isBackendUp = (status & VhostUserStatus.backendUp) !== 0;
    const isFrontendUp = (status & VhostUserStatus.frontendUp) !== 0;
    if (this.#connection !== undefined) {
      // A message may come before FRONTEND_UP is seen: only the bit that was
      // ours to set tells that the front-end has gone.
      if (!isBackendUp) this.#connection.hangUp(null);
    } else if (this.#isWaiting) {
      if (isFrontendUp && isBackendUp) this.#connect();
      // Somebody came and went between two looks.
      else if (!isBackendUp) this.#device!.setBackendUp(true);
    }
  }

  #connect(): PciVhostUserConnection {
    this.#isWaiting = false;
    this.#delayMs = minDelayMs;
    const name = `${this.#name} #${++this.#count}`;
    const connection = new PciVhostUserConnection(this.#device!, name);
    this.#connection = connection;
    this.#host.connected(connection);
    return connection;
  }

  /** A message may come before the interrupt that says who sends it. */
  message(message: RawMessage): void {
    const connection = this.#connection ??
      (this.#isWaiting ? this.#connect() : undefined);
    connection?.deliver(message);
  }

  empty(): void {
    this.#connection?.hangUp(null);
  }

  sent(): void {
    this.#connection?.sent();
  }

  /** The device broke the rules, or says that it is broken. */
  broken(reason: string): void {
    if (this.#isBroken || this.#isGone) return;
    if (this.#device?.condition === "gone") {
      return this.#vanished("it answers all ones");
    }
    this.#isBroken = true;
    this.#fail(
      new Vhost2Error(
        "PROTOCOL",
        `Cannot go on with PCI device ${this.#pci.name}: ${reason}`,
      ),
    );
  }

  #vanished(reason: string): void {
    if (this.#isGone) return;
    this.#isGone = true;
    this.#fail(
      new Vhost2Error(
        "CLOSED",
        `Cannot go on with PCI device ${this.#pci.name}: it has gone (${reason})`,
      ),
    );
  }

  #fail(error: Vhost2Error): void {
    this.#isWaiting = false;
    this.#host.failed(error);
    if (this.#connection !== undefined) this.#connection.hangUp(null);
    else this.#next();
  }

  disconnected(connection: Connection): void {
    if (connection !== this.#connection) return;
    this.#connection = undefined;
    this.#next();
  }

  /** Nobody is here: makes ready for the next front-end, or ends. */
  #next(): void {
    this.#work = this.#work.then(async () => {
      if (this.#connection !== undefined || this.#timer !== undefined) return;
      if (!this.#isOpen || this.#isGone) {
        await this.#release();
        if (this.#isOpen) this.#host.ended();
        return;
      }
      if (this.#isBroken || !await this.#dismiss()) {
        await this.#closeDevice();
        this.#retry();
      } else if (this.#isOpen) this.#offer();
      else await this.#release();
    }).catch((error: Error) => this.broken(error.message));
  }

  /**
   * Sends a front-end away that may still be there, and lets go of what was
   * between us. False when the device has to be reset for it.
   */
  async #dismiss(): Promise<boolean> {
    const device = this.#device;
    if (device === undefined || !this.#isWorking()) return false;
    if (this.#isWaiting) return true;
    device.setBackendUp(false);
    device.queues.setPaused(false);
    const end = performance.now() + drainLimitMs;
    while (device.queues.outstanding > 0) {
      if (performance.now() > end) return false;
      await new Promise((resolve) => setTimeout(resolve, 1));
    }
    // What it sent before it went is nobody's.
    device.queues.poll();
    await new Promise((resolve) => setImmediate(resolve));
    return this.#isWorking();
  }

  #retry(): void {
    this.#timer = setTimeout(() => {
      this.#timer = undefined;
      this.#work = this.#work.then(() => this.#restart());
    }, this.#delayMs);
    this.#delayMs = Math.min(this.#delayMs * 2, maxDelayMs);
  }

  async #restart(): Promise<void> {
    if (!this.#isOpen) return await this.#release();
    try {
      await this.start();
    } catch (error) {
      this.#host.failed(error as Vhost2Error);
      this.#isBroken = true;
      if (this.#isOpen) this.#retry();
      else await this.#release();
      return;
    }
    if (!this.#isOpen && this.#connection === undefined) await this.#release();
  }

  async #closeDevice(): Promise<void> {
    const device = this.#device;
    this.#device = undefined;
    await device?.close();
  }

  #isReleased = false;

  async #release(): Promise<void> {
    if (this.#isReleased) return;
    this.#isReleased = true;
    this.#isWaiting = false;
    this.#pci.onRemoval = undefined;
    await this.#closeDevice();
    this.#pci.close();
    this.#end();
  }

  /** Resolves when the device is closed, which its last front-end precedes. */
  close(): Promise<void> {
    if (this.#isOpen) {
      this.#isOpen = false;
      this.#isWaiting = false;
      clearTimeout(this.#timer);
      this.#timer = undefined;
      if (this.#connection === undefined) this.#next();
    }
    return this.#ended;
  }
}
