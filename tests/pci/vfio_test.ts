/** What is said when VFIO cannot hand a device out, and what it refuses. */

import assert from "node:assert/strict";
import { mkdirSync, readFileSync, symlinkSync } from "node:fs";
import { join } from "node:path";
import { constants } from "../../ffi/abi.gen.ts";
import { core } from "../../ffi/core.ts";
import { Errno } from "../../ffi/errors.ts";
import { IovaAllocator } from "../../pci/iova_allocator.ts";
import { bindToVfio, openVfioDevice, releaseFromVfio } from "../../pci/mod.ts";
import {
  iommuGroupOf,
  lockedMemoryLimit,
  obstaclesOf,
  pciAddress,
} from "../../pci/sysfs.ts";
import {
  dmaError,
  vfioError,
  type VfioFailure,
} from "../../pci/vfio_failure.ts";
import { test } from "../harness.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";
import { TemporaryFolder } from "../support/temporary.ts";

/** A /sys with devices in one IOMMU group. */
class FakeSystem {
  readonly #folder = new TemporaryFolder();
  readonly sys: string;
  readonly proc = "/proc";

  constructor() {
    this.sys = this.#folder.file("sys");
    mkdirSync(join(this.sys, "groups/7/devices"), { recursive: true });
    mkdirSync(join(this.sys, "bus/pci/devices"), { recursive: true });
    for (const driver of ["e1000", "vfio-pci"]) {
      mkdirSync(join(this.sys, "drivers", driver), { recursive: true });
    }
  }

  add(address: string, driver: string | null, group: number | null = 7): void {
    const folder = join(this.sys, "bus/pci/devices", address);
    mkdirSync(folder);
    if (driver !== null) {
      symlinkSync(join(this.sys, "drivers", driver), join(folder, "driver"));
    }
    if (group === null) return;
    symlinkSync(join(this.sys, `groups/${group}`), join(folder, "iommu_group"));
    symlinkSync(folder, join(this.sys, `groups/${group}/devices`, address));
  }

  /** What was written to a file of /sys. */
  written(path: string): string {
    return readFileSync(join(this.sys, path), "utf8");
  }

  [Symbol.dispose](): void {
    this.#folder.remove();
  }
}

test("a device is taken from its driver and offered to vfio-pci, and back", () => {
  using system = new FakeSystem();
  system.add("0000:00:05.0", "e1000");
  const device = "bus/pci/devices/0000:00:05.0";
  // Nobody acts on what is written here: the driver stays.
  assert.throws(
    () => bindToVfio("00:05.0", system),
    /Cannot bind PCI device 0000:00:05\.0 to vfio-pci: the kernel has no vfio-pci: run "modprobe vfio-pci"/,
  );
  assert.equal(system.written(`${device}/driver_override`), "vfio-pci\n");
  assert.equal(system.written("drivers/e1000/unbind"), "0000:00:05.0");
  assert.equal(system.written("bus/pci/drivers_probe"), "0000:00:05.0");
  mkdirSync(join(system.sys, "bus/pci/drivers/vfio-pci"), { recursive: true });
  assert.throws(
    () => bindToVfio("00:05.0", system),
    /the kernel does not take it/,
  );
  assert.deepEqual(releaseFromVfio("00:05.0", system), {
    address: "0000:00:05.0",
    before: "e1000",
    after: "e1000",
  });
  assert.equal(system.written(`${device}/driver_override`), "\n");
  assert.throws(() => bindToVfio("00:06.0", system), /there is no such device/);
  assert.throws(() => bindToVfio("disk", system), { code: "OPTION" });
});

test("a device that vfio-pci has is left alone", () => {
  using system = new FakeSystem();
  system.add("0000:00:05.0", "vfio-pci");
  assert.equal(bindToVfio("00:05.0", system).after, "vfio-pci");
  assert.throws(() => system.written("bus/pci/drivers_probe"));
});

test("a PCI address is taken with and without its domain", () => {
  assert.equal(pciAddress("00:05.0"), "0000:00:05.0");
  assert.equal(pciAddress("0001:AF:1f.7"), "0001:af:1f.7");
  for (
    const text of ["", "5", "00:05", "00:05.8", "../../x", "0000:00:05.0 "]
  ) {
    assert.throws(() => pciAddress(text), { code: "OPTION" });
  }
});

test("a device that is not ready for VFIO is told from one that is", () => {
  using system = new FakeSystem();
  system.add("0000:00:05.0", "vfio-pci");
  system.add("0000:00:05.1", "e1000");
  system.add("0000:00:05.2", null);
  system.add("0000:00:05.3", "pcieport");
  system.add("0000:00:06.0", "vfio-pci", null);
  assert.equal(iommuGroupOf("0000:00:05.0", system), 7);
  assert.throws(
    () => iommuGroupOf("0000:00:05.1", system),
    /bound to e1000, not to vfio-pci: bind it \("vhost2 bind 0000:00:05.1"\)/,
  );
  assert.throws(() => iommuGroupOf("0000:00:05.2", system), /to no driver/);
  assert.throws(() => iommuGroupOf("0000:00:06.0", system), /no IOMMU group/);
  assert.throws(() => iommuGroupOf("0000:00:07.0", system), /no such device/);
  assert.deepEqual(obstaclesOf("0000:00:05.0", system), [
    "0000:00:05.1 (e1000)",
  ]);
  assert.deepEqual(obstaclesOf("0000:00:09.0", system), []);
});

