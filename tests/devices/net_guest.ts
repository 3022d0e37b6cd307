/**
 * A network device being served, and cards of guests on it, for tests.
 *
 * @module
 */

import {
  type DeviceOptions,
  type Net,
  netDevice,
  type NetOptions,
  registerTarget,
  type Target,
} from "../../mod.ts";
import { NetClient, type NetClientOptions } from "../../frontend/mod.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { Events } from "../support/wait.ts";

/** A frame of `length` bytes that differ from place to place. */
export function frameOf(
  length: number,
  { to = 2, from = 4, seed = 0 } = {},
): Uint8Array<ArrayBuffer> {
  const frame = Uint8Array.from(
    { length },
    (_, i) => (i * 7 + seed + (i >> 8)) & 0xff,
  );
  frame.set([2, 0, 0, 0, 0, to], 0);
  frame.set([2, 0, 0, 0, 0, from], 6);
  return frame;
}

/** As the echo sends it back. */
export function swapped(frame: Uint8Array): Uint8Array<ArrayBuffer> {
  const back = frame.slice();
  back.set(frame.subarray(6, 12), 0);
  back.set(frame.subarray(0, 6), 6);
  return back;
}

/** How a device is served; on the event loop unless given. */
export type NetServing = Pick<DeviceOptions, "workers" | "pollMicroseconds">;

/** A device, its target, and how cards get there. */
export class ServedNet {
  readonly nic: Net;
  readonly target: Target;
  readonly path: string;
  /** What went wrong with the back-end. */
  readonly errors: Events<string>;
  readonly #folder: TemporaryFolder;
  readonly #cards: NetClient[] = [];

  private constructor(
    nic: Net,
    target: Target,
    errors: Events<string>,
    folder: TemporaryFolder,
    path: string,
  ) {
    this.nic = nic;
    this.target = target;
    this.errors = errors;
    this.#folder = folder;
    this.path = path;
  }

  static async start(
    options: NetOptions,
    serving: NetServing = {},
  ): Promise<ServedNet> {
    const folder = new TemporaryFolder();
    const path = folder.file("net.sock");
    const errors = new Events<string>();
    const onError = (error: Error) => errors.push(error.message);
    const nic = netDevice({ onError, ...options });
    const target = await registerTarget({
      transport: "vhost-user",
      address: path,
      ...nic,
      ...serving,
      onError,
    });
    return new ServedNet(nic, target, errors, folder, path);
  }

  /** A card on the device, closed with it. */
  async card(options: NetClientOptions = {}): Promise<NetClient> {
    const card = await NetClient.open({ path: this.path, ...options });
    this.#cards.push(card);
    return card;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const card of this.#cards) await card.close();
    await this.target.unregister();
    await this.nic.close();
    this.#folder.remove();
  }
}
