/**
 * The kernel's side of VDUSE: devices that processes create and serve, and what
 * the kernel's own driver does with one. It answers as Linux does (messages
 * that wait, interrupts that need DRIVER_OK, kicks that are kept), and can be
 * made to break at any call.
 */

import { core } from "../../ffi/core.ts";
import { check, Vhost2Error } from "../../ffi/errors.ts";
import {
  BrokenVduseDevice,
  type VduseDescription,
  type VduseDevice,
  type VduseEntry,
  type VduseKernel,
  type VduseQueueInfo,
  type VduseRequest,
  type VduseResponse,
} from "../../mod.ts";

const driverOk = 4;
type Entry = Omit<VduseEntry, "fd"> & { readonly file: number };
/** Without the number that the device gives it. */
export type Asked = VduseRequest extends infer R
  ? R extends VduseRequest ? Omit<R, "id"> : never
  : never;

interface Waiting {
  readonly request: VduseRequest;
  resolve(response: VduseResponse): void;
}

class ModelQueue {
  info: VduseQueueInfo | undefined;
  size = 0;
  kick = -1;
  isKicked = false;
  /** How often the process has asked how it is. */
  looks = 0;
  /** The driver's interrupt handler. */
  called: () => void = () => {};
}

export class ModelDevice {
  readonly description: VduseDescription;
  readonly queues: ModelQueue[];
  config: Uint8Array;
  status = 0;
  driverFeatures = 0n;
  isAttached = false;
  isBroken = false;
  isOpen = false;
  configCalls = 0;
  /** The kernel's IOTLB, in the order of addresses. */
  entries: Entry[] = [];
  /** Calls of the process until it finds the device broken; never unless set. */
  callsLeft = Infinity;
  onBreak: () => void = () => {};
  /** Between an answer and the kernel's thread that waits for it. */
  afterAnswer: () => Promise<void> = () => Promise.resolve();
  #nextId = 1;
  #sent: Waiting[] = [];
  #received: Waiting[] = [];
  #handler: (() => void) | undefined;

  constructor(description: VduseDescription) {
    this.description = description;
    this.config = description.config.slice();
    this.queues = Array.from(
      { length: description.queueCount },
      () => new ModelQueue(),
    );
  }

  /** Sends a message and waits for its answer, for ever. */
  ask(asked: Asked): Promise<VduseResponse> {
    if (this.isBroken) return Promise.resolve({ id: 0, isFailed: true });
    return new Promise((resolve) => {
      const request = { ...asked, id: this.#nextId++ } as VduseRequest;
      this.#sent.push({ request, resolve });
      this.#notify();
    });
  }

  /** How many messages wait for an answer. */
  get waiting(): number {
    return this.#sent.length + this.#received.length;
  }

  /** As a driver sets it; whether the device did as it was told. */
  async setStatus(status: number): Promise<boolean> {
    const { isFailed } = await this.ask({ kind: "setStatus", status });
    await this.afterAnswer();
    if (status === 0) this.#reset();
    else if (!isFailed) this.status = status;
    return !isFailed;
  }

  #reset(): void {
    this.status = 0;
    this.driverFeatures = 0n;
    for (const queue of this.queues) {
      queue.info = undefined;
      this.#setKick(queue, -1);
      queue.isKicked = false;
      queue.called = () => {};
    }
  }

  /** The driver kicks a queue. */
  kick(index: number): void {
    const queue = this.queues[index];
    if (!queue.info?.isReady) return;
    if (queue.kick >= 0) core.eventfdSignal(queue.kick);
    else queue.isKicked = true;
  }

  /** What waited too long breaks a device for good. */
  break(): void {
    if (this.isBroken) return;
    this.isBroken = true;
    this.onBreak();
    for (const { resolve } of [...this.#received, ...this.#sent]) {
      resolve({ id: 0, isFailed: true });
    }
    this.#received = [];
    this.#sent = [];
    this.#notify();
  }

  #notify(): void {
    const handler = this.#handler;
    if (handler !== undefined) setImmediate(() => handler());
  }

