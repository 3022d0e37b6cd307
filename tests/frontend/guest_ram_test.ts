import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import { GuestAllocator } from "../../driver/guest_allocator.ts";
import { GuestRam } from "../../frontend/mod.ts";
import { isNode, test } from "../harness.ts";
import {
  guestMappingCount,
  withoutDescriptorLeak,
} from "../support/descriptors.ts";

test("the allocator joins freed pieces and keeps alignment", () => {
  const allocator = new GuestAllocator(4096);
  const a = allocator.allocate(10, 1);
  const b = allocator.allocate(100, 256);
  const c = allocator.allocate(3000, 16);
  assert.deepEqual([a, b, c], [0, 256, 368]);
  assert.equal(allocator.allocate(2000, 1), null);
  assert.equal(allocator.allocate(200, 1), 10);
  allocator.free(256, 100);
  allocator.free(0, 10);
  allocator.free(10, 200);
  allocator.free(368, 3000);
  assert.equal(allocator.allocate(4096, 4096), 0);
});

test("the allocator refuses to free what is free", () => {
  const allocator = new GuestAllocator(1024);
  const piece = allocator.allocate(64, 1)!;
  allocator.free(piece, 64);
  assert.throws(() => allocator.free(piece, 64), { code: "OPTION" });
  assert.throws(() => allocator.free(piece + 1, 8), { code: "OPTION" });
});

test("each region is its own file, at the offset and addresses it names", () => {
  const ram = new GuestRam([
    { size: 8192, gpa: 0x10000n, uva: 0x555n << 32n, mmapOffset: 4096 },
    { size: 5000 },
  ]);
  try {
    const [first, second] = ram.regions;
    assert.equal(second.gpa, 0x12000n);
    assert.notEqual(second.gpa as bigint, second.uva as bigint);
    assert.equal(ram.toUva(0x10010n), (0x555n << 32n) + 0x10n);
    ram.write(0x12000n, Uint8Array.of(1, 2, 3));
    assert.deepEqual([...second.bytes.subarray(0, 4)], [1, 2, 3, 0]);
    assert.equal(core.fileSize(first.fd), 4096 + 8192);
    assert.equal(core.fileSize(second.fd), 5000);
    assert.throws(() => ram.bytes(0x11fffn, 2), { code: "MEMORY" });
    assert.throws(() => ram.bytes(0n, 1), { code: "MEMORY" });
    assert.throws(() => ram.allocate(9000), { code: "MEMORY" });
    const inSecond = ram.allocate(100, 16, second);
    assert.ok(second.contains(inSecond, 100));
  } finally {
    ram.close();
  }
});

test("allocated memory is zero although it was used before", () => {
  const ram = new GuestRam([{ size: 4096 }]);
  try {
    const first = ram.allocate(64);
    ram.write(first, new Uint8Array(64).fill(7));
    ram.free(first, 64);
    assert.equal(ram.allocate(64), first);
    assert.deepEqual(ram.read(first, 64), new Uint8Array(64));
  } finally {
    ram.close();
  }
});

test("memory whose file shrinks reads as zeros here too", () => {
  const ram = new GuestRam([{ size: 1 << 20 }]);
  try {
    const view = ram.bytes(1n << 19n, 4096);
    view.fill(9);
    ram.regions[0].resizeFile(4096);
    assert.equal(view[100], 0);
    view[100] = 1;
    assert.equal(view[100], 1);
  } finally {
    ram.close();
  }
});

test("closing gives descriptors and mappings back", async () => {
  const mappings = guestMappingCount();
  await withoutDescriptorLeak(() => {
    const ram = new GuestRam([{ size: 4096 }, { size: 4096 }]);
    const view = ram.bytes(0n, 4096);
    ram.close();
    ram.close();
    if (isNode && typeof ArrayBuffer.prototype.transfer !== "function") return;
    assert.equal(view.length, 0);
    assert.equal(guestMappingCount(), mappings);
  });
});

test("a memory that cannot be made leaves nothing behind", async () => {
  await withoutDescriptorLeak(() => {
    assert.throws(() => new GuestRam([{ size: 4096 }, { size: -1 }]), {
      code: "SYSTEM",
    });
  });
});
