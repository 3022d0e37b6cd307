/**
 * A disk whose loop is native (native/disk.zig), and loads on it: what a
 * back-end in TypeScript over the same core is measured against.
 *
 * @module
 */

import process from "node:process";
import { GuestRam, SplitDriver, VirtioFeature } from "../frontend/mod.ts";
import { Child } from "./child.ts";
import { wantedFeatures } from "./generator.ts";
import { dataBytes, type Load, type LoadFigures, Loads } from "./load.ts";
import type { Disk } from "./peers.ts";
import { backendCpu, native, pinned } from "./programs.ts";

const queueSize = 256;
const ringBytes = 1 << 20;

/** There is no protocol between the two: what the rings need they are told. */
export class NativeDisk {
  readonly #ram: GuestRam;
  readonly #driver: SplitDriver;
  readonly #child: Child;
  readonly #loads: Loads;

  private constructor(
    ram: GuestRam,
    driver: SplitDriver,
    child: Child,
    loads: Loads,
  ) {
    this.#ram = ram;
    this.#driver = driver;
    this.#child = child;
    this.#loads = loads;
  }

  /**
   * Starts it. Its loop polls all the time, and so must loads; between them it
   * is suspended, or it would take half of the processor from whoever is
   * measured there.
   */
  static async start(
    disk: Exclude<Disk, { readonly kind: "file" }>,
  ): Promise<NativeDisk> {
    const program = await native("disk");
    const ram = new GuestRam([{ size: ringBytes + dataBytes }]);
    // The bits of vhost-user mean nothing here.
    const features = wantedFeatures({}) &
      ~(1n << BigInt(VirtioFeature.PROTOCOL_FEATURES));
    const driver = new SplitDriver(ram, {
      queueSize,
      features,
      usesCalls: false,
    });
    const [region] = ram.regions;
    const { descriptor, available, used } = driver.ring.addresses;
    const child = new Child(pinned(
      String(backendCpu),
      [
        ...program,
        disk.kind,
        ...[disk.size, `/proc/${process.pid}/fd/${region.fd}`, region.size],
        ...[descriptor, available, used, queueSize, features],
      ].map(String),
    ));
    const made = new NativeDisk(
      ram,
      driver,
      child,
      new Loads({
        region,
        queues: [driver],
        sectors: BigInt(disk.size / 512),
      }),
    );
    try {
      await child.line();
      child.suspend();
    } catch (error) {
      await made.close();
      throw error;
    }
    return made;
  }

  get pid(): number {
    return this.#child.pid;
  }

  /** Blocks until the load is done. Throws when a request fails. */
  run(load: Load): LoadFigures {
    this.#child.resume();
    try {
      const figures = this.#loads.run(load);
      if (figures.errors > 0) throw new Error(`${figures.errors} I/O errors`);
      return figures;
    } finally {
      this.#child.suspend();
    }
  }

  async close(): Promise<void> {
    await this.#child.stop();
    this.#driver.close();
    this.#ram.close();
  }
}
