/**
 * A device's interrupts, by whatever it has: MSI-X vectors, the pin, or, with
 * neither, a timer.
 *
 * Who asks for a vector may have to share it: a handler that is called looks
 * for itself what there is to do.
 *
 * @module
 */

import { core } from "../ffi/core.ts";
import { check } from "../ffi/errors.ts";
import { eventLoop, type Watch } from "../ffi/event_loop.ts";
import type { PciDevice } from "./pci_device.ts";

/** For a register of the device: no vector. */
export const NO_VECTOR = 0xffff;
/** Between two looks at what cannot interrupt, in milliseconds. */
const pollMs = 5;

interface Vector {
  readonly fd: number;
  readonly watch: Watch;
  readonly handlers: Set<() => void>;
}

export class PciInterrupts {
  readonly #device: PciDevice;
  readonly #vectors: Vector[] = [];
  readonly #polled = new Set<() => void>();
  #timer: ReturnType<typeof setInterval> | undefined;
  readonly #kind: "msix" | "pin" | "none";

  /** @param wanted vectors that would be used, if the device has as many */
  constructor(device: PciDevice, wanted: number) {
    this.#device = device;
    const count = Math.min(wanted, device.vectorCount);
    this.#kind = count > 0 ? "msix" : device.hasPin ? "pin" : "none";
    try {
      for (let i = 0; i < (this.#kind === "pin" ? 1 : count); i++) this.#add();
      const fds = this.#vectors.map(({ fd }) => fd);
      if (this.#kind === "msix") device.setVectors(fds);
      if (this.#kind === "pin") device.setPin(fds[0]);
    } catch (error) {
      this.#closeVectors();
      throw error;
    }
  }

  /** MSI-X vectors that can be used; 0 with the pin or none. */
  get vectorCount(): number {
    return this.#kind === "msix" ? this.#vectors.length : 0;
  }

  #add(): void {
    const fd = check(core.eventfdCreate(), "Cannot make an interrupt eventfd");
    const handlers = new Set<() => void>();
    const fire = () => {
      for (const handler of [...handlers]) handler();
      if (this.#kind === "pin") this.#device.unmaskPin();
    };
    try {
      this.#vectors.push({ fd, watch: eventLoop.watch(fd, fire), handlers });
    } catch (error) {
      core.descriptorClose(fd);
      throw error;
    }
  }

  /**
   * Calls `handler` at each interrupt of `vector`, or at each one of the
   * device that has no vectors. Returns the undo.
   */
  handle(vector: number, handler: () => void): () => void {
    if (this.#kind === "none") return this.poll(handler);
    const { handlers } = this.#vectors[this.#kind === "pin" ? 0 : vector];
    handlers.add(handler);
    return () => handlers.delete(handler);
  }

  /**
   * Has a vector signal somebody else's eventfd, without a way through this
   * process, or by null its own again. What is pending is not lost: it is
   * signalled by the one or the other.
   */
  route(vector: number, fd: number | null): void {
    this.#device.setVectors([fd ?? this.#vectors[vector].fd], vector);
  }

  /** The vector's eventfd, for who waits by himself. */
  descriptor(vector: number): number {
    return this.#vectors[vector].fd;
  }

  /** Calls `handler` every few milliseconds; returns the undo. */
  poll(handler: () => void): () => void {
    this.#polled.add(handler);
    this.#timer ??= setInterval(() => {
      for (const look of [...this.#polled]) look();
    }, pollMs);
    return () => {
      this.#polled.delete(handler);
      if (this.#polled.size > 0) return;
      clearInterval(this.#timer);
      this.#timer = undefined;
    };
  }

  #closeVectors(): void {
    for (const { fd, watch } of this.#vectors.splice(0)) {
      watch.close();
      core.descriptorClose(fd);
    }
  }

  close(): void {
    clearInterval(this.#timer);
    this.#timer = undefined;
    this.#polled.clear();
    if (this.#kind === "msix") this.#device.setVectors([]);
    if (this.#kind === "pin") this.#device.setPin(null);
    this.#closeVectors();
  }
}
