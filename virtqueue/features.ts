/**
 * The ring features that `virtqueue/` can process.
 *
 * @module
 */

/**
 * INDIRECT_DESC (28), EVENT_IDX (29) and PACKED (34) as a mask, for the
 * `features` of a device that uses `virtqueue/`. IN_ORDER (35) can be processed too, but a
 * device that completes out of order gains nothing from it: completions are
 * held back until their turn.
 */
export const virtqueueFeatures: bigint = (1n << 28n) | (1n << 29n) |
  (1n << 34n);
