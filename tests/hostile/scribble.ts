/**
 * A driver that writes its rings as it should, and garbage over them.
 *
 * @module
 */

import {
  DescriptorFlag,
  PackedDriver,
  type QueueDriver,
  SplitDriver,
} from "../../frontend/mod.ts";
import type { Random } from "./random.ts";

const eventIdx = 1n << 29n;
const indirect = 1n << 28n;
/** Where indirect tables are written that no request of the driver has. */
const tableBytes = 16 * 40;

/** One queue's driver, and all the memory of its guest. */
export class Scribbler {
  readonly driver: QueueDriver;
  readonly #random: Random;
  readonly #bytes: Uint8Array;

  constructor(driver: QueueDriver, random: Random) {
    this.driver = driver;
    this.#random = random;
    this.#bytes = driver.ram.regions[0].bytes;
  }

  /** Requests that may or may not come back. */
  submit(): void {
    const { driver } = this;
    const random = this.#random;
    const parts = 1 + random.below(Math.min(4, driver.queueSize));
    const readable = Array.from(
      { length: random.below(parts + 1) },
      () => random.bytes(1 + random.below(40)),
    );
    const writable = Array.from(
      { length: parts - readable.length },
      () => 1 + random.below(40),
    );
    driver.submit({
      readable,
      writable,
      indirect: (driver.features & indirect) !== 0n && random.once(2),
      kick: !random.once(3),
    }).catch(() => {});
  }

  /** Garbage somewhere: where it hurts, or anywhere. */
  scribble(): void {
    const random = this.#random;
    switch (random.below(6)) {
      case 0:
        this.#descriptor();
        break;
      case 1:
        this.#indices();
        break;
      case 2:
        this.#events();
        break;
      case 3:
        this.#table();
        break;
      case 4:
        this.#area();
        break;
      default:
        // The buffers too, and what an indirect table was when it was sent.
        this.#garbage(0, this.#bytes.length);
    }
  }

  #garbage(start: number, length: number): void {
    const random = this.#random;
    const count = Math.min(length, 1 + random.below(16));
    const at = start + random.below(length - count + 1);
    this.#bytes.set(random.bytes(count), at);
  }

  /** One of the three areas. */
  #area(): void {
    const { addresses } = this.driver.ring;
    const { queueSize } = this.driver;
    const isPacked = this.driver instanceof PackedDriver;
    const [address, size] = this.#random.pick([
      [addresses.descriptor, 16 * queueSize],
      [addresses.available, isPacked ? 4 : 6 + 2 * queueSize],
      [addresses.used, isPacked ? 4 : 6 + 8 * queueSize],
    ]);
    this.#garbage(Number(address), size);
  }

  #address(): bigint {
    const random = this.#random;
    const { addresses } = this.driver.ring;
    return random.pick([
      random.long(),
      BigInt(random.below(this.#bytes.length)),
      BigInt(this.#bytes.length - random.below(64)),
      // Its own ring: the device reads, or writes, what it works on.
      addresses.descriptor,
      addresses.available,
      addresses.used,
    ]);
  }

  #descriptor(): void {
    const random = this.#random;
    const { driver } = this;
    const slot = random.below(driver.queueSize);
    const address = this.#address();
    const length = random.once(3) ? random.word() : random.below(100);
    const flags = random.once(4) ? random.below(0x10000) : random.below(8);
    const next = random.once(4)
      ? random.word()
      : random.below(driver.queueSize);
    if (driver instanceof SplitDriver) {
      driver.descriptor(slot, { address, length, flags, next: next & 0xffff });
    } else if (driver instanceof PackedDriver) {
      const lap = random.pick([0, 0x80, 0x8000, 0x8080]);
      driver.ring.setDescriptor(slot, {
        address,
        length,
        id: next & 0xffff,
        flags: flags | lap,
      });
    }
  }

  /** What is available, or used, and in which lap. */
  #indices(): void {
    const random = this.#random;
    const { driver } = this;
    if (driver instanceof SplitDriver) {
      const { ring } = driver;
      const near = ring.availableIndex + random.below(2 * driver.queueSize);
      ring.setAvailableEntry(random.below(driver.queueSize), random.word());
      if (random.once(2)) {
        ring.setAvailableIndex(
          (random.once(3) ? random.word() : near) & 0xffff,
        );
      } else this.#garbage(Number(ring.addresses.used), 4);
    } else if (driver instanceof PackedDriver) {
      const slot = random.below(driver.queueSize);
      driver.ring.setFlags(
        slot,
        driver.ring.flags(slot) ^ random.pick([
          DescriptorFlag.NEXT,
          DescriptorFlag.WRITE,
          DescriptorFlag.INDIRECT,
          0x80,
          0x8000,
          0x8080,
        ]),
      );
    }
  }

  /** When to be told, by both sides. */
  #events(): void {
    const random = this.#random;
    const { driver } = this;
    if (driver instanceof SplitDriver) {
      driver.ring.setAvailableFlags(random.below(0x10000));
      if (driver.features & eventIdx) {
        driver.ring.setUsedEvent(random.below(0x10000));
      }
      this.#garbage(Number(driver.ring.addresses.used), 2);
    } else if (driver instanceof PackedDriver) {
      const { ring } = driver;
      ring.setDriverEvent({
        position: random.below(0x10000),
        flags: random.below(0x10000),
      });
      this.#garbage(Number(ring.addresses.used), 4);
    }
  }

  /** An indirect table of garbage, which a descriptor leads to. */
  #table(): void {
    const random = this.#random;
    const { driver } = this;
    const at = random.below(this.#bytes.length - tableBytes);
    const view = new DataView(this.#bytes.buffer, this.#bytes.byteOffset);
    const count = 1 + random.below(40);
    for (let i = 0; i < count; i++) {
      const entry = at + 16 * i;
      view.setBigUint64(entry, this.#address(), true);
      view.setUint32(entry + 8, random.below(64), true);
      view.setUint16(entry + 12, random.below(4), true);
      view.setUint16(entry + 14, random.below(count + 1), true);
    }
    const slot = random.below(driver.queueSize);
    const descriptor = { address: BigInt(at), length: 16 * count };
    const flags = DescriptorFlag.INDIRECT;
    if (driver instanceof SplitDriver) {
      driver.descriptor(slot, { ...descriptor, flags, next: 0 });
      driver.ring.setAvailableEntry(random.below(driver.queueSize), slot);
    } else if (driver instanceof PackedDriver) {
      driver.ring.setDescriptor(slot, {
        ...descriptor,
        id: random.below(driver.queueSize),
        flags: flags | random.pick([0x80, 0x8000]),
      });
    }
  }
}
