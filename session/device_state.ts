/**
 * The transfer of the device's own state to or from the front-end, for
 * migration (DEVICE_STATE). It runs beside the messages: the front-end reads
 * or writes the other end meanwhile, and asks at last how it went.
 *
 * @module
 */

import { core } from "../ffi/core.ts";
import { Vhost2Error } from "../ffi/errors.ts";
import type { StateTransfer } from "./target_ops.ts";

/** What a transfer needs to know of its session. */
export interface TransferringSession {
  readonly name: string;
  readonly signal: AbortSignal;
  report(error: Vhost2Error): void;
}

/** The transfers of one device, one at a time. */
export class DeviceState {
  readonly #session: TransferringSession;
  /** Whether the last one was a success; never rejects. */
  #result: Promise<boolean> = Promise.resolve(false);
  #isTransferring = false;

  constructor(session: TransferringSession) {
    this.#session = session;
  }

  /** A transfer has begun and not ended: no queue may start. */
  get isTransferring(): boolean {
    return this.#isTransferring;
  }

  /** Whether the last transfer was a success, when it has ended. */
  get result(): Promise<boolean> {
    return this.#result;
  }

  /** Begins a transfer; its descriptor is closed when `op` has ended. */
  begin(
    transfer: StateTransfer,
    op: (transfer: StateTransfer) => void | Promise<void>,
  ): void {
    this.#isTransferring = true;
    this.#result = this.#run(transfer, op);
  }

  async #run(
    transfer: StateTransfer,
    op: (transfer: StateTransfer) => void | Promise<void>,
  ): Promise<boolean> {
    const { name, signal } = this.#session;
    // The reply to the front-end is not to wait for what the op does at first.
    await undefined;
    try {
      await op(transfer);
      return true;
    } catch (cause) {
      // A peer that has gone is no failure of the op's.
      if (signal.aborted) return false;
      const reason = cause instanceof Error ? cause.message : String(cause);
      this.#session.report(
        new Vhost2Error(
          "OP",
          `Op transferState of ${name} failed: ${reason}`,
          { cause },
        ),
      );
      return false;
    } finally {
      // The end of the stream, for a front-end that reads.
      core.descriptorClose(transfer.fd);
      this.#isTransferring = false;
    }
  }
}