test("each step that fails is one sentence with what to do", () => {
  const context = {
    address: "0000:00:05.0",
    group: 7,
    obstacles: ["0000:00:05.1 (e1000)"],
  };
  const say = (step: number, errno = 5, value = 0) => {
    const failure: VfioFailure = { step, errno, value };
    const error = vfioError(failure, context);
    assert.equal(error.code, "SYSTEM");
    assert.match(error.message, /^Cannot open PCI device 0000:00:05\.0: \S/);
    assert.doesNotMatch(error.message, /\. |undefined|\n/);
    return error.message;
  };
  const steps = Object.entries(constants).filter(([name, step]) =>
    name.startsWith("vfio") && name !== "vfioConfigRegion" && step <= 15
  );
  assert.equal(steps.length, 15);
  const sentences = steps.map(([, step]) => say(step));
  assert.equal(new Set(sentences).size, sentences.length);
  for (const [, step] of steps) {
    for (const errno of [0, 1, 2, 12, 13, 16, 19]) say(step, errno, 1);
  }
  assert.match(say(constants.vfioContainer, 2), /modprobe vfio-pci/);
  assert.match(say(constants.vfioGroup, 16), /group 7 is in use/);
  assert.match(
    say(constants.vfioGroupViable, 0),
    /not viable: also bind or unbind 0000:00:05\.1 \(e1000\)/,
  );
  assert.match(say(constants.vfioSetIommu, 1), /turn the IOMMU on/);
  assert.match(say(constants.vfioDeviceFd, 19), /bind it/);
});

test("memory that cannot be locked is told with the limit", () => {
  const limit = lockedMemoryLimit();
  assert.match(limit, /^(unlimited|[\d.]+ KiB)$/);
  assert.equal(lockedMemoryLimit({ sys: "/", proc: "/nowhere" }), "unknown");
  const message = dmaError("0000:00:05.0", 8192, 4096n, Errno.ENOMEM, limit)
    .message;
  assert.ok(message.includes(`(${limit})`), message);
  assert.match(message, /8192 bytes at I\/O address 0x1000.*ulimit -l/);
});

test("a device that cannot be opened leaves nothing open", () =>
  withoutDescriptorLeak(() => {
    assert.throws(() => openVfioDevice("ffff:ff:1f.7"), /no such device/);
    assert.throws(() => openVfioDevice("disk"), { code: "OPTION" });
    // Past the checks of /sys: no such group, or no VFIO at all.
    const failure = new Uint32Array(4);
    assert.ok(core.vfioGroupOpen(0xffff_ffff, failure) < 0);
    assert.ok(failure[0] > 0 && failure[1] > 0);
  }));

test("a handle that is none reaches nothing", () => {
  const bad = -Errno.EBADF;
  for (const handle of [0, 1, 0x10000, 0xffff_ffff]) {
    assert.equal(core.vfioRead(handle, 0, 0, 4), bad);
    assert.equal(core.vfioWrite(handle, 0, 0, 4, 1), bad);
    assert.equal(core.vfioMapRegisters(handle, 0, 4096), bad);
    assert.equal(
      core.vfioMapMemory(handle, 0, 0, 4096, new BigUint64Array(1)),
      bad,
    );
    assert.equal(core.vfioInterrupts(handle, 2, 0, null, 0), bad);
    assert.equal(core.vfioDmaMap(handle, 0n, 4096, 0n), bad);
    assert.equal(core.vfioDmaUnmap(handle, 4096, 0n), bad);
    assert.equal(core.vfioDeviceClose(handle), bad);
    assert.equal(core.vfioGroupClose(handle), bad);
  }
});

test("I/O addresses stay in the IOMMU's ranges and are used again", () => {
  const allocator = new IovaAllocator([
    { start: 0n, last: 0x10_1fffn },
    { start: 0xfef0_0000n, last: (1n << 64n) - 1n },
  ], 4096);
  const first = allocator.reserve(8192);
  assert.equal(first, 0x10_0000n);
  const second = allocator.reserve(4096);
  assert.equal(second, 0xfef0_0000n);
  allocator.release(first, 8192);
  assert.equal(allocator.reserve(8192), first);
  assert.throws(() => allocator.reserve(2 ** 47), { code: "MEMORY" });
  const none = new IovaAllocator([{ start: 0n, last: 0xfffn }], 4096);
  assert.throws(() => none.reserve(1), /the IOMMU has no such range free/);
});
