import assert from "node:assert/strict";
import { test } from "../harness.ts";
import {
  type Codec,
  configPayload,
  deviceStateTransfer,
  gpa,
  inflightDescription,
  iotlbMessage,
  IotlbPermission,
  IotlbType,
  iova,
  logBase,
  logDescription,
  memoryRegion,
  memoryTable,
  noPayload,
  payloadCodecs,
  plainWire,
  ringAddress,
  sharedUuid,
  shmemConfig,
  shmemMapping,
  singleMemoryRegion,
  u64Payload,
  uva,
  vringAddress,
  vringArea,
  vringDescriptorIndex,
  vringState,
  type WireContext,
  xenMemoryRegion,
} from "../../protocol/mod.ts";
import { hex, toHex } from "./hex.ts";

const xenWire: WireContext = { xenMmap: true };

/** Bytes and value are each other's image, both ways. */
function vector<T>(
  codec: Codec<T>,
  text: string,
  value: T,
  context: WireContext = plainWire,
): void {
  const bytes = hex(text);
  assert.deepEqual(codec.decode(bytes, context), { ok: true, value });
  assert.equal(toHex(codec.encode(value, context)), toHex(bytes));
  assert.equal(typeof codec.describe(value), "string");
}

function refused<T>(
  codec: Codec<T>,
  bytes: Uint8Array,
  reason: RegExp,
  context: WireContext = plainWire,
): void {
  const decoded = codec.decode(bytes, context);
  assert.ok(!decoded.ok, `decoded ${toHex(bytes)}`);
  assert.match(decoded.reason, reason);
}

test("protocol: struct sizes and offsets are the specification's", () => {
  const offsets = (codec: { members: readonly { offset: number }[] }) =>
    codec.members.map(({ offset }) => offset);
  assert.equal(vringState.size, 8);
  assert.deepEqual(offsets(vringState), [0, 4]);
  assert.equal(vringAddress.size, 40);
  assert.deepEqual(offsets(vringAddress), [0, 4, 8, 16, 24, 32]);
  assert.equal(memoryRegion.size, 32);
  assert.deepEqual(offsets(memoryRegion), [0, 8, 16, 24]);
  assert.equal(xenMemoryRegion.size, 40);
  assert.deepEqual(offsets(xenMemoryRegion), [0, 8, 16, 24, 32, 36]);
  assert.equal(logDescription.size, 16);
  assert.deepEqual(offsets(logDescription), [0, 8]);
  assert.equal(iotlbMessage.size, 32);
  assert.deepEqual(offsets(iotlbMessage), [0, 8, 16, 24, 25]);
  assert.equal(inflightDescription.size, 24);
  assert.deepEqual(offsets(inflightDescription), [0, 8, 16, 18]);
  assert.equal(deviceStateTransfer.size, 8);
  assert.equal(shmemMapping.size, 40);
  assert.deepEqual(offsets(shmemMapping), [0, 8, 16, 24, 32]);
});

test("protocol: payload size ranges are the specification's", () => {
  const ranges = Object.fromEntries(
    Object.entries(payloadCodecs).map((
      [kind, { minSize, maxSize }],
    ) => [kind, [minSize, maxSize]]),
  );
  assert.deepEqual(ranges, {
    none: [0, 0],
    u64: [8, 8],
    vringState: [8, 8],
    vringAddress: [40, 40],
    vringDescriptorIndex: [8, 8],
    memoryTable: [8, 328],
    singleMemoryRegion: [40, 48],
    logBase: [8, 16],
    iotlb: [32, 32],
    config: [12, 268],
    cryptoSession: [1072, 1072],
    vringArea: [24, 24],
    inflight: [24, 24],
    uuid: [16, 16],
    deviceStateTransfer: [8, 8],
    shmemMapping: [40, 40],
    shmemConfig: [2056, 2056],
  });
});

test("protocol: no payload is zero bytes", () => {
  vector(noPayload, "", null);
  refused(noPayload, hex("00"), /empty payload has 1 bytes, needs 0/);
});

test("protocol: u64 keeps all 64 bits", () => {
  vector(u64Payload, "0100000000000000", 1n);
  vector(u64Payload, "ffffffffffffffff", 0xffff_ffff_ffff_ffffn);
});

test("protocol: vring state keeps a 32-bit index", () => {
  vector(vringState, "02000000 80000000", { index: 2, num: 128 });
  // CVE-2020-10723: an index of 0x10000 must not come out as 0.
  vector(vringState, "00000100 00000080", {
    index: 0x10000,
    num: 0x8000_0000,
  });
});

test("protocol: vring address has used before available", () => {
  vector(
    vringAddress,
    "01000000 01000000 0010000000000000 0020000000000000" +
      "0030000000000000 f0debc9a78563412",
    {
      index: 1,
      flags: 1,
      descriptor: ringAddress(0x1000n),
      used: ringAddress(0x2000n),
      available: ringAddress(0x3000n),
      log: gpa(0x1234_5678_9abc_def0n),
    },
  );
});

