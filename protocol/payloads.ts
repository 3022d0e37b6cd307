/**
 * Every payload of the protocol except the crypto session: its layout under
 * the specification's field names (the string beside each field), its size on
 * the wire in bytes, its type.
 */

import { formatAddress, type Gpa, type RingAddress } from "./address.ts";
import type { Iova, Uva } from "./address.ts";
import { MAX_CONFIG_SIZE } from "./message.ts";
import {
  type Codec,
  flags32,
  gpaField,
  iovaField,
  ringAddressField,
  struct,
  u16,
  u32,
  u64,
  u8,
  uvaField,
  viewOf,
  wrongSize,
} from "./layout.ts";

/** No payload. */
export const noPayload: Codec<null> = {
  name: "empty",
  minSize: 0,
  maxSize: 0,
  decode: (bytes) =>
    bytes.byteLength === 0
      ? { ok: true, value: null }
      : wrongSize("empty", bytes.byteLength, 0),
  encode: () => new Uint8Array(0),
  describe: () => "",
};

/** "A single 64-bit integer". */
export const u64Payload: Codec<bigint> = {
  name: "u64",
  minSize: 8,
  maxSize: 8,
  decode: (bytes) =>
    bytes.byteLength === 8
      ? { ok: true, value: viewOf(bytes).getBigUint64(0, true) }
      : wrongSize("u64", bytes.byteLength, 8),
  encode(value) {
    const bytes = new Uint8Array(8);
    viewOf(bytes).setBigUint64(0, value, true);
    return bytes;
  },
  describe: (value) => `u64=${formatAddress(value)}`,
};

/** Bit 8 of a vring descriptor index: no descriptor is attached. */
const NOFD = 0x100n;
const INDEX_MASK = 0xffn;

/** "Vring index with file descriptor flag" of SET_VRING_KICK, CALL and ERR. */
export interface VringDescriptorIndex {
  /** Bits 7:0. */
  readonly index: number;
  /** Bit 8 is clear: exactly one descriptor comes with the message. */
  readonly hasDescriptor: boolean;
  /** Bits 63:9 in place; zero from a correct front-end. */
  readonly reserved: bigint;
}

export const vringDescriptorIndex: Codec<VringDescriptorIndex> = {
  name: "vring descriptor index",
  minSize: 8,
  maxSize: 8,
  decode(bytes) {
    const decoded = u64Payload.decode(bytes, { xenMmap: false });
    if (!decoded.ok) {
      return wrongSize("vring descriptor index", bytes.byteLength, 8);
    }
    const { value } = decoded;
    return {
      ok: true,
      value: {
        index: Number(value & INDEX_MASK),
        hasDescriptor: (value & NOFD) === 0n,
        reserved: value & ~(INDEX_MASK | NOFD),
      },
    };
  },
  encode(value, context) {
    if ((value.index & 0xff) !== value.index) {
      throw new RangeError(
        `Cannot encode vring descriptor index: ${value.index} is above 255`,
      );
    }
    return u64Payload.encode(
      BigInt(value.index) | (value.hasDescriptor ? 0n : NOFD) | value.reserved,
      context,
    );
  },
  describe(value) {
    const reserved = value.reserved === 0n
      ? ""
      : ` reserved=${formatAddress(value.reserved)}`;
    return `index=${value.index}${value.hasDescriptor ? "" : " nofd"}` +
      reserved;
  },
};

/** "A vring state description". */
export interface VringState {
  readonly index: number;
  readonly num: number;
}

export const vringState = struct<VringState>("vring state", 8, {
  index: u32("index"),
  num: u32("num"),
});

/** VHOST_VRING_F_LOG, bit 0 of a vring address's flags. */
export const VRING_FLAG_LOG = 0x1;

/** "A vring address description". */
export interface VringAddress {
  readonly index: number;
  readonly flags: number;
  readonly descriptor: RingAddress;
  readonly used: RingAddress;
  readonly available: RingAddress;
  /** Guest address that stands for the used ring in the log; any value. */
  readonly log: Gpa;
}

export const vringAddress = struct<VringAddress>("vring address", 40, {
  index: u32("index"),
  flags: flags32("flags"),
  descriptor: ringAddressField("descriptor"),
  used: ringAddressField("used"),
  available: ringAddressField("available"),
  log: gpaField("log"),
});

/** "Log description" (SET_LOG_BASE with LOG_SHMFD). */
export interface LogDescription {
  /** Bytes. */
  readonly mmapSize: bigint;
  /** Bytes from the start of the descriptor's file. */
  readonly mmapOffset: bigint;
}

export const logDescription = struct<LogDescription>("log", 16, {
  mmapSize: u64("log size"),
  mmapOffset: u64("log offset"),
});

/** SET_LOG_BASE: a log description, or the bare u64 of before LOG_SHMFD. */
export type LogBase =
  | ({ readonly kind: "log" } & LogDescription)
  | { readonly kind: "u64"; readonly base: bigint };

