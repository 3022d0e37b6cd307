/**
 * The ring features that `virtqueue/` can process.
 *
 * @module
 */

/**
 * INDIRECT_DESC (28), EVENT_IDX (29), ACCESS_PLATFORM (33: addresses that an
 * IOMMU translates) and PACKED (34) as a mask, for the `features` of a device
 * that uses `virtqueue/`.
 *
 * Three more work where a device offers them, but are nothing to offer unasked
 * (virtio 1.3, section 6):
 *
 * - IN_ORDER (35): completions are held back until their turn, and one used
 *   element stands for as many as were written completely. A device that
 *   completes out of order only gets slower by it.
 * - NOTIFICATION_DATA (38): the data is for who traps the notification, which
 *   is the front-end. It passes on a kick, and that is all there is to read.
 * - RING_RESET (40): a queue can be stopped, and started with another size,
 *   while the others run. But some front-ends, QEMU among them, accept the
 *   feature and tell a vhost-user back-end nothing of the reset, so that it
 *   would go on with a ring that the driver has taken back.
 */
export const virtqueueFeatures: bigint = (1n << 28n) | (1n << 29n) |
  (1n << 33n) | (1n << 34n);

/**
 * LOG_SHMFD (1) as a mask, for the `protocolFeatures` of a device that writes
 * guest memory through `virtqueue/` only: all of that is logged, so that the
 * guest can be migrated.
 */
export const virtqueueProtocolFeatures: bigint = 1n << 1n;

/**
 * INFLIGHT_SHMFD (12), GET_VRING_BASE_INFLIGHT (20) and
 * GET_VRING_BASE_SKIP_DRAIN (23) as a mask, for the `protocolFeatures` of a
 * device that uses `virtqueue/`: requests are tracked in the front-end's
 * inflight region, and after a crash the next process is given what this one
 * had taken and not completed, oldest first. So each request must be one that
 * may be done twice.
 *
 * With IN_ORDER, what is held back for an older request counts as not
 * completed. A stop leaves requests to the region where the device can cancel
 * them (`VirtqueueOptions.suspend`); otherwise it waits, as without 20 and 23.
 */
export const recoveryProtocolFeatures: bigint = (1n << 12n) | (1n << 20n) |
  (1n << 23n);
