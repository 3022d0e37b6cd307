/**
 * Where an address of the guest's is, as the core answers it.
 *
 * @module
 */

import { layouts } from "./abi.gen.ts";

/** Where a guest address is. */
export interface Translation {
  readonly view: number;
  readonly offset: number;
  /** Bytes, clipped at the end of the view. */
  readonly length: number;
  readonly regionViewFirst: number;
  readonly regionOffset: number;
  /** Bytes, clipped at the end of the region. */
  readonly contiguous: number;
}

/** Room for the core's answer. */
export function translationOut(): DataView {
  return new DataView(new ArrayBuffer(layouts.Translation.byteSize));
}

/** Reads the core's answer. */
export function readTranslation(out: DataView): Translation {
  const field = layouts.Translation;
  return {
    view: out.getUint32(field.view, true),
    offset: out.getUint32(field.offset, true),
    length: out.getUint32(field.length, true),
    regionViewFirst: out.getUint32(field.regionViewFirst, true),
    regionOffset: Number(out.getBigUint64(field.regionOffset, true)),
    contiguous: Number(out.getBigUint64(field.contiguous, true)),
  };
}
