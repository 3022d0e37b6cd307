/**
 * The frame by which a guest's new place becomes known after a migration, for
 * guests that do not announce themselves (vhost-user, SEND_RARP).
 *
 * @module
 */

const etherType = 0x8035;
const requestReverse = 3;
/** The shortest frame on an Ethernet, without its checksum. */
const frameBytes = 60;

/** A reverse ARP request (RFC 903) from `mac` to everybody. */
export function rarpFrame(mac: Uint8Array): Uint8Array<ArrayBuffer> {
  const frame = new Uint8Array(frameBytes);
  const view = new DataView(frame.buffer);
  frame.fill(0xff, 0, 6);
  frame.set(mac, 6);
  view.setUint16(12, etherType);
  view.setUint16(14, 1); // Ethernet
  view.setUint16(16, 0x0800); // IPv4
  view.setUint8(18, 6);
  view.setUint8(19, 4);
  view.setUint16(20, requestReverse);
  frame.set(mac, 22);
  frame.set(mac, 32);
  return frame;
}