test("protocol: vring descriptor index is 8 bits, bit 8 is nofd", () => {
  vector(vringDescriptorIndex, "0300000000000000", {
    index: 3,
    hasDescriptor: true,
    reserved: 0n,
  });
  vector(vringDescriptorIndex, "ff01000000000000", {
    index: 255,
    hasDescriptor: false,
    reserved: 0n,
  });
  vector(vringDescriptorIndex, "0002000000000080", {
    index: 0,
    hasDescriptor: true,
    reserved: 0x8000_0000_0000_0200n,
  });
  assert.throws(
    () =>
      vringDescriptorIndex.encode(
        { index: 256, hasDescriptor: true, reserved: 0n },
        plainWire,
      ),
    RangeError,
  );
});

const regionText =
  "0000000001000000 0000100000000000 00f0ffffff7f0000 0010000000000000";
const region = {
  gpa: gpa(0x1_0000_0000n),
  size: 0x10_0000n,
  uva: uva(0x7fff_ffff_f000n),
  mmapOffset: 0x1000n,
  xen: null,
};
const xenText = regionText + "02000000 07000000";
const xenRegion = { ...region, xen: { flags: 2, domid: 7 } };

test("protocol: memory table is 8 + 32n bytes", () => {
  vector(memoryTable, "00000000 00000000", []);
  vector(memoryTable, "01000000 00000000" + regionText, [region]);
  vector(memoryTable, "08000000 00000000" + regionText.repeat(8), [
    ...Array.from({ length: 8 }, () => region),
  ]);
});

test("protocol: memory table is 8 + 40n bytes with XEN_MMAP", () => {
  vector(
    memoryTable,
    "02000000 00000000" + xenText.repeat(2),
    [xenRegion, xenRegion],
    xenWire,
  );
  refused(
    memoryTable,
    hex("01000000 00000000" + regionText),
    /40 bytes, needs 48 for 1 regions/,
    xenWire,
  );
});

test("protocol: memory table whose count and bytes differ is refused", () => {
  const two = "00000000" + regionText.repeat(2);
  refused(memoryTable, hex("01000000" + two), /needs 40 for 1 regions/);
  refused(memoryTable, hex("03000000" + two), /needs 104 for 3 regions/);
  refused(memoryTable, hex("00000000" + two), /needs 8 for 0 regions/);
  refused(
    memoryTable,
    hex("09000000 00000000" + regionText.repeat(9)),
    /9 regions, limit is 8/,
  );
  refused(memoryTable, hex("ffffffff 00000000"), /4294967295 regions/);
  refused(memoryTable, hex("01000000"), /4 bytes, needs 8 or more/);
  refused(
    memoryTable,
    hex("01000000 00000000" + regionText + "00"),
    /41 bytes, needs 40/,
  );
});

test("protocol: single memory region has 8 bytes of padding", () => {
  vector(singleMemoryRegion, "00".repeat(8) + regionText, region);
  vector(singleMemoryRegion, "00".repeat(8) + xenText, xenRegion, xenWire);
  refused(singleMemoryRegion, hex(regionText), /32 bytes, needs 40/);
  refused(
    singleMemoryRegion,
    hex("00".repeat(8) + xenText),
    /48 bytes, needs 40/,
  );
});

test("protocol: padding from the peer is ignored", () => {
  const decoded = singleMemoryRegion.decode(
    hex("ff".repeat(8) + regionText),
    plainWire,
  );
  assert.deepEqual(decoded, { ok: true, value: region });
});

test("protocol: log base is a log description or a bare u64", () => {
  vector(logBase, "0010000000000000 0020000000000000", {
    kind: "log",
    mmapSize: 0x1000n,
    mmapOffset: 0x2000n,
  });
  vector(logBase, "0010000000000000", { kind: "u64", base: 0x1000n });
  refused(logBase, new Uint8Array(12), /12 bytes, needs 8 or 16/);
});

test("protocol: iotlb message is 26 bytes padded to 32", () => {
  vector(
    iotlbMessage,
    "0010000000000000 0002000000000000 00a0000000000000 03 02 000000000000",
    {
      iova: iova(0x1000n),
      size: 0x200n,
      uva: uva(0xa000n),
      permission: IotlbPermission.READ_WRITE,
      type: IotlbType.UPDATE,
    },
  );
  refused(iotlbMessage, new Uint8Array(26), /26 bytes, needs 32/);
});

