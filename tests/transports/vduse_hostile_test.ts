/** What the kernel, or whoever is behind it, may do wrong. */

import assert from "node:assert/strict";
import { GuestRam } from "../../driver/guest_ram.ts";
import { test } from "../harness.ts";
import { isUnmapped } from "../hostile/accounting.ts";
import { deferred } from "../session/deferred.ts";
import { guestMappingCount } from "../support/descriptors.ts";
import { type Asked, VduseModel } from "../support/vduse_model.ts";
import { eventually, within } from "../support/wait.ts";
import { exerciseQueue } from "./pci_disk.ts";
import { exercise, withDisk } from "./vduse_disk.ts";
import { entryOf, ModelDriver } from "./vduse_served.ts";

test("messages that are unknown or make no sense are refused, and change nothing", () =>
  withDisk(
    async ({ device, errors }) => {
      const refused = async (asked: Asked, reason: RegExp) => {
        const { isFailed } = await within(device.ask(asked), reason.source);
        assert.ok(isFailed, reason.source);
        assert.match((await errors.next()).message, reason);
      };
      // Nobody has set anything up.
      const early = await device.ask({ kind: "getQueueState", queue: 1 });
      assert.deepEqual(early.state, { queue: 1, base: 0, isPacked: false });
      assert.ok(
        !(await device.ask({ kind: "updateIotlb", start: 0n, last: ~0n }))
          .isFailed,
      );
      await refused({ kind: "setStatus", status: 15 }, /it accepts 0x0 /);
      device.driverFeatures = device.description.features | 1n << 50n;
      await refused({ kind: "setStatus", status: 11 }, /it accepts/);
      await refused({ kind: "unknown", number: 77 }, /message 77/);
      const driver = await ModelDriver.probe(device);
      await exercise(driver);
      await refused({ kind: "unknown", number: 3 }, /message 3/);
      await refused({ kind: "getQueueState", queue: 2 }, /queue 2/);
      await refused(
        { kind: "getQueueState", queue: 0xffff_ffff },
        /queue 4294967295/,
      );
      // Again, and more than a byte has.
      for (const status of [15, 15, 0x4f, 7]) {
        assert.ok(await device.setStatus(status));
      }
      await exercise(driver);
      assert.ok(await device.setStatus(0) && await device.setStatus(0));
      driver.close();
    },
    { errorsExpected: true },
  ));

test("queues that cannot be are refused, and the others work", () =>
  withDisk(
    async ({ device, errors }) => {
      const change = (fields: Record<string, unknown>) => {
        const queue = device.queues[0];
        queue.info = { ...queue.info!, ...fields };
      };
      const cases: [Record<string, unknown>, RegExp][] = [
        [{ size: 0 }, /refuses SET_VRING_NUM/],
        [{ size: 100 }, /refuses SET_VRING_NUM/],
        [{ size: 0xffff_ffff }, /refuses SET_VRING_NUM/],
        [{ base: 0x1_0000 }, /refuses SET_VRING_BASE/],
        [{ descriptor: 1n }, /refuses SET_VRING_ADDR/],
        [{ device: ~0n & ((1n << 64n) - 4n) }, /refuses SET_VRING_ADDR/],
        // More than the log has room for.
        [{ size: 32768 }, /./],
      ];
      for (const [fields, reason] of cases) {
        const driver = await ModelDriver.probe(device, {
          isPacked: false,
          late: [0],
        });
        driver.makeReady(0);
        change(fields);
        await exerciseQueue(driver.queues[1], 1);
        let said = "";
        while (!reason.test(said)) said = (await errors.next()).message;
        await device.setStatus(0);
        driver.close();
      }
      const driver = await ModelDriver.probe(device);
      await exercise(driver);
      driver.close();
    },
    { errorsExpected: true },
  ));

