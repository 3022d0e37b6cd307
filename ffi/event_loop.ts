/**
 * Wakes the isolate's event loop for descriptors of the core: kicks, sockets,
 * finished file I/O, faults.
 *
 * A native thread waits on the poll set and sends at most one byte down a
 * socket pair until the isolate has drained the set. A `net.Socket` on the
 * other end is what both runtimes can wait for.
 *
 * @module
 */

import { Socket } from "node:net";
import { constants, layouts } from "./abi.gen.ts";
import { blocking } from "./blocking.ts";
import { core } from "./core.ts";
import { check, Vhost2Error } from "./errors.ts";
import { Held, inodeTag, noteHeld, noteReleased } from "./held.ts";

/** Called with the ready events, a mask of `EventFlag`. */
export type ReadyHandler = (events: number) => void;

/** How a watched descriptor is ready. */
export const EventFlag = {
  readable: constants.eventReadable,
  writable: constants.eventWritable,
  error: constants.eventError,
  hangup: constants.eventHangup,
} as const;

/** A descriptor being watched. */
export interface Watch {
  /** Also, or no longer, reports room to write. */
  setWritable(isWanted: boolean): void;
  /** Ends the watch; the descriptor stays open. */
  close(): void;
}

/** Events per call of the core, and calls per turn of the event loop. */
const capacity = 64;
const maxRounds = 8;
const eventWords = layouts.PollEvent.byteSize / 4;

class EventLoop {
  #poll = 0;
  #socket: Socket | undefined;
  #socketFd = -1;
  readonly #events = new Uint32Array(capacity * eventWords);
  /** By token. */
  readonly #handlers: (ReadyHandler | undefined)[] = [];
  readonly #freeTokens: number[] = [];
  readonly #faultHandlers = new Set<() => void>();
  #references = 0;
  #watchCount = 0;
  #isQuiet = false;
  #isDraining = false;

  /** The core's handle of this isolate's poll set. */
  get handle(): number {
    if (this.#poll === 0) this.#start();
    return this.#poll;
  }

  #start(): void {
    const fdOut = new Int32Array(1);
    this.#poll = check(
      core.pollCreate(fdOut),
      "Cannot make the poll set of the event loop",
    );
    noteHeld(Held.poll, this.#poll);
    noteHeld(Held.runtimeDescriptor, fdOut[0], inodeTag(fdOut[0]));
    this.#socketFd = fdOut[0];
    const options = {
      fd: fdOut[0],
      readable: true,
      writable: true,
      onread: {
        buffer: new Uint8Array(64),
        callback: () => {
          this.drain();
          return true;
        },
      },
    };
    // `onread` is not in the types of the constructor on every runtime.
    this.#socket = new Socket(
      options as ConstructorParameters<typeof Socket>[0],
    );
    this.#socket.on("error", () => {});
    if (this.#references === 0) this.#socket.unref();
  }

  /** Keeps the process alive until `unref` was called as often. */
  ref(): void {
    if (this.#references++ > 0) return;
    if (this.#poll === 0) this.#start();
    this.#socket?.ref();
  }

  /** Takes one `ref` back. */
  unref(): void {
    if (--this.#references > 0) return;
    this.#socket?.unref();
    // Perhaps in the middle of a drain: the thread and the descriptors go
    // when it has ended, unless somebody came back in the meantime.
    queueMicrotask(() => this.#closeIfIdle());
  }

  #closeIfIdle(): void {
    if (this.#poll === 0 || this.#references > 0 || this.#watchCount > 0) {
      return;
    }
    noteReleased(Held.poll, this.#poll);
    core.pollClose(this.#poll);
    this.#poll = 0;
    this.#isQuiet = false;
    noteReleased(Held.runtimeDescriptor, this.#socketFd);
    this.#socket?.destroy();
    this.#socket = undefined;
  }

  /**
   * Calls `handler` when `fd` becomes ready (edge-triggered: read until
   * EAGAIN). Throws EPERM for what cannot be waited for, such as a file.
   */
  watch(fd: number, handler: ReadyHandler): Watch {
    const token = this.#freeTokens.pop() ?? this.#handlers.length;
    const result = core.pollAdd(this.handle, fd, token, 0);
    if (result < 0) {
      if (token === this.#handlers.length) this.#handlers.push(undefined);
      this.#freeTokens.push(token);
      check(result, `Cannot wait for descriptor ${fd}`);
    }
    this.#handlers[token] = handler;
    this.#watchCount++;
    let isOpen = true;
    return {
      setWritable: (isWanted) => {
        if (isOpen) core.pollAdd(this.handle, fd, token, isWanted ? 1 : 0);
      },
      close: () => {
        if (!isOpen) return;
        isOpen = false;
        this.#watchCount--;
        core.pollRemove(this.#poll, fd);
        this.#handlers[token] = undefined;
        // Events of this token may wait in the batch being worked through.
        queueMicrotask(() => {
          this.#freeTokens.push(token);
          this.#closeIfIdle();
        });
      },
    };
  }

  /** Calls `handler` when some guest memory has faulted; returns the undo. */
  onFault(handler: () => void): () => void {
    this.#faultHandlers.add(handler);
    return () => this.#faultHandlers.delete(handler);
  }

  /**
   * While quiet, the isolate looks by itself (`wait`) and is not woken; what
   * came in the meantime is told when the quiet ends.
   */
  setQuiet(isQuiet: boolean): void {
    if (this.#isQuiet === isQuiet || this.#poll === 0) return;
    this.#isQuiet = isQuiet;
    core.pollQuiet(this.#poll, isQuiet ? 1 : 0);
  }

  /** Handles all that is ready now. A handler's error reaches the process. */
  drain(): void {
    this.wait(0);
  }

  /**
   * Waits natively, with the event loop standing still, for up to
   * `microseconds`, and handles what is ready: a wake-up without the way round
   * through thread, socket pair and event loop. Keep it short.
   *
   * @returns whether anything was ready
   */
  wait(microseconds: number): boolean {
    if (this.#poll === 0 || this.#isDraining) return false;
    this.#isDraining = true;
    let timeout = microseconds;
    let isAny = false;
    try {
      for (let round = 0; round < maxRounds; round++) {
        const count = core.pollWait(
          this.#poll,
          timeout,
          this.#events,
          capacity,
        );
        if (count < 0) {
          throw new Vhost2Error("SYSTEM", `Cannot read the poll set: ${count}`);
        }
        this.#dispatch(count);
        isAny ||= count > 0;
        if (count < capacity) return isAny;
        timeout = 0;
      }
      // Who signals faster than we handle must not keep the others out.
      blocking.setImmediate(() => this.drain());
      return isAny;
    } finally {
      this.#isDraining = false;
    }
  }

  #dispatch(count: number): void {
    for (let i = 0; i < count; i++) {
      const token = this.#events[i * eventWords];
      const events = this.#events[i * eventWords + 1];
      try {
        if (token === constants.tokenFault) {
          for (const handler of [...this.#faultHandlers]) handler();
        } else {
          this.#handlers[token]?.(events);
        }
      } catch (error) {
        // The other events do not come back: they are handled first.
        queueMicrotask(() => {
          throw error;
        });
      }
    }
  }
}

/** The isolate's event loop as the core sees it. */
export const eventLoop: EventLoop = new EventLoop();
