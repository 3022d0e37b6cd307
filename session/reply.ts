/**
 * A reply that carries descriptors.
 *
 * @module
 */

/** What a handler answers where the reply's value alone is not enough. */
export class ReplyWithDescriptors<T> {
  readonly value: T;
  /** They stay their owner's; what is sent are duplicates. */
  readonly fds: readonly number[];

  constructor(value: T, fds: readonly number[]) {
    this.value = value;
    this.fds = fds;
  }
}
