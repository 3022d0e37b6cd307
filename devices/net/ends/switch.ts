/**
 * A switch that learns, among the guests of one process.
 *
 * @module
 */

import { Vhost2Error } from "../../../ffi/errors.ts";
import type { Frames } from "../frames.ts";
import { type EndPort, type NetEnd, type NetLink, Offload } from "./end.ts";
import { MacTable } from "./mac_table.ts";

/** Addresses known at once, and how long without being seen. */
const tableSize = 4096;
const ageMs = 300_000;
const maxPorts = 1024;
/** In place of a port: all but the one that a frame came from. */
const everybody = -1;

/**
 * A switch: each front-end of each device that has it as its end is a port.
 * Frames go where their destination was seen last, or to all other ports; on
 * each port by the queue pair that they came from.
 *
 * @example Two cards on one switch
 * ```ts
 * import { netDevice, NetSwitch } from "vhost2";
 * const lan = new NetSwitch("lan");
 * const first = netDevice({ end: lan });
 * const second = netDevice({ end: lan });
 * if (first.mac === second.mac) throw new Error("one address twice");
 * ```
 */
export class NetSwitch implements NetEnd {
  readonly name: string;
  readonly offloads: number = Offload.checksum;
  readonly #ports: (NetLink | undefined)[] = [];
  readonly #table = new MacTable(tableSize, ageMs);

  /** @param name for people */
  constructor(name = "switch") {
    this.name = name;
  }

  /** Ports in use. */
  get portCount(): number {
    return this.#ports.filter((port) => port !== undefined).length;
  }

  open(link: NetLink): EndPort {
    const free = this.#ports.indexOf(undefined);
    const number = free < 0 ? this.#ports.length : free;
    if (number === maxPorts) {
      throw new Vhost2Error(
        "IN_USE",
        `Cannot connect ${link.name}: ${maxPorts} ports of ${this.name} are in use`,
      );
    }
    this.#ports[number] = link;
    return {
      receive: (frames, pair) => this.#forward(frames, pair, number),
      close: () => {
        this.#ports[number] = undefined;
        this.#table.forget(number);
      },
    };
  }

  close(): void {}

  #forward(frames: Frames, pair: number, from: number): void {
    const { count } = frames;
    const now = performance.now();
    // Frames to the same port one after the other go there together.
    let first = 0;
    let target = this.#route(frames, 0, from, now);
    for (let i = 1; i < count; i++) {
      const next = this.#route(frames, i, from, now);
      if (next === target) continue;
      this.#deliver(frames, first, i - first, pair, from, target);
      first = i;
      target = next;
    }
    this.#deliver(frames, first, count - first, pair, from, target);
  }

  /** Learns where frame `i` came from; answers where it is to go. */
  #route(frames: Frames, i: number, from: number, now: number): number {
    const { halves } = frames;
    const at = frames.offset(i) >> 1;
    // The first byte's lowest bit says that it is a group's address.
    if ((halves[at + 3] & 1) === 0) {
      const low = (halves[at + 4] | halves[at + 5] << 16) >>> 0;
      this.#table.learn(halves[at + 3], low, from, now);
    }
    if ((halves[at] & 1) !== 0) return everybody;
    const low = (halves[at + 1] | halves[at + 2] << 16) >>> 0;
    return this.#table.find(halves[at], low, now);
  }

  #deliver(
    frames: Frames,
    first: number,
    count: number,
    pair: number,
    from: number,
    target: number,
  ): void {
    if (target !== everybody) {
      // Whoever it is for has got it where it came from.
      if (target === from) return;
      return this.#send(frames, first, count, pair, this.#ports[target]);
    }
    for (let port = 0; port < this.#ports.length; port++) {
      if (port === from) continue;
      this.#send(frames, first, count, pair, this.#ports[port]);
    }
  }

  #send(
    frames: Frames,
    first: number,
    count: number,
    pair: number,
    link: NetLink | undefined,
  ): void {
    if (link === undefined) return;
    const sent = link.send(frames, pair % link.pairCount, first, count);
    if (sent < count) link.drop(pair, count - sent);
  }
}