  #setKick(queue: ModelQueue, fd: number): void {
    if (queue.kick >= 0) core.descriptorClose(queue.kick);
    queue.kick = fd < 0 ? -1 : core.descriptorDuplicate(fd);
    if (queue.kick < 0 || !queue.info?.isReady || !queue.isKicked) return;
    queue.isKicked = false;
    core.eventfdSignal(queue.kick);
  }

  destroy(): void {
    for (const queue of this.queues) this.#setKick(queue, -1);
  }

  /** The process's handle. */
  open(): VduseDevice {
    this.isOpen = true;
    const call = <T>(action: () => T): T => {
      if (this.callsLeft-- <= 0) this.break();
      if (this.isBroken) throw new BrokenVduseDevice("the model says so");
      return action();
    };
    return {
      watch: (handler) => {
        this.#handler = handler;
        return () => this.#handler = undefined;
      },
      receive: () =>
        call(() => {
          const next = this.#sent.shift();
          if (next !== undefined) this.#received.push(next);
          return next?.request ?? null;
        }),
      respond: (response) =>
        call(() => {
          const at = this.#received.findIndex(({ request }) =>
            request.id === response.id
          );
          if (at < 0) return false;
          this.#received.splice(at, 1)[0].resolve(response);
          return true;
        }),
      features: () => call(() => this.driverFeatures),
      queueInfo: (index) =>
        call(() => {
          if (index >= this.queues.length) return null;
          this.queues[index].looks++;
          return this.queues[index].info ?? notReady;
        }),
      setUpQueue: (index, size) => call(() => this.queues[index].size = size),
      setKick: (index, fd) => call(() => this.#setKick(this.queues[index], fd)),
      inject: (index) =>
        call(() => {
          if ((this.status & driverOk) === 0) return false;
          this.queues[index].called();
          return true;
        }),
      injectConfig: () =>
        call(() => {
          if ((this.status & driverOk) === 0) return false;
          this.configCalls++;
          return true;
        }),
      setConfig: (config) => call(() => void (this.config = config.slice())),
      entry: (start, last) =>
        call(() => {
          const found = this.entries.find((entry) =>
            entry.start <= last && entry.last >= start
          );
          if (found === undefined) return null;
          const { file, ...entry } = found;
          return { ...entry, fd: core.descriptorDuplicate(file) };
        }),
      map: (fd, offset, size) =>
        call(() => {
          const address = new BigUint64Array(1);
          check(core.mapAnonymous(size, address), "Cannot map");
          check(
            core.mapOver(address[0], size, fd, Number(offset)),
            "Cannot map",
          );
          return address[0];
        }),
      close: () => {
        this.isOpen = false;
        this.#handler = undefined;
        // Answered by whoever opens it next.
        this.#sent = [...this.#received, ...this.#sent];
        this.#received = [];
      },
    };
  }
}

const notReady: VduseQueueInfo = {
  descriptor: 0n,
  driver: 0n,
  device: 0n,
  size: 0,
  base: 0,
  isReady: false,
};

export class VduseModel implements VduseKernel {
  readonly devices = new Map<string, ModelDevice>();
  onCreate: (device: ModelDevice) => void = () => {};
  /** What the driver does when it gets a device, and when it loses it. */
  onAttach: (device: ModelDevice) => Promise<void> = () => Promise.resolve();
  onDetach: (device: ModelDevice) => Promise<void> = (device) =>
    device.setStatus(0).then(() => {});
  /** How often a device was created. */
  created = 0;
  driver: string | null = "virtio_vdpa";

  open(name: string): VduseDevice | null {
    const device = this.devices.get(name);
    if (device?.isOpen) {
      throw new Vhost2Error("IN_USE", `Cannot open VDUSE device ${name}`);
    }
    return device?.open() ?? null;
  }

  create(name: string, description: VduseDescription): void {
    this.created++;
    const device = new ModelDevice(description);
    this.devices.set(name, device);
    this.onCreate(device);
  }

  destroy(name: string): boolean {
    const device = this.devices.get(name);
    if (device?.isOpen || device?.isAttached) return false;
    device?.destroy();
    this.devices.delete(name);
    return true;
  }

  async attach(name: string): Promise<void> {
    const device = this.devices.get(name)!;
    device.isAttached = true;
    await this.onAttach(device);
  }

  async detach(name: string): Promise<void> {
    const device = this.devices.get(name)!;
    await this.onDetach(device);
    device.isAttached = false;
  }

  isAttached(name: string): boolean {
    return this.devices.get(name)?.isAttached ?? false;
  }

  driverOf(name: string): string | null {
    return this.isAttached(name) ? this.driver : null;
  }
}
