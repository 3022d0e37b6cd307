/**
 * Gives the queues of an isolate their turns.
 *
 * After its last work a queue is looked at for a short time without kicks,
 * with the event loop between the looks. Then kicks are wanted again, and for
 * another short time they, finished file I/O and sockets are waited for
 * natively, in slices that the event loop does not notice: that saves the way
 * through the native thread and the socket pair, which takes longer than most
 * requests. Only then the isolate sleeps.
 *
 * @module
 */

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

/** With the time of the last work, in milliseconds. */
const active = new Map<Turn, number>();
let lastEvent = 0;
let isScheduled = false;

function schedule(): void {
  if (isScheduled) return;
  isScheduled = true;
  setImmediate(run);
}

function run(): void {
  isScheduled = false;
  const now = performance.now();
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
  if (active.size > 0) {
    // Nobody wakes the isolate if it is still quiet, and a queue that is
    // always busy must not keep kicks and messages out.
    eventLoop.drain();
    return schedule();
  }
  eventLoop.setQuiet(true);
  if (eventLoop.wait(waitMicroseconds)) lastEvent = performance.now();
  if (active.size > 0 || now - lastEvent < lingerMs) schedule();
  else eventLoop.setQuiet(false);
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