export const logBase: Codec<LogBase> = {
  name: "log base",
  minSize: 8,
  maxSize: logDescription.size,
  decode(bytes, context) {
    if (bytes.byteLength === logDescription.size) {
      const log = logDescription.read(viewOf(bytes), 0);
      return { ok: true, value: { kind: "log", ...log } };
    }
    const decoded = u64Payload.decode(bytes, context);
    return decoded.ok
      ? { ok: true, value: { kind: "u64", base: decoded.value } }
      : wrongSize("log base", bytes.byteLength, "8 or 16");
  },
  encode(value, context) {
    return value.kind === "log"
      ? logDescription.encode(value, context)
      : u64Payload.encode(value.base, context);
  },
  describe: (value) =>
    value.kind === "log"
      ? logDescription.describe(value)
      : `u64=${formatAddress(value.base)}`,
};

/** Permission flags of an IOTLB message. */
export const IotlbPermission = {
  NONE: 0,
  READ: 1,
  WRITE: 2,
  READ_WRITE: 3,
} as const;

/** Types of an IOTLB message. */
export const IotlbType = {
  MISS: 1,
  UPDATE: 2,
  INVALIDATE: 3,
  ACCESS_FAIL: 4,
} as const;

/** "An IOTLB message": struct vhost_iotlb_msg, 26 bytes padded to 32. */
export interface IotlbMessage {
  readonly iova: Iova;
  /** Bytes. */
  readonly size: bigint;
  readonly uva: Uva;
  /** One of {@linkcode IotlbPermission}, or what a hostile peer sent. */
  readonly permission: number;
  /** One of {@linkcode IotlbType}, or what a hostile peer sent. */
  readonly type: number;
}

export const iotlbMessage = struct<IotlbMessage>("iotlb", 32, {
  iova: iovaField("iova"),
  size: u64("size"),
  uva: uvaField("user address"),
  permission: u8("permissions flags"),
  type: u8("type"),
});

/** Flags of a config payload. */
export const ConfigFlag = {
  /** The driver wrote a writable field. */
  WRITABLE: 0,
  /** Live migration restores any field. */
  MIGRATION: 1,
} as const;

/** "Virtio device config space". */
export interface ConfigPayload {
  /** Bytes from the start of configuration space. */
  readonly offset: number;
  readonly flags: number;
  /** `size` bytes; its length is the wire's `size` field. */
  readonly data: Uint8Array;
}

const configHeader = struct<{ offset: number; size: number; flags: number }>(
  "config header",
  12,
  { offset: u32("offset"), size: u32("size"), flags: u32("flags") },
);

export const configPayload: Codec<ConfigPayload> = {
  name: "config",
  minSize: configHeader.size,
  maxSize: configHeader.size + MAX_CONFIG_SIZE,
  decode(bytes) {
    const got = bytes.byteLength;
    if (got < configHeader.size || got > configHeader.size + MAX_CONFIG_SIZE) {
      return wrongSize("config", got, "12 to 268");
    }
    const header = configHeader.read(viewOf(bytes), 0);
    // Bytes after the data are ignored: SPDK's initiator always sends the
    // whole 268-byte struct, whatever its size field says.
    const end = configHeader.size + header.size;
    if (end > got) return wrongSize("config", got, `12 + size ${header.size}`);
    return {
      ok: true,
      value: {
        offset: header.offset,
        flags: header.flags,
        data: bytes.slice(configHeader.size, end),
      },
    };
  },
  encode({ offset, flags, data }) {
    if (data.byteLength > MAX_CONFIG_SIZE) {
      throw new RangeError(
        `Cannot encode config: ${data.byteLength} bytes of data, ` +
          `limit is ${MAX_CONFIG_SIZE}`,
      );
    }
    const bytes = new Uint8Array(configHeader.size + data.byteLength);
    const header = { offset, size: data.byteLength, flags };
    configHeader.write(viewOf(bytes), 0, header);
    bytes.set(data, configHeader.size);
    return bytes;
  },
  describe: ({ offset, flags, data }) =>
    `offset=${offset} size=${data.byteLength} flags=${flags}`,
};

/** "Vring area description" of VRING_HOST_NOTIFIER_MSG. */
export interface VringArea {
  readonly vring: VringDescriptorIndex;
  /** Bytes. */
  readonly size: bigint;
  /** Bytes from the start of the descriptor's file. */
  readonly offset: bigint;
}

const vringAreaWire = struct<{ u64: bigint; size: bigint; offset: bigint }>(
  "vring area",
  24,
  { u64: u64("u64"), size: u64("size"), offset: u64("offset") },
);

export const vringArea: Codec<VringArea> = {
  name: "vring area",
  minSize: vringAreaWire.size,
  maxSize: vringAreaWire.size,
  decode(bytes, context) {
    if (bytes.byteLength !== vringAreaWire.size) {
      return wrongSize("vring area", bytes.byteLength, vringAreaWire.size);
    }
    const vring = vringDescriptorIndex.decode(bytes.subarray(0, 8), context);
    if (!vring.ok) return vring;
    const { size, offset } = vringAreaWire.read(viewOf(bytes), 0);
    return { ok: true, value: { vring: vring.value, size, offset } };
  },
  encode({ vring, size, offset }, context) {
    const bytes = vringAreaWire.encode({ u64: 0n, size, offset }, context);
    bytes.set(vringDescriptorIndex.encode(vring, context));
    return bytes;
  },
  describe: ({ vring, size, offset }) =>
    `${vringDescriptorIndex.describe(vring)} size=${size} offset=${offset}`,
};

