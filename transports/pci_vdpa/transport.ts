/**
 * A socket in front of one PCI device. The device serves one front-end at a
 * time; those that come in the meantime wait. It is opened before the first
 * comes, and again, should it be of no more use, before the next one.
 *
 * @module
 */

import { Vhost2Error } from "../../ffi/errors.ts";
import type { Connection, Transport, TransportHost } from "../transport.ts";
import { PciVdpaConnection } from "./connection.ts";
import type { VdpaDevice } from "./device.ts";

/** Front-ends that may wait for their turn. */
const maxWaiting = 16;

export interface PciVdpaTransportOptions {
  /** For messages: `PCI-vDPA:0000:00:06.0`. */
  readonly name: string;
  openDevice(): Promise<VdpaDevice>;
  openSocket(host: TransportHost): Transport;
}

export class PciVdpaTransport implements Transport {
  readonly #options: PciVdpaTransportOptions;
  readonly #host: TransportHost;
  #socket: Transport | undefined;
  #device: VdpaDevice | undefined;
  #current: PciVdpaConnection | undefined;
  readonly #waiting: Connection[] = [];
  /** To be told when a connection's session has ended. */
  readonly #served = new Map<Connection, () => void>();
  #isOpening = false;
  #isOpen = true;
  #count = 0;
  readonly #ended: Promise<void>;
  #end: () => void = () => {};

  constructor(options: PciVdpaTransportOptions, host: TransportHost) {
    this.#options = options;
    this.#host = host;
    this.#ended = new Promise((resolve) => this.#end = resolve);
  }

  /** Opens the device, then the socket. */
  async start(): Promise<void> {
    this.#device = await this.#options.openDevice();
    this.#watchIdle();
    try {
      this.#socket = this.#options.openSocket({
        queueCount: this.#host.queueCount,
        deviceType: this.#host.deviceType,
        connected: (connection) =>
          new Promise((resolve) => {
            this.#served.set(connection, resolve);
            this.#connected(connection);
          }),
        failed: (error) => this.#host.failed(error),
        ended: () => this.#host.ended(),
      });
    } catch (error) {
      this.#device.close();
      throw error;
    }
  }

  #connected(connection: Connection): void {
    if (this.#waiting.length >= maxWaiting) {
      this.#host.failed(
        new Vhost2Error(
          "IN_USE",
          `Cannot serve ${connection.name}: ${maxWaiting} front-ends wait for ${this.#options.name} already`,
        ),
      );
      return this.#dismiss(connection);
    }
    this.#waiting.push(connection);
    connection.onHangup = () => {
      const index = this.#waiting.indexOf(connection);
      if (index < 0) return;
      this.#waiting.splice(index, 1);
      this.#dismiss(connection);
    };
    this.#next();
  }

  /** Later: a socket that is just being opened is not in place yet. */
  #dismiss(connection: Connection): void {
    connection.close();
    queueMicrotask(() => this.#gone(connection));
  }

  #gone(connection: Connection): void {
    this.#served.get(connection)?.();
    this.#served.delete(connection);
    this.#socket?.disconnected(connection);
  }

  /** The next front-end's turn, when nobody else has the device. */
  async #next(): Promise<void> {
    if (this.#current !== undefined || this.#isOpening) return;
    if (!this.#isOpen) return this.#release();
    if (this.#waiting.length === 0) return;
    this.#isOpening = true;
    let failure: Vhost2Error | undefined;
    try {
      this.#device ??= await this.#options.openDevice();
    } catch (error) {
      failure = error as Vhost2Error;
    }
    this.#isOpening = false;
    const connection = this.#waiting.shift();
    if (failure !== undefined) {
      this.#host.failed(failure);
      if (connection !== undefined) this.#dismiss(connection);
    } else if (!this.#isOpen) {
      if (connection !== undefined) this.#dismiss(connection);
    } else if (connection === undefined) {
      this.#watchIdle();
    } else {
      const name = `${this.#options.name} #${++this.#count}`;
      this.#current = new PciVdpaConnection(connection, this.#device!, name);
      this.#host.connected(this.#current);
      return;
    }
    return this.#next();
  }

  /** A device that goes while nobody uses it is let go of. */
  #watchIdle(): void {
    const device = this.#device;
    if (device === undefined) return;
    device.onChange = () => {
      if (device.isLost) this.#forgetDevice();
    };
  }

  #forgetDevice(): void {
    this.#device?.close();
    this.#device = undefined;
  }

  disconnected(connection: Connection): void {
    if (connection !== this.#current) return;
    const { inner } = this.#current;
    this.#current = undefined;
    if (this.#device?.isLost) this.#forgetDevice();
    this.#watchIdle();
    this.#gone(inner);
    this.#next();
  }

  /** Resolves when the device is closed, which its last front-end precedes. */
  close(): Promise<void> {
    if (this.#isOpen) {
      this.#isOpen = false;
      this.#socket?.close();
      for (const connection of this.#waiting.splice(0)) {
        this.#dismiss(connection);
      }
      this.#next();
    }
    return this.#ended;
  }

  #release(): void {
    this.#forgetDevice();
    this.#end();
  }
}
