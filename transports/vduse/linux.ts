/**
 * The kernel's VDUSE, through the core.
 *
 * @module
 */

import { existsSync, readlinkSync } from "node:fs";
import { basename } from "node:path";
import { constants, layouts } from "../../ffi/abi.gen.ts";
import { core } from "../../ffi/core.ts";
import { check, Errno } from "../../ffi/errors.ts";
import { eventLoop } from "../../ffi/event_loop.ts";
import { attachmentError, createError, openError } from "./failure.ts";
import {
  BrokenVduseDevice,
  type VduseDescription,
  type VduseDevice,
  type VduseEntry,
  type VduseKernel,
  type VduseQueueInfo,
  type VduseRequest,
  type VduseResponse,
} from "./kernel.ts";

const encoder = new TextEncoder();
const view = (layout: { readonly byteSize: number }) =>
  new DataView(new ArrayBuffer(layout.byteSize));

const requestOut = view(layouts.VduseRequest);
const responseIn = view(layouts.VduseResponse);
const infoOut = view(layouts.VduseQueueInfo);
const entryOut = view(layouts.VduseEntry);
const configIn = view(layouts.VduseConfig);
const attachmentOut = view(layouts.VduseAttachment);
const wordOut = new BigUint64Array(1);
/** Parts of a ring are aligned to pages: each is a mapping of its own. */
const ringAlignment = 4096;

class LinuxVduseDevice implements VduseDevice {
  readonly #name: string;
  readonly #fd: number;

  constructor(name: string, fd: number) {
    this.#name = name;
    this.#fd = fd;
  }