test("protocol: config is 12 bytes and its data", () => {
  vector(configPayload, "04000000 03000000 01000000 aabbcc", {
    offset: 4,
    flags: 1,
    data: hex("aabbcc"),
  });
  vector(configPayload, "04000000 00000000 00000000", {
    offset: 4,
    flags: 0,
    data: new Uint8Array(0),
  });
  refused(configPayload, hex("0000000001000000000000"), /11 bytes/);
  refused(
    configPayload,
    hex("00000000 04000000 00000000 aabbcc"),
    /15 bytes, needs 12 \+ size 4/,
  );
  refused(configPayload, hex("00000000 ffffffff 00000000"), /4294967295/);
  refused(configPayload, new Uint8Array(269), /269 bytes, needs 12 to 268/);
  assert.throws(() =>
    configPayload.encode(
      { offset: 0, flags: 0, data: new Uint8Array(257) },
      plainWire,
    ), RangeError);
});

test("protocol: config struct sent whole, as SPDK does, is accepted", () => {
  const bytes = new Uint8Array(268);
  bytes.set(hex("20000000 01000000 00000000 01 ff"));
  assert.deepEqual(configPayload.decode(bytes, plainWire), {
    ok: true,
    value: { offset: 32, flags: 0, data: hex("01") },
  });
});

test("protocol: decoded bytes are a copy of the receive buffer", () => {
  const bytes = hex("00000000 01000000 00000000 aa");
  const config = configPayload.decode(bytes, plainWire);
  const uuidBytes = new Uint8Array(16);
  const uuid = sharedUuid.decode(uuidBytes, plainWire);
  bytes.fill(0xff);
  uuidBytes.fill(0xff);
  assert.ok(config.ok && uuid.ok);
  assert.deepEqual(config.value.data, hex("aa"));
  assert.deepEqual(uuid.value, new Uint8Array(16));
});

test("protocol: decoding a subarray reads at its own offset", () => {
  const buffer = hex("ffffff 02000000 80000000 ff");
  assert.deepEqual(vringState.decode(buffer.subarray(3, 11), plainWire), {
    ok: true,
    value: { index: 2, num: 128 },
  });
});

test("protocol: vring area holds index, nofd, size, offset", () => {
  vector(vringArea, "0201000000000000 0010000000000000 0030000000000000", {
    vring: { index: 2, hasDescriptor: false, reserved: 0n },
    size: 0x1000n,
    offset: 0x3000n,
  });
});

test("protocol: inflight description is 20 bytes padded to 24", () => {
  vector(
    inflightDescription,
    "0010000000000000 0000000000000000 0400 8000 00000000",
    { mmapSize: 0x1000n, mmapOffset: 0n, numQueues: 4, queueSize: 128 },
  );
  refused(inflightDescription, new Uint8Array(20), /20 bytes, needs 24/);
});

test("protocol: shared object is a UUID of 16 bytes", () => {
  const text = "00112233445566778899aabbccddeeff";
  vector(sharedUuid, text, hex(text));
  assert.throws(
    () => sharedUuid.encode(new Uint8Array(15), plainWire),
    RangeError,
  );
});

test("protocol: device state transfer is direction and phase", () => {
  vector(deviceStateTransfer, "01000000 00000000", {
    direction: 1,
    phase: 0,
  });
});

test("protocol: mmap pads 7 bytes after shmid", () => {
  vector(
    shmemMapping,
    "05 00000000000000 0010000000000000 0020000000000000" +
      "0030000000000000 0100000000000000",
    {
      shmid: 5,
      fdOffset: 0x1000n,
      shmOffset: 0x2000n,
      size: 0x3000n,
      flags: 1n,
    },
  );
});

test("protocol: shmem config lists 256 sizes by shmid", () => {
  const sizes = Array.from({ length: 256 }, () => 0n);
  sizes[1] = 0x1000n;
  sizes[255] = 0x2000n;
  vector(
    shmemConfig,
    "02000000 00000000" + "00".repeat(8) + "0010000000000000" +
      "00".repeat(8 * 253) + "0020000000000000",
    { regionCount: 2, sizes },
  );
  assert.equal(
    toHex(shmemConfig.encode({ regionCount: 0, sizes: [] }, plainWire)),
    "00".repeat(2056),
  );
});

test("protocol: every codec answers every size without an exception", () => {
  for (const [kind, codec] of Object.entries(payloadCodecs)) {
    const { minSize, maxSize } = codec;
    for (const context of [plainWire, xenWire]) {
      for (const fill of [0x00, 0x01, 0x7f, 0xff]) {
        const sizes = [0, 1, 7, 8, 9, minSize - 1, minSize, minSize + 1];
        sizes.push(maxSize - 1, maxSize, maxSize + 1, 4096);
        for (const size of sizes) {
          if (size < 0) continue;
          const bytes = new Uint8Array(size).fill(fill);
          const decoded = codec.decode(bytes, context);
          if (size < minSize || size > maxSize) {
            assert.equal(decoded.ok, false, `${kind} of ${size} bytes`);
          }
          if (!decoded.ok) assert.match(decoded.reason, /\d/);
        }
      }
    }
  }
});
