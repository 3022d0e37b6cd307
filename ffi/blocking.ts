/**
 * Whether this isolate may block in the core: a Worker may, as long as nothing
 * of what it serves waits for JavaScript (a timer, a fetch, a promise). The
 * main thread never does for long.
 *
 * @module
 */

class Blocking {
  /** The queues that are processed; each says whether it needs JavaScript. */
  readonly #queues = new Set<() => boolean>();
  /**
   * Set in an isolate that serves queues and nothing else: whether it may
   * block when `queueCount` queues are processed and need no JavaScript.
   */
  permit: ((queueCount: number) => boolean) | undefined;

  #immediates = 0;

  /** As `setImmediate`, which the isolate does not block before. */
  setImmediate(action: () => void): void {
    this.#immediates++;
    setImmediate(() => {
      this.#immediates--;
      action();
    });
  }

  /** A queue is processed from now on; the result ends that. */
  add(needsJavaScript: () => boolean): () => void {
    this.#queues.add(needsJavaScript);
    return () => this.#queues.delete(needsJavaScript);
  }

  /** Whether a queue cannot go on without the event loop. */
  get isJavaScriptNeeded(): boolean {
    if (this.#immediates > 0) return true;
    for (const needsJavaScript of this.#queues) {
      if (needsJavaScript()) return true;
    }
    return false;
  }

  /** Whether the isolate may block now. */
  get isAllowed(): boolean {
    return this.permit !== undefined && this.permit(this.#queues.size) &&
      !this.isJavaScriptNeeded;
  }
}

/** This isolate's. */
export const blocking: Blocking = new Blocking();
