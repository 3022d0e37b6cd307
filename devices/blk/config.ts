/**
 * Configuration space and features of a block device (virtio 1.3, 5.2.3 and
 * 5.2.4).
 *
 * @module
 */

import { Vhost2Error } from "../../ffi/errors.ts";
import { BlkFeature } from "../../protocol/blk.ts";
import { featureMask } from "../../protocol/features.ts";
import { virtqueueFeatures } from "../../virtqueue/mod.ts";

export { BlkFeature };

/** Capacity, and all sectors on the wire, are in these, whatever the block. */
export const sectorSize = 512;

/** Byte offsets of struct virtio_blk_config, up to the end of WRITE_ZEROES. */
export const configField = {
  capacity: 0,
  size_max: 8,
  seg_max: 12,
  blk_size: 20,
  physical_block_exp: 24,
  alignment_offset: 25,
  min_io_size: 26,
  opt_io_size: 28,
  writeback: 32,
  num_queues: 34,
  max_discard_sectors: 36,
  max_discard_seg: 40,
  discard_sector_alignment: 44,
  max_write_zeroes_sectors: 48,
  max_write_zeroes_seg: 52,
  write_zeroes_may_unmap: 56,
  byteSize: 60,
} as const;

/** What a disk says of itself. Sizes in bytes. */
export interface BlkGeometry {
  readonly isReadOnly: boolean;
  readonly logicalBlockSize: number;
  readonly physicalBlockSize: number;
  readonly numQueues: number;
  readonly segMax: number;
  /** 0: no limit is told. */
  readonly sizeMax: number;
  readonly canDiscard: boolean;
  readonly canWriteZeroes: boolean;
  /** For discard and write zeroes alike: in one range, and ranges. */
  readonly maxRangeSectors: number;
  readonly maxRangeCount: number;
}

/** The features that a disk offers, those of `virtqueue/` included. */
export function blkFeatures(geometry: BlkGeometry): bigint {
  const bits: number[] = [
    BlkFeature.SEG_MAX,
    BlkFeature.BLK_SIZE,
    BlkFeature.TOPOLOGY,
    BlkFeature.MQ,
    BlkFeature.FLUSH,
    BlkFeature.CONFIG_WCE,
  ];
  if (geometry.sizeMax > 0) bits.push(BlkFeature.SIZE_MAX);
  if (geometry.isReadOnly) bits.push(BlkFeature.RO);
  if (geometry.canDiscard) bits.push(BlkFeature.DISCARD);
  if (geometry.canWriteZeroes) bits.push(BlkFeature.WRITE_ZEROES);
  return featureMask(...bits) | virtqueueFeatures;
}

/** Configuration space as the driver reads it, a new copy each time. */
export function encodeConfig(
  geometry: BlkGeometry,
  capacitySectors: number,
  isWriteback: boolean,
): Uint8Array<ArrayBuffer> {
  const view = new DataView(new ArrayBuffer(configField.byteSize));
  const { logicalBlockSize, physicalBlockSize } = geometry;
  view.setBigUint64(configField.capacity, BigInt(capacitySectors), true);
  view.setUint32(configField.size_max, geometry.sizeMax, true);
  view.setUint32(configField.seg_max, geometry.segMax, true);
  view.setUint32(configField.blk_size, logicalBlockSize, true);
  const blocks = physicalBlockSize / logicalBlockSize;
  view.setUint8(configField.physical_block_exp, Math.log2(blocks));
  // In logical blocks.
  view.setUint16(configField.min_io_size, blocks, true);
  view.setUint8(configField.writeback, isWriteback ? 1 : 0);
  view.setUint16(configField.num_queues, geometry.numQueues, true);
  if (geometry.canDiscard) {
    const { maxRangeSectors, maxRangeCount } = geometry;
    view.setUint32(configField.max_discard_sectors, maxRangeSectors, true);
    view.setUint32(configField.max_discard_seg, maxRangeCount, true);
    view.setUint32(
      configField.discard_sector_alignment,
      logicalBlockSize / sectorSize,
      true,
    );
  }
  if (geometry.canWriteZeroes) {
    const { maxRangeSectors, maxRangeCount } = geometry;
    view.setUint32(configField.max_write_zeroes_sectors, maxRangeSectors, true);
    view.setUint32(configField.max_write_zeroes_seg, maxRangeCount, true);
    view.setUint8(configField.write_zeroes_may_unmap, 1);
  }
  return new Uint8Array(view.buffer);
}

/**
 * A size in bytes as a capacity in sectors.
 *
 * @throws Vhost2Error OPTION unless it is a whole number of blocks, above 0
 */
export function capacityOf(size: number, logicalBlockSize: number): number {
  if (
    !Number.isSafeInteger(size) || size <= 0 || size % logicalBlockSize !== 0
  ) {
    throw new Vhost2Error(
      "OPTION",
      `Cannot use a disk of ${size} bytes: the size must be a multiple of the logical block of ${logicalBlockSize} bytes, and not 0`,
    );
  }
  return size / sectorSize;
}