test("IOTLB entries that do not fit are refused; the driver may begin anew", () =>
  withDisk(
    async ({ device, errors }) => {
      const ram = new GuestRam([{ gpa: 0n, size: 1 << 20 }]);
      const good = entryOf(ram, 0, false);
      const largest = (1n << 64n) - 1n;
      const cases = [
        // Empty, or backwards for whoever walks through them.
        [{ ...good, start: 1n << 20n, last: 0n }],
        // All addresses: longer than 64 bits say.
        [{ ...good, last: largest }],
        // Past the end of its file, and of any file.
        [{ ...good, offset: 4096n }],
        [{ ...good, offset: largest - 4095n }],
        [{ ...good, last: (1n << 40n) - 1n }],
        // Two in one place.
        [good, { ...good, start: 4096n, last: (1n << 21n) - 1n }],
        // The kernel's own memory where it has none.
        [{ ...good, isDomain: true, offset: 4096n }],
        [{ ...good, isDomain: true, last: 1n << 40n }],
        // More than there can be.
        Array.from({ length: 600 }, (_, i) => ({
          ...good,
          start: BigInt(i) * 8192n,
          last: BigInt(i) * 8192n + 4095n,
          offset: 0n,
        })),
      ];
      for (const [index, entries] of cases.entries()) {
        // At DRIVER_OK, and while queues run.
        const driver = await ModelDriver.probe(device, { memory: "files" });
        await exercise(driver);
        device.entries = entries;
        const { isFailed } = await within(
          device.ask({ kind: "updateIotlb", start: 0n, last: largest }),
          `case ${index}`,
        );
        assert.ok(isFailed, `case ${index} while queues run`);
        await device.setStatus(0);
        device.driverFeatures = device.description.features;
        assert.equal(await device.setStatus(15), false, `case ${index}`);
        await device.setStatus(0);
        driver.close();
      }
      assert.ok(errors.pending.length >= 2 * cases.length);
      const driver = await ModelDriver.probe(device, { memory: "files" });
      await exercise(driver);
      driver.close();
      ram.close();
    },
    { errorsExpected: true },
  ));

test("what the guest may not both read and write is left out", () =>
  withDisk(async ({ device }) => {
    const driver = await ModelDriver.probe(device, { memory: "files" });
    await exercise(driver);
    const rom = new GuestRam([{ gpa: 1n << 40n, size: 4096 }]);
    const before = guestMappingCount();
    for (const access of [0, 1, 2, 255]) {
      device.entries = [
        ...device.entries.slice(0, 2),
        { ...entryOf(rom, 0, false), access },
      ];
      const all = { start: 0n, last: (1n << 64n) - 1n };
      const { isFailed } = await device.ask({ kind: "updateIotlb", ...all });
      assert.ok(!isFailed);
      assert.equal(guestMappingCount(), before);
    }
    await exercise(driver);
    rom.close();
    driver.close();
  }));

test("memory that comes and goes while queues run is followed", () =>
  withDisk(async ({ device }) => {
    const driver = await ModelDriver.probe(device, { memory: "files" });
    const [rings] = device.entries;
    const all = { start: 0n, last: (1n << 64n) - 1n };
    await exercise(driver);
    device.entries = [rings];
    await device.ask({ kind: "updateIotlb", ...all });
    const before = guestMappingCount();
    for (let round = 0; round < 5; round++) {
      const more = new GuestRam([{ gpa: 1n << 40n, size: 8192 }]);
      device.entries = [rings, entryOf(more, 0, false)];
      const added = await device.ask({ kind: "updateIotlb", ...all });
      assert.ok(!added.isFailed);
      await exercise(driver);
      device.entries = [rings];
      const removed = await device.ask({ kind: "updateIotlb", ...all });
      assert.ok(!removed.isFailed);
      more.close();
      if (isUnmapped) assert.equal(guestMappingCount(), before);
      await exercise(driver);
    }
    driver.close();
  }));

/** All that a target and a driver do, in short; whether the device broke. */
async function life(callsLeft: number): Promise<boolean> {
  const kernel = new VduseModel();
  let wasBroken = false;
  let driver: ModelDriver | undefined;
  kernel.onAttach = async (device) => {
    device.callsLeft = callsLeft;
    try {
      driver = await ModelDriver.probe(device, { memory: "files" });
    } catch (error) {
      if (!device.isBroken) throw error;
    }
  };
  await withDisk(
    async ({ device, target }) => {
      if (driver !== undefined) {
        const steps = async () => {
          await exercise(driver!);
          device.entries = device.entries.slice(0, 1);
          await device.ask({ kind: "updateIotlb", start: 0n, last: 99n });
          await device.ask({ kind: "getQueueState", queue: 0 });
        };
        // Requests to a device that has broken never end.
        const broken = new Promise<void>((resolve) => device.onBreak = resolve);
        await Promise.race([steps(), device.isBroken ? undefined : broken]);
      }
      await within(target.unregister(), "unregister");
      wasBroken = device.isBroken;
      device.destroy();
      driver?.close();
    },
    { kernel, errorsExpected: true },
  );
  return wasBroken;
}

