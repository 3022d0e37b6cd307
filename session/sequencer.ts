/**
 * Calls the user's asynchronous ops: one at a time, failures told apart from
 * bugs of ours, failed stops tried again.
 *
 * @module
 */

import { AsyncLocalStorage } from "node:async_hooks";
import { Vhost2Error } from "../ffi/errors.ts";

/** Names of the asynchronous ops. */
export type OpName =
  | "deviceCreate"
  | "deviceInit"
  | "deviceFeaturesChanged"
  | "queueStart"
  | "queueStop"
  | "deviceDestroy"
  | "customMessage"
  | "getSharedObject";

interface OpScope {
  readonly owner: unknown;
  isRunning: boolean;
}

const scope = new AsyncLocalStorage<OpScope>();

/** Whether the caller runs inside an op, still awaited, of `owner`'s. */
export function isInsideOp(owner: unknown): boolean {
  const current = scope.getStore();
  return current !== undefined && current.isRunning && current.owner === owner;
}

const firstDelayMs = 10;
const maxDelayMs = 1000;
const maxAttempts = 10;

/** The sequencer of one device. */
export class Sequencer {
  readonly #owner: unknown;
  readonly #deviceName: string;
  #running: OpName | undefined;

  /**
   * @param owner whose ops these are, for `isInsideOp`
   * @param deviceName for messages
   */
  constructor(owner: unknown, deviceName: string) {
    this.#owner = owner;
    this.#deviceName = deviceName;
  }

  /** Calls an op and awaits it; a failure becomes an OP error. */
  async call<T>(name: OpName, op: () => T | Promise<T>): Promise<T> {
    if (this.#running !== undefined) {
      throw new Error(`op ${name} called during ${this.#running}`);
    }
    this.#running = name;
    const current: OpScope = { owner: this.#owner, isRunning: true };
    try {
      return await scope.run(current, async () => await op());
    } catch (cause) {
      const reason = cause instanceof Error ? cause.message : String(cause);
      throw new Vhost2Error(
        "OP",
        `Op ${name} of ${this.#deviceName} failed: ${reason}`,
        { cause },
      );
    } finally {
      current.isRunning = false;
      this.#running = undefined;
    }
  }

  /**
   * Calls an op that must succeed in the end: again after 10 ms, doubling to
   * 1 s, ten times in all. Each failure is reported. Returns whether it did.
   */
  async insist(
    name: OpName,
    op: () => void | Promise<void>,
    report: (error: Vhost2Error) => void,
  ): Promise<boolean> {
    let delayMs = firstDelayMs;
    for (let attempt = 1;; attempt++) {
      try {
        await this.call(name, op);
        return true;
      } catch (error) {
        report(error as Vhost2Error);
        if (attempt === maxAttempts) return false;
      }
      await new Promise((resolve) => setTimeout(resolve, delayMs));
      delayMs = Math.min(delayMs * 2, maxDelayMs);
    }
  }
}
