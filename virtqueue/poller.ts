/**
 * Gives the queues of an isolate their turns.
 *
 * After its last work a queue is looked at for a short time without kicks,
 * with the event loop now and then between the looks, and between all of them
 * while a request waits for JavaScript. Then kicks are wanted again, and for
 * another short time they, finished file I/O and sockets are waited for
 * natively, in slices that the event loop does not notice: that saves the way
 * through the native thread and the socket pair, which takes longer than most
 * requests. Only then the isolate sleeps.
 *
 * In a Worker the event loop has nothing to do while no request waits for
 * JavaScript: turns and looks follow each other without it, and the native
 * wait is as long as it may be. After a second in which nothing came even a
 * Worker sleeps in its event loop, and costs nothing.
 *
 * @module
 */

import { blocking } from "../ffi/blocking.ts";
import { eventLoop } from "../ffi/event_loop.ts";

/** Something that takes turns. */
export interface Turn {
  /** Does a bounded amount of work; true when there was any. */
  turn(): boolean;
  /** Asks to be woken again; false when work came in the meantime. */
  rest(): boolean;
  /** Microseconds to go on looking after the last work. */
  readonly pollMicroseconds: number;
}

/** One native wait, in microseconds: as long as the event loop stands still. */
const waitMicroseconds = 50;
/** Such waits go on for so long after the last event, in milliseconds. */
const lingerMs = 0.5;

/** The same where the isolate may block. */
const blockMicroseconds = 100_000;
const blockLingerMs = 1000;
/** An isolate that may block gives the event loop a turn after so long. */
const blockSliceMs = 10;
/**
 * One that may not, after so long while there is work: a turn of the event loop
 * costs as much as some dozens of requests.
 */
const sliceMs = 0.1;
/** It looks for kicks and messages once in so many rounds of looking at rings. */
const roundsPerDrain = 16;

/** With the time of the last work, in milliseconds. */
const active = new Map<Turn, number>();
/** To be called as soon as the turn in hand has ended. */
const soon: (() => void)[] = [];
let lastEvent = 0;
let isScheduled = false;
let isRunning = false;

function schedule(): void {
  if (isScheduled || isRunning) return;
  isScheduled = true;
  setImmediate(run);
}

function run(): void {
  isScheduled = false;
  isRunning = true;
  let goesOn = false;
  try {
    goesOn = look();
  } finally {
    isRunning = false;
    if (goesOn || active.size > 0) schedule();
    else eventLoop.setQuiet(false);
  }
}

function takeTurns(now: number): void {
  for (const [member, lastWork] of active) {
    if (member.turn()) {
      active.set(member, now);
      lastEvent = now;
    } else if (
      (now - lastWork) * 1000 >= member.pollMicroseconds && member.rest()
    ) {
      active.delete(member);
    }
  }
  callSoon();
}

function callSoon(): void {
  while (soon.length > 0) soon.pop()!();
}

/** Takes turns and waits; true when there is a reason to come back. */
function look(): boolean {
  const begin = performance.now();
  for (let round = 1;; round++) {
    const now = performance.now();
    takeTurns(now);
    const isBlocking = blocking.isAllowed;
    if (active.size > 0) {
      // Nobody wakes the isolate if it is still quiet, and a queue that is
      // always busy must not keep kicks and messages out.
      if (round % roundsPerDrain === (isBlocking ? 0 : 1)) drain();
      if (now - begin > (isBlocking ? blockSliceMs : sliceMs)) return true;
      if (!isBlocking && blocking.isJavaScriptNeeded) return true;
      continue;
    }
    eventLoop.setQuiet(true);
    const wait = isBlocking ? blockMicroseconds : waitMicroseconds;
    const hadEvent = eventLoop.wait(wait);
    callSoon();
    const after = performance.now();
    if (hadEvent) lastEvent = after;
    if (!isBlocking || !hadEvent || after - begin > blockSliceMs) {
      return after - lastEvent < (isBlocking ? blockLingerMs : lingerMs);
    }
  }
}

function drain(): void {
  eventLoop.drain();
  callSoon();
}

/** From now on `member` takes turns, until it may rest. */
export function activate(member: Turn): void {
  active.set(member, performance.now());
  schedule();
}

/** `member` takes no more turns. */
export function deactivate(member: Turn): void {
  active.delete(member);
}

/** Whether `member` is taking turns. */
export function isActive(member: Turn): boolean {
  return active.has(member);
}

/** Calls `action` when the turn in hand has ended, before anybody sleeps. */
export function callLater(action: () => void): void {
  if (isRunning) soon.push(action);
  else queueMicrotask(action);
}