/** "Inflight description", 20 bytes padded to 24. */
export interface InflightDescription {
  /** Bytes. */
  readonly mmapSize: bigint;
  /** Bytes from the start of the descriptor's file. */
  readonly mmapOffset: bigint;
  readonly numQueues: number;
  /** Descriptors per queue, as configured. */
  readonly queueSize: number;
}

export const inflightDescription = struct<InflightDescription>("inflight", 24, {
  mmapSize: u64("mmap size"),
  mmapOffset: u64("mmap offset"),
  numQueues: u16("num queues"),
  queueSize: u16("queue size"),
});

/** "VhostUserShared": the 16 bytes of the object's UUID. */
export const sharedUuid: Codec<Uint8Array> = {
  name: "shared object",
  minSize: 16,
  maxSize: 16,
  decode: (bytes) =>
    bytes.byteLength === 16
      ? { ok: true, value: bytes.slice() }
      : wrongSize("shared object", bytes.byteLength, 16),
  encode(value) {
    if (value.byteLength !== 16) {
      throw new RangeError(
        `Cannot encode shared object: UUID has ${value.byteLength} bytes, not 16`,
      );
    }
    return value.slice();
  },
  describe: (value) =>
    `uuid=${
      Array.from(value, (byte) => byte.toString(16).padStart(2, "0")).join("")
    }`,
};

/** Transfer directions of SET_DEVICE_STATE_FD. */
export const StateDirection = { SAVE: 0, LOAD: 1 } as const;

/** "Device state transfer parameters". */
export interface DeviceStateTransfer {
  /** One of {@linkcode StateDirection}, or what a hostile peer sent. */
  readonly direction: number;
  /** 0: stopped. */
  readonly phase: number;
}

export const deviceStateTransfer = struct<DeviceStateTransfer>(
  "device state transfer",
  8,
  { direction: u32("transfer direction"), phase: u32("migration phase") },
);

/** Bit 0 of an mmap payload's flags: mapped writable too. */
export const MMAP_FLAG_READ_WRITE = 0x1n;

/** "VhostUserMMap" of SHMEM_MAP and SHMEM_UNMAP; 7 bytes pad after shmid. */
export interface ShmemMapping {
  readonly shmid: number;
  /** Bytes from the start of the descriptor's file. */
  readonly fdOffset: bigint;
  /** Bytes from the start of the shared memory region. */
  readonly shmOffset: bigint;
  /** Bytes. */
  readonly size: bigint;
  readonly flags: bigint;
}

export const shmemMapping = struct<ShmemMapping>("mmap", 40, {
  shmid: u8("shmid"),
  fdOffset: u64("fd_offset"),
  shmOffset: u64("shm_offset"),
  size: u64("len"),
  flags: u64("flags"),
});

/** Shared memory regions that a device may have: 0..255. */
export const SHMEM_REGION_COUNT = 256;

/** "VhostUserShMemConfig": u32 nregions, u32 pad, u64 memory_sizes[256]. */
export interface ShmemConfig {
  /** `nregions`: how many sizes are not zero. */
  readonly regionCount: number;
  /** Bytes by shmid, 256 of them; 0 where there is no region. */
  readonly sizes: readonly bigint[];
}

const SHMEM_CONFIG_SIZE = 8 + 8 * SHMEM_REGION_COUNT;

export const shmemConfig: Codec<ShmemConfig> = {
  name: "shmem config",
  minSize: SHMEM_CONFIG_SIZE,
  maxSize: SHMEM_CONFIG_SIZE,
  decode(bytes) {
    if (bytes.byteLength !== SHMEM_CONFIG_SIZE) {
      return wrongSize("shmem config", bytes.byteLength, SHMEM_CONFIG_SIZE);
    }
    const view = viewOf(bytes);
    const sizes = Array.from(
      { length: SHMEM_REGION_COUNT },
      (_, shmid) => view.getBigUint64(8 + 8 * shmid, true),
    );
    return { ok: true, value: { regionCount: view.getUint32(0, true), sizes } };
  },
  encode({ regionCount, sizes }) {
    if (sizes.length > SHMEM_REGION_COUNT) {
      throw new RangeError(
        `Cannot encode shmem config: ${sizes.length} regions, ` +
          `limit is ${SHMEM_REGION_COUNT}`,
      );
    }
    const bytes = new Uint8Array(SHMEM_CONFIG_SIZE);
    const view = viewOf(bytes);
    view.setUint32(0, regionCount, true);
    sizes.forEach((size, shmid) =>
      view.setBigUint64(8 + 8 * shmid, size, true)
    );
    return bytes;
  },
  describe({ regionCount, sizes }) {
    const parts = [`nregions=${regionCount}`];
    sizes.forEach((size, shmid) => {
      if (size !== 0n) parts.push(`${shmid}:${formatAddress(size)}`);
    });
    return parts.join(" ");
  },
};
