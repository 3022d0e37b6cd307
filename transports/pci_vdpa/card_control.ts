/**
 * The control queue of a network card, by which the card is told how many of
 * its queue pairs are in use (VIRTIO 1.3 section 5.1.6.5.6): those that the
 * guest has started. The guest's own command ends at its monitor, since
 * vhost-user knows queues for data only.
 *
 * @module
 */

import { Vhost2Error } from "../../ffi/errors.ts";
import type { PciDevice } from "../../pci/pci_device.ts";
import {
  ControlAnswer,
  ControlClass,
  ControlCommand,
} from "../../protocol/net.ts";
import { OwnRing } from "./own_ring.ts";

/** Descriptors: a command has three, and there is one at a time. */
const mostDescriptors = 4;
/** Bytes for a command and its answer, wherever they begin. */
const commandRoom = 256;
/** A command that is not answered in this time never will be. */
const answerLimitMs = 1_000;
const betweenLooksMs = 1;
/** No answer: the card has not written it. */
const noAnswer = 255;

export interface CardControlOptions {
  readonly index: number;
  /** Descriptors that the card takes at most. */
  readonly largestSize: number;
  /** Negotiated with the card. */
  readonly features: bigint;
  readonly notify: () => void;
}

export class CardControl {
  /** The queue, which the device is given before it works. */
  readonly ring: OwnRing;
  readonly #pci: PciDevice;
  /** After a reset the card uses its first pair. */
  #pairs = 1;
  /** It has let a command lie: its ring is of no more use. */
  #isStuck = false;

  constructor(pci: PciDevice, options: CardControlOptions) {
    this.#pci = pci;
    this.ring = new OwnRing(pci, {
      ...options,
      most: Math.min(mostDescriptors, options.largestSize),
      roomFor: commandRoom,
    });
  }

  /**
   * The card works: it is told, unless it knows, that `count` pairs are in use.
   * The answer is its failure to do so; an earlier one is not told again.
   */
  async usePairs(count: number): Promise<Vhost2Error | null> {
    if (count === this.#pairs || this.#isStuck) return null;
    const { driver } = this.ring;
    const pairs = Uint8Array.of(count & 0xff, count >> 8);
    let answer: number | null = null;
    let failure: unknown;
    driver.submit({
      readable: [
        Uint8Array.of(ControlClass.MQ, ControlCommand.MQ_VQ_PAIRS_SET),
        pairs,
      ],
      writable: [1],
      initial: noAnswer,
    }).then(({ data }) => answer = data[0][0], (error) => failure = error);
    const end = performance.now() + answerLimitMs;
    while (answer === null && failure === undefined) {
      if (performance.now() > end) {
        this.#isStuck = true;
        return this.#failed(
          "TIMEOUT",
          count,
          `it has not answered in ${answerLimitMs} ms`,
        );
      }
      await new Promise((resolve) => setTimeout(resolve, betweenLooksMs));
      driver.poll();
    }
    if (failure !== undefined) {
      this.#isStuck = true;
      return this.#failed("RING", count, (failure as Error).message, failure);
    }
    if (answer !== ControlAnswer.OK) {
      return this.#failed("PROTOCOL", count, `it answers ${answer}`);
    }
    this.#pairs = count;
    return null;
  }

  #failed(
    code: "TIMEOUT" | "RING" | "PROTOCOL",
    count: number,
    reason: string,
    cause?: unknown,
  ): Vhost2Error {
    return new Vhost2Error(
      code,
      `Cannot use ${count} queue pairs of PCI device ${this.#pci.name}: ${reason}`,
      { cause },
    );
  }

  /** The card has let go of the queue. */
  close(): void {
    this.ring.close();
  }
}
