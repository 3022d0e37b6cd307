/** Waiting on events. A time here is only ever the limit of a failure. */

/** Milliseconds after which a wait has failed. */
const limitMs = 60_000;

/** Something that has happened, told to whoever waits for a state. */
export class Signal {
  readonly #waiters = new Set<() => void>();

  /** Something has changed: conditions are looked at again. */
  notify(): void {
    for (const look of [...this.#waiters]) look();
  }

  /** Fulfilled when `condition` holds, now or after a `notify`. */
  until(condition: () => boolean, what = `${condition}`): Promise<void> {
    if (condition()) return Promise.resolve();
    return new Promise((resolve, reject) => {
      const end = (settle: () => void) => {
        clearTimeout(timer);
        this.#waiters.delete(look);
        settle();
      };
      const look = () => {
        try {
          if (condition()) end(resolve);
        } catch (error) {
          end(() => reject(error));
        }
      };
      const timer = setTimeout(
        () => end(() => reject(new Error(`Never came true: ${what}`))),
        limitMs,
      );
      this.#waiters.add(look);
    });
  }
}

/** Events in the order in which they came, each taken once. */
export class Events<T> {
  readonly #events: T[] = [];
  readonly #signal = new Signal();

  /** Adds an event; bound, so that it can be handed out as a callback. */
  readonly push = (event: T): void => {
    this.#events.push(event);
    this.#signal.notify();
  };

  /** Those that nobody has taken. */
  get pending(): readonly T[] {
    return this.#events;
  }

  /** The next event. */
  async next(): Promise<T> {
    await this.#signal.until(() => this.#events.length > 0, "an event");
    return this.#events.shift()!;
  }

  /** Drops events up to the first that fits, and returns that one. */
  async find(fits: (event: T) => boolean): Promise<T> {
    for (;;) {
      const event = await this.next();
      if (fits(event)) return event;
    }
  }
}

/**
 * For states that nothing tells about, such as the number of descriptors or
 * another process: looks again at each turn of the event loop.
 */
export async function eventually(
  condition: () => boolean,
  what: string | (() => string) = `${condition}`,
): Promise<void> {
  const end = performance.now() + limitMs;
  while (!condition()) {
    if (performance.now() > end) {
      const text = typeof what === "string" ? what : what();
      throw new Error(`Never came true: ${text}`);
    }
    await new Promise((resolve) => setTimeout(resolve, 1));
  }
}

/** Rejects with a name instead of hanging the whole run. */
export function within<T>(promise: Promise<T>, what: string): Promise<T> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const limit = new Promise<never>((_, reject) => {
    timer = setTimeout(
      () => reject(new Error(`Never settled: ${what}`)),
      limitMs,
    );
  });
  return Promise.race([promise, limit]).finally(() => clearTimeout(timer));
}
