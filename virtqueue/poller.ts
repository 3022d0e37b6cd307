/**
 * Gives the queues of an isolate their turns: bounded work per turn, then the
 * event loop, and after the last work a short time of looking without kicks.
 *
 * @module
 */

/** Something that takes turns. */
export interface Turn {
  /** Does a bounded amount of work; true when there was any. */
  turn(): boolean;
  /** Asks to be woken again; false when work came in the meantime. */
  rest(): boolean;
  /** Microseconds to go on looking after the last work; Infinity: always. */
  readonly pollMicroseconds: number;
}

const active = new Map<Turn, number>();
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
    } else if (
      (now - lastWork) * 1000 >= member.pollMicroseconds && member.rest()
    ) {
      active.delete(member);
    }
  }
  if (active.size > 0) schedule();
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
