// A disk that a BIOS boots: its first sector reads sectors from further on
// through INT 13h and prints the text that stands there on the first serial
// port. The text appears only if the firmware's reads of this disk work.

import { Buffer } from "node:buffer";
const SECTOR_SIZE = 512;
/** Where the BIOS puts the first sector. */
const LOADED_AT = 0x7c00;
/** Where our program puts the sectors that it reads. */
const TEXT_AT = 0x7e00;
const TEXT_SECTOR = 2048;
const SECTOR_COUNT = 8;
const FAILED = "INT 13h failed\r\n\0";

/** Offsets into the program below. */
const DAP = 54;
const FAILED_TEXT = 70;

/** 16-bit code; `DL` holds the number of the boot disk throughout the reads. */
const PROGRAM = [
  ...[0x31, 0xc0], //              0 xor ax, ax
  ...[0x8e, 0xd8], //              2 mov ds, ax
  ...[0x8e, 0xc0], //              4 mov es, ax
  ...[0x8e, 0xd0], //              6 mov ss, ax
  ...[0xbc, ...u16(LOADED_AT)], //  8 mov sp, 0x7c00
  ...[0xbe, ...u16(LOADED_AT + DAP)], // 11 mov si, dap
  ...[0xb4, 0x42], //             14 mov ah, 0x42 (extended read)
  ...[0xcd, 0x13], //             16 int 0x13
  ...[0x72, 0x1a], //             18 jc failed
  // The text stands in the last of the sectors: all of them must be there.
  ...[0xbe, ...u16(TEXT_AT + (SECTOR_COUNT - 1) * SECTOR_SIZE)], // 20 mov si
  0xac, //                        23 print: lodsb
  ...[0x84, 0xc0], //             24 test al, al
  ...[0x74, 0x17], //             26 jz halt
  ...[0x88, 0xc3], //             28 mov bl, al
  ...[0xba, 0xfd, 0x03], //       30 mov dx, 0x3fd (COM1, line status)
  0xec, //                        33 wait: in al, dx
  ...[0xa8, 0x20], //             34 test al, 0x20 (transmitter empty)
  ...[0x74, 0xfb], //             36 jz wait
  ...[0x88, 0xd8], //             38 mov al, bl
  ...[0xba, 0xf8, 0x03], //       40 mov dx, 0x3f8 (COM1, data)
  0xee, //                        43 out dx, al
  ...[0xeb, 0xe9], //             44 jmp print
  ...[0xbe, ...u16(LOADED_AT + FAILED_TEXT)], // 46 failed: mov si, text
  ...[0xeb, 0xe4], //             49 jmp print
  0xf4, //                        51 halt: hlt
  ...[0xeb, 0xfd], //             52 jmp halt
  // 54: the disk address packet of INT 13h, AH=42h.
  ...[16, 0, ...u16(SECTOR_COUNT), ...u16(TEXT_AT), ...u16(0)],
  ...[...u16(TEXT_SECTOR), 0, 0, 0, 0, 0, 0],
  ...Buffer.from(FAILED), //      70
];

/** The image of a disk that boots and prints one line of text. */
export function buildBootDisk(line: string): Uint8Array {
  const text = Buffer.from(line + "\r\n\0");
  if (text.length > SECTOR_SIZE) {
    throw new RangeError(`Cannot print ${text.length} bytes: at most 512`);
  }
  const image = new Uint8Array((TEXT_SECTOR + SECTOR_COUNT) * SECTOR_SIZE);
  image.set(PROGRAM);
  image.set([0x55, 0xaa], SECTOR_SIZE - 2);
  image.set(text, (TEXT_SECTOR + SECTOR_COUNT - 1) * SECTOR_SIZE);
  return image;
}

function u16(value: number): [number, number] {
  return [value & 0xff, value >> 8];
}