  #check(result: number, action: string): number {
    if (result === -Errno.EPERM) {
      throw new BrokenVduseDevice("the kernel says so");
    }
    return check(result, `Cannot ${action} of VDUSE device ${this.#name}`);
  }

  watch(handler: () => void): () => void {
    const watch = eventLoop.watch(this.#fd, handler);
    return () => watch.close();
  }

  receive(): VduseRequest | null {
    const result = core.vduseReceive(this.#fd, requestOut);
    if (result === -Errno.EAGAIN) {
      // A broken device has no messages either: any other request tells.
      this.features();
      return null;
    }
    this.#check(result, "read a message");
    const field = layouts.VduseRequest;
    const word = (at: number) => requestOut.getUint32(at, true);
    const id = word(field.id);
    switch (word(field.kind)) {
      case constants.vduseGetQueueState:
        return { id, kind: "getQueueState", queue: word(field.queue) };
      case constants.vduseSetStatus:
        return { id, kind: "setStatus", status: word(field.status) };
      case constants.vduseUpdateIotlb:
        return {
          id,
          kind: "updateIotlb",
          start: requestOut.getBigUint64(field.start, true),
          last: requestOut.getBigUint64(field.last, true),
        };
      default:
        return { id, kind: "unknown", number: word(field.kind) };
    }
  }

  respond({ id, isFailed = false, state }: VduseResponse): boolean {
    const field = layouts.VduseResponse;
    const set = (at: number, value: number) =>
      responseIn.setUint32(at, value, true);
    set(field.id, id);
    set(field.isFailed, isFailed ? 1 : 0);
    set(field.hasState, state === undefined ? 0 : 1);
    set(field.queue, state?.queue ?? 0);
    set(field.base, state?.base ?? 0);
    set(field.isPacked, state?.isPacked ? 1 : 0);
    const result = core.vduseRespond(this.#fd, responseIn);
    if (result === -Errno.ENOENT) return false;
    this.#check(result, "answer a message");
    return true;
  }

  features(): bigint {
    this.#check(core.vduseFeatures(this.#fd, wordOut), "read the features");
    return wordOut[0];
  }

  queueInfo(index: number, isPacked: boolean): VduseQueueInfo | null {
    const result = core.vduseQueueInfo(
      this.#fd,
      index,
      isPacked ? 1 : 0,
      infoOut,
    );
    if (result === -Errno.EINVAL) return null;
    this.#check(result, `read queue ${index}`);
    const field = layouts.VduseQueueInfo;
    return {
      descriptor: infoOut.getBigUint64(field.descriptor, true),
      driver: infoOut.getBigUint64(field.driver, true),
      device: infoOut.getBigUint64(field.device, true),
      size: infoOut.getUint32(field.size, true),
      base: infoOut.getUint32(field.base, true),
      isReady: infoOut.getUint32(field.isReady, true) !== 0,
    };
  }

  setUpQueue(index: number, size: number): void {
    const result = core.vduseQueueSetUp(this.#fd, index, size);
    this.#check(result, `set up queue ${index}`);
  }

  setKick(index: number, fd: number): void {
    const result = core.vduseQueueKick(this.#fd, index, fd);
    this.#check(result, `set the kick of queue ${index}`);
  }

  inject(index: number): boolean {
    const result = core.vduseQueueInject(this.#fd, index);
    if (result === 0) return true;
    if (result === -Errno.EINVAL) return false;
    this.#check(result, `interrupt the driver for queue ${index}`);
    return true;
  }

  injectConfig(): boolean {
    const result = core.vduseConfigInject(this.#fd);
    if (result === -Errno.EINVAL) return false;
    this.#check(result, "interrupt the driver for the configuration");
    return true;
  }

  setConfig(config: Uint8Array): void {
    const result = core.vduseConfigSet(this.#fd, config, config.length);
    this.#check(result, "change the configuration");
  }

  entry(start: bigint, last: bigint): VduseEntry | null {
    const result = core.vduseEntry(this.#fd, start, last, entryOut);
    if (result === -Errno.EINVAL) return null;
    const fd = this.#check(result, "read the IOTLB");
    const field = layouts.VduseEntry;
    return {
      start: entryOut.getBigUint64(field.start, true),
      last: entryOut.getBigUint64(field.last, true),
      offset: entryOut.getBigUint64(field.offset, true),
      access: entryOut.getUint32(field.access, true),
      isDomain: entryOut.getUint32(field.isDomain, true) !== 0,
      fd,
    };
  }

  map(fd: number, offset: bigint, size: number): bigint {
    const result = core.vduseMap(fd, Number(offset), size, wordOut);
    this.#check(result, `map ${size} bytes`);
    return wordOut[0];
  }

  close(): void {
    core.descriptorClose(this.#fd);
  }
}

async function setAttached(name: string, isAttached: boolean): Promise<void> {
  const bytes = encoder.encode(name);
  const handle = core.vduseAttachmentStart(
    bytes,
    bytes.length,
    isAttached ? 1 : 0,
  );
  const { attachmentThread } = constants;
  if (handle < 0) {
    throw attachmentError(name, isAttached, attachmentThread, -handle);
  }
  await new Promise<void>((resolve) => {
    const watch = eventLoop.watch(core.vduseAttachmentEvent(handle), () => {
      watch.close();
      resolve();
    });
  });
  check(
    core.vduseAttachmentResult(handle, attachmentOut),
    "Cannot read what became of an attachment",
  );
  const field = layouts.VduseAttachment;
  const step = attachmentOut.getUint32(field.step, true);
  const errno = attachmentOut.getUint32(field.errno, true);
  if (step !== 0) throw attachmentError(name, isAttached, step, errno);
}

/** The kernel that this process runs on. */
export const linuxKernel: VduseKernel = {
  open(name) {
    const bytes = encoder.encode(name);
    const result = core.vduseOpen(bytes, bytes.length);
    if (result === -Errno.ENOENT) return null;
    if (result < 0) throw openError(name, -result);
    return new LinuxVduseDevice(name, result);
  },
  create(name: string, description: VduseDescription) {
    const bytes = encoder.encode(name);
    const field = layouts.VduseConfig;
    configIn.setBigUint64(field.features, description.features, true);
    configIn.setUint32(field.deviceId, description.deviceId, true);
    configIn.setUint32(field.queueCount, description.queueCount, true);
    configIn.setUint32(field.alignment, ringAlignment, true);
    const { config } = description;
    const result = core.vduseCreate(
      bytes,
      bytes.length,
      configIn,
      config,
      config.length,
    );
    if (result < 0) throw createError(name, description, -result);
  },
  destroy(name) {
    const bytes = encoder.encode(name);
    const result = core.vduseDestroy(bytes, bytes.length);
    if (result === -Errno.EBUSY) return false;
    // There is none: that is what was wanted.
    if (result === -Errno.EINVAL || result === -Errno.ENOENT) return true;
    check(result, `Cannot destroy VDUSE device ${name}`);
    return true;
  },
  attach: (name) => setAttached(name, true),
  detach: (name) => setAttached(name, false),
  isAttached: (name) => existsSync(`/sys/bus/vdpa/devices/${name}`),
  driverOf(name) {
    try {
      return basename(readlinkSync(`/sys/bus/vdpa/devices/${name}/driver`));
    } catch {
      return null;
    }
  },
};
