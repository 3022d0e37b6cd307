/** A disk whose requests end when a test says so, and a target that serves it. */

import assert from "node:assert/strict";
import {
  BlkClient,
  type RingFormatOptions,
  type VhostUserDeviceOptions,
} from "../../frontend/mod.ts";
import {
  type Blk,
  blkDevice,
  type DiskObject,
  registerTarget,
  type Target,
} from "../../mod.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { Signal, within } from "../support/wait.ts";

/** IN_ORDER as a mask: offered to a client whose options ask for it. */
export const inOrder = 1n << 35n;

/** One call of the object's. */
export interface HeldCall {
  /** `write 512` and the like: what, and at which offset. */
  readonly name: string;
  release(): void;
}

/** 1 MiB of memory; each read and write is held. */
export class HeldDisk implements DiskObject {
  readonly size = 1 << 20;
  readonly bytes = new Uint8Array(this.size);
  /** Calls that nobody has released, oldest first. */
  readonly calls: HeldCall[] = [];
  /** All calls that ever came. */
  readonly names: string[] = [];
  readonly #changed = new Signal();
  /** Whether a call ends when its queue stops. */
  readonly #cancels: boolean;
  /** Nothing is held any more. */
  isOpen = false;

  constructor(cancels = true) {
    this.#cancels = cancels;
  }

  async read(
    offset: number,
    into: Uint8Array,
    signal: AbortSignal,
  ): Promise<void> {
    await this.#hold(`read ${offset}`, signal);
    into.set(this.bytes.subarray(offset, offset + into.length));
  }

  async write(
    offset: number,
    data: Uint8Array,
    signal: AbortSignal,
  ): Promise<void> {
    const copy = data.slice();
    await this.#hold(`write ${offset}`, signal);
    this.bytes.set(copy, offset);
  }

  #hold(name: string, signal: AbortSignal): Promise<void> {
    this.names.push(name);
    if (this.isOpen) return Promise.resolve();
    return new Promise((resolve, reject) => {
      const end = (settle: () => void) => {
        this.calls.splice(this.calls.indexOf(call), 1);
        settle();
        this.#changed.notify();
      };
      const call: HeldCall = { name, release: () => end(resolve) };
      this.calls.push(call);
      if (this.#cancels) {
        signal.addEventListener("abort", () => {
          if (this.calls.includes(call)) end(() => reject(signal.reason));
        });
      }
      this.#changed.notify();
    });
  }

  /** Fulfilled when `count` calls are being held. */
  async held(count: number): Promise<void> {
    await this.#changed.until(
      () => this.calls.length === count,
      `${count} calls are held`,
    );
  }

  /** The one call of this name ends. */
  release(name: string): void {
    const call = this.calls.find((call) => call.name === name);
    assert.ok(call, `${name} is held: ${this.calls.map(({ name }) => name)}`);
    call.release();
  }

  /** From here on nothing is held. */
  open(): void {
    this.isOpen = true;
    for (const call of [...this.calls]) call.release();
  }
}

/** What a test has. */
export interface Held {
  readonly disk: HeldDisk;
  readonly target: Target;
  readonly client: BlkClient;
  readonly path: string;
  /** What was reported; what a test expects it takes out. */
  readonly errors: string[];
}

/** Serves a held disk to a client that recovers; nothing is left over. */
export async function withHeldDisk(
  options: Partial<VhostUserDeviceOptions & RingFormatOptions>,
  body: (held: Held) => Promise<void>,
  disk: HeldDisk = new HeldDisk(),
): Promise<void> {
  const folder = new TemporaryFolder();
  try {
    await withoutDescriptorLeak(async () => {
      const path = folder.file("socket");
      const errors: string[] = [];
      const onError = (error: Error) => void errors.push(error.message);
      const blk: Blk = blkDevice({ backing: disk, onError, numQueues: 2 });
      const target = await registerTarget({
        transport: "vhost-user",
        address: path,
        onError,
        ...blk,
        features: blk.features | ((options.features ?? 0n) & inOrder),
      });
      try {
        const client = await BlkClient.open({
          path,
          queueSize: 16,
          ramSize: 1 << 20,
          recovers: true,
          ...options,
        });
        try {
          await body({ disk, target, client, path, errors });
        } finally {
          disk.open();
          await client.close();
        }
      } finally {
        await within(target.unregister(), "unregister");
        await blk.close();
      }
      assert.deepEqual(errors, []);
    });
  } finally {
    folder.remove();
  }
}

/** Both formats, for a loop over them. */
export const formats = [
  { packed: false, format: "split" },
  { packed: true, format: "packed" },
] as const;

/** A sector's worth of one byte. */
export function sector(fill: number): Uint8Array<ArrayBuffer> {
  return new Uint8Array(512).fill(fill);
}
