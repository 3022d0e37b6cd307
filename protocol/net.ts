/**
 * Features and control commands of a network device (virtio 1.3, 5.1), for both
 * its ends.
 */

/** VIRTIO_NET_F_*. */
export const NetFeature = {
  CSUM: 0,
  GUEST_CSUM: 1,
  CTRL_GUEST_OFFLOADS: 2,
  MTU: 3,
  MAC: 5,
  GUEST_TSO4: 7,
  GUEST_TSO6: 8,
  GUEST_ECN: 9,
  GUEST_UFO: 10,
  HOST_TSO4: 11,
  HOST_TSO6: 12,
  HOST_ECN: 13,
  HOST_UFO: 14,
  MRG_RXBUF: 15,
  STATUS: 16,
  CTRL_VQ: 17,
  CTRL_RX: 18,
  CTRL_VLAN: 19,
  CTRL_RX_EXTRA: 20,
  GUEST_ANNOUNCE: 21,
  MQ: 22,
  CTRL_MAC_ADDR: 23,
  DEVICE_STATS: 50,
  VQ_NOTF_COAL: 52,
  NOTF_COAL: 53,
  GUEST_USO4: 54,
  GUEST_USO6: 55,
  HOST_USO: 56,
  HASH_REPORT: 57,
  GUEST_HDRLEN: 59,
  RSS: 60,
  RSC_EXT: 61,
  STANDBY: 62,
  SPEED_DUPLEX: 63,
} as const;

/** VIRTIO_NET_CTRL_*: classes of commands (virtio 1.3, 5.1.6.5). */
export const ControlClass = { ANNOUNCE: 3, MQ: 4 } as const;
/** Commands, each of one class. */
export const ControlCommand = {
  ANNOUNCE_ACK: 0,
  /** How many queue pairs are in use, 16 bits. */
  MQ_VQ_PAIRS_SET: 0,
} as const;
/** VIRTIO_NET_OK and VIRTIO_NET_ERR. */
export const ControlAnswer = { OK: 0, ERR: 1 } as const;