test(
  "a kernel that breaks the device at any call costs no descriptor and no mapping",
  async () => {
    let calls = 0;
    while (await life(calls)) {
      calls++;
      assert.ok(calls < 500, "a life ends");
    }
    assert.ok(calls > 20, `${calls} calls`);
  },
  300,
);

test("a device that is broken from the start is no target, and is gone", async () => {
  const kernel = new VduseModel();
  kernel.onCreate = (device) => device.callsLeft = 0;
  await assert.rejects(
    withDisk(() => assert.fail("it is served"), { kernel }),
    { name: "Vhost2Error", code: "SYSTEM", message: /it is broken/ },
  );
  assert.equal(kernel.devices.size, 0);
});

test("a broken device is detached, and a new one is there for the driver", async () => {
  const kernel = new VduseModel();
  kernel.onDetach = (device) => {
    device.isAttached = false;
    return Promise.resolve();
  };
  await withDisk(
    async ({ device, options, errors }) => {
      const driver = await ModelDriver.probe(device);
      await exercise(driver);
      device.break();
      assert.match((await errors.next()).message, /it is broken/);
      const isNew = () => {
        const now = kernel.devices.get(options.address);
        return now !== undefined && now !== device && now.isAttached;
      };
      await eventually(isNew, "a new device");
      device.destroy();
      driver.close();
      const next = await ModelDriver.probe(
        kernel.devices.get(options.address)!,
      );
      await exercise(next);
      next.close();
    },
    { kernel, errorsExpected: true },
  );
});

test("a target that is unregistered while a driver lets go of its broken device makes no other", async () => {
  const kernel = new VduseModel();
  const asked = deferred<void>();
  const hold = deferred<void>();
  kernel.onDetach = () => {
    asked.resolve();
    return hold.promise;
  };
  await withDisk(
    async ({ device, target, options }) => {
      const driver = await ModelDriver.probe(device);
      device.break();
      await within(asked.promise, "the driver is asked to let go");
      const unregistered = target.unregister();
      await eventually(() => target.devices.length === 0, "nobody is served");
      hold.resolve();
      await within(unregistered, "unregister");
      assert.equal(kernel.created, 1);
      assert.ok(!kernel.devices.has(options.address));
      device.destroy();
      driver.close();
    },
    { kernel, errorsExpected: true },
  );
});

test("a device that broke while nobody served it is detached, and made anew", async () => {
  const kernel = new VduseModel();
  kernel.onDetach = () => Promise.resolve();
  await withDisk(
    async ({ device, target, options }) => {
      const driver = await ModelDriver.probe(device);
      await target.unregister();
      device.break();
      device.destroy();
      driver.close();
      await withDisk(
        async (next) => {
          assert.notEqual(next.device, device);
          const driver = await ModelDriver.probe(next.device);
          await exercise(driver);
          driver.close();
        },
        { ...options, kernel, stay: false },
      );
    },
    { kernel, stay: true },
  );
});

test("a guest that takes its memory away costs itself its requests; the device is taken up again", () =>
  withDisk(
    async ({ device, errors, kernel }) => {
      const driver = await ModelDriver.probe(device, { memory: "files" });
      await exercise(driver);
      driver.ram.regions[0].resizeFile(0);
      driver.queues[0].kick();
      assert.match((await errors.next()).message, /took guest memory away/);
      await eventually(() => device.isOpen, "taken up again");
      assert.ok(await within(device.setStatus(0), "a reset"));
      driver.close();
      const next = await ModelDriver.probe(device, { memory: "files" });
      await exercise(next);
      assert.equal(kernel.created, 1);
      next.close();
    },
    { errorsExpected: true },
  ));
