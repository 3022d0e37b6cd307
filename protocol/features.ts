/**
 * Feature bits and feature masks. A bit is a number 0..63, a mask is a bigint
 * made of them; the types are distinct because testing a mask with the bit
 * *number* (30 = 0x1e) is a bug that several back-ends have shipped.
 */

/** Number 0..63 of a virtio feature (VIRTIO 1.3 section 6, and vhost's). */
export type VirtioFeatureBit = number & { readonly __brand: "virtio bit" };
/** Number 0..63 of a vhost-user protocol feature. */
export type ProtocolFeatureBit = number & { readonly __brand: "protocol bit" };
/** Any feature bit; those of a device type are plain numbers. */
export type FeatureBit = VirtioFeatureBit | ProtocolFeatureBit | number;

const virtio = (bit: number) => bit as VirtioFeatureBit;
const protocol = (bit: number) => bit as ProtocolFeatureBit;

/** Bits that all device types share: VIRTIO_F_*, VHOST_F_*, VHOST_USER_F_*. */
export const VirtioFeature = {
  /** Legacy: notify when the ring runs empty even if suppressed. */
  NOTIFY_ON_EMPTY: virtio(24),
  /** VHOST_F_LOG_ALL: log all writes to guest memory. */
  LOG_ALL: virtio(26),
  /** Legacy: no assumption about descriptor framing. */
  ANY_LAYOUT: virtio(27),
  RING_INDIRECT_DESC: virtio(28),
  RING_EVENT_IDX: virtio(29),
  /** VHOST_USER_F_PROTOCOL_FEATURES. */
  PROTOCOL_FEATURES: virtio(30),
  VERSION_1: virtio(32),
  /** The vhost-user specification says VIRTIO_F_IOMMU_PLATFORM. */
  ACCESS_PLATFORM: virtio(33),
  RING_PACKED: virtio(34),
  IN_ORDER: virtio(35),
  ORDER_PLATFORM: virtio(36),
  SR_IOV: virtio(37),
  NOTIFICATION_DATA: virtio(38),
  NOTIF_CONFIG_DATA: virtio(39),
  RING_RESET: virtio(40),
} as const;

/** VHOST_USER_PROTOCOL_F_*. */
export const ProtocolFeature = {
  MQ: protocol(0),
  LOG_SHMFD: protocol(1),
  RARP: protocol(2),
  REPLY_ACK: protocol(3),
  NET_MTU: protocol(4),
  BACKEND_REQ: protocol(5),
  CROSS_ENDIAN: protocol(6),
  CRYPTO_SESSION: protocol(7),
  PAGEFAULT: protocol(8),
  CONFIG: protocol(9),
  BACKEND_SEND_FD: protocol(10),
  HOST_NOTIFIER: protocol(11),
  INFLIGHT_SHMFD: protocol(12),
  RESET_DEVICE: protocol(13),
  INBAND_NOTIFICATIONS: protocol(14),
  CONFIGURE_MEM_SLOTS: protocol(15),
  STATUS: protocol(16),
  XEN_MMAP: protocol(17),
  SHARED_OBJECT: protocol(18),
  DEVICE_STATE: protocol(19),
  GET_VRING_BASE_INFLIGHT: protocol(20),
  GPA_ADDRESSES: protocol(21),
  SHMEM: protocol(22),
  GET_VRING_BASE_SKIP_DRAIN: protocol(23),
} as const;

/** The mask with exactly these bits. */
export function featureMask(...bits: FeatureBit[]): bigint {
  let mask = 0n;
  for (const bit of bits) mask |= 1n << BigInt(bit);
  return mask;
}

/** Whether the mask holds the bit. */
export function hasFeature(mask: bigint, bit: FeatureBit): boolean {
  return ((mask >> BigInt(bit)) & 1n) === 1n;
}

function namesByBit(bits: Record<string, number>): Map<number, string> {
  return new Map(Object.entries(bits).map(([name, bit]) => [bit, name]));
}

const virtioNames = namesByBit(VirtioFeature);
const protocolNames = namesByBit(ProtocolFeature);

/** The specification's short name of a protocol feature. */
export function protocolFeatureName(bit: ProtocolFeatureBit): string {
  return protocolNames.get(bit) ?? `bit ${bit}`;
}

/** The specification's short name of a virtio feature. */
export function virtioFeatureName(bit: VirtioFeatureBit): string {
  return virtioNames.get(bit) ?? `bit ${bit}`;
}

function describeMask(mask: bigint, names: Map<number, string>): string {
  const found: string[] = [];
  for (let bit = 0; bit < 64; bit++) {
    if (hasFeature(mask, bit)) found.push(names.get(bit) ?? `${bit}`);
  }
  const hex = `0x${mask.toString(16)}`;
  return found.length === 0 ? hex : `${hex}(${found.join("|")})`;
}

/** `0x140000000(PROTOCOL_FEATURES|VERSION_1)`; unnamed bits by number. */
export function describeFeatures(mask: bigint): string {
  return describeMask(mask, virtioNames);
}

/** `0x9(MQ|REPLY_ACK)`; unnamed bits by number. */
export function describeProtocolFeatures(mask: bigint): string {
  return describeMask(mask, protocolNames);
}
