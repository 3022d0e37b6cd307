/**
 * When the device must call, by the model: the driver writes a wish, and at the
 * next look the number of calls says whether it was granted.
 *
 * @module
 */

import assert from "node:assert/strict";
import {
  AVAILABLE_FLAG_NO_INTERRUPT,
  EventFlag,
  PackedDriver,
  type QueueDriver,
  SplitDriver,
} from "../../frontend/mod.ts";
import { positionAfter, stepsBetween } from "../../driver/packed_layout.ts";
import type { Random } from "../hostile/random.ts";

/** What was asked for, and as of when. */
interface Wish {
  readonly what: string;
  /** Calls due for a step of so many from there, however many pushes made it. */
  readonly isDue: (steps: number) => boolean;
  readonly calls: number;
  readonly used: number;
}

/** A driver that does not use its calls, and counts them instead. */
export class CallModel {
  readonly #driver: QueueDriver;
  readonly #random: Random;
  readonly #usesEventIndex: boolean;
  /**
   * A start is followed by a call, and the first completion by another, asked
   * for or not: the driver may wait for one that an earlier back-end owed.
   */
  #unasked = 0;
  #wish: Wish;

  constructor(driver: QueueDriver, random: Random) {
    this.#driver = driver;
    this.#random = random;
    this.#usesEventIndex = (driver.features >> 29n & 1n) === 1n;
    this.#wish = this.#ask();
    this.restarted();
  }

  /** The queue was, or will be, started. */
  restarted(): void {
    // With one that a start just before this one may still owe.
    this.#unasked = 3;
  }

  /** Takes what is used, checks the calls, and asks for something else. */
  look(): void {
    this.#driver.poll();
    const { what, isDue, calls, used } = this.#wish;
    const now = this.#used();
    const steps = this.#driver instanceof PackedDriver
      ? stepsBetween(used, now, this.#driver.queueSize)
      : (now - used) & 0xffff;
    const count = this.#driver.calls - calls;
    const message = `${count} calls for ${steps} steps with ${what}`;
    if (steps > 0 && isDue(steps)) assert.ok(count > 0, message);
    else assert.ok((this.#unasked -= count) >= 0, message);
    this.#wish = this.#ask();
  }

  /** Where the device is, after a poll. */
  #used(): number {
    const driver = this.#driver;
    if (driver instanceof PackedDriver) return driver.usedPosition;
    assert.ok(driver instanceof SplitDriver);
    return driver.usedIndex;
  }

  #ask(): Wish {
    const driver = this.#driver;
    const used = this.#used();
    const { calls, queueSize } = driver;
    const distance = this.#random.below(queueSize);
    const after = { calls, used, isDue: (steps: number) => steps > distance };
    const always = { calls, used, isDue: () => true };
    const never = { calls, used, isDue: () => false };
    if (driver instanceof PackedDriver) {
      const position = positionAfter(used, distance, queueSize);
      const flags = this.#usesEventIndex
        ? this.#random.below(3)
        : this.#random.below(2);
      driver.ring.setDriverEvent({ position, flags });
      if (flags === EventFlag.DISABLE) return { ...never, what: "DISABLE" };
      if (flags === EventFlag.ENABLE) return { ...always, what: "ENABLE" };
      return { ...after, what: `an event at ${distance} of ${queueSize}` };
    }
    assert.ok(driver instanceof SplitDriver);
    if (this.#usesEventIndex) {
      driver.ring.setUsedEvent((used + distance) & 0xffff);
      // The flags mean nothing then.
      driver.ring.setAvailableFlags(this.#random.below(2));
      return { ...after, what: `an event at ${distance} of ${queueSize}` };
    }
    const isWanted = this.#random.once(2);
    driver.ring.setAvailableFlags(isWanted ? 0 : AVAILABLE_FLAG_NO_INTERRUPT);
    return isWanted
      ? { ...always, what: "no flag" }
      : { ...never, what: "NO_INTERRUPT" };
  }
}
