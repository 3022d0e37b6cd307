/** What the kernel and its driver see of a device served by VDUSE. */

import assert from "node:assert/strict";
import { readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  blkDevice,
  echoEnd,
  featureMask,
  memoryBacking,
  netDevice,
  registerTarget,
  requestOps,
  VirtioFeature,
  virtqueueFeatures,
} from "../../mod.ts";
import { header, Type } from "../devices/disk_guest.ts";
import { test } from "../harness.ts";
import { isUnmapped } from "../hostile/accounting.ts";
import { guestMappingCount } from "../support/descriptors.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { VduseModel } from "../support/vduse_model.ts";
import { deferred } from "../session/deferred.ts";
import { eventually, Signal, within } from "../support/wait.ts";
import { exerciseQueue } from "./pci_disk.ts";
import { exercise, withDisk } from "./vduse_disk.ts";
import {
  type MemoryKind,
  ModelDriver,
  needed,
  servingVduse,
} from "./vduse_served.ts";

const packed = featureMask(VirtioFeature.RING_PACKED);

test("the kernel is offered what it takes of a disk", () =>
  withDisk(({ device, kernel }) => {
    const { description, isAttached, queues } = device;
    assert.equal(kernel.created, 1);
    assert.equal(description.deviceId, 2);
    assert.equal(description.queueCount, 2);
    assert.equal(description.features & needed, needed);
    assert.equal(description.features & packed, packed);
    // Neither CONFIG_WCE nor what vhost-user has in those bits.
    const refused = featureMask(
      11,
      VirtioFeature.LOG_ALL,
      VirtioFeature.PROTOCOL_FEATURES,
    );
    assert.equal(description.features & refused, 0n);
    const config = new DataView(description.config.buffer);
    assert.equal(config.getBigUint64(0, true), 2048n);
    assert.deepEqual(queues.map(({ size }) => size), [256, 256]);
    assert.ok(isAttached);
    return Promise.resolve();
  }));

test("the kernel is offered packed rings only where they are asked for", () =>
  // A monitor that stops its guest is not told where they were.
  withDisk(({ device: { description } }) => {
    assert.equal(description.features & packed, 0n);
    return Promise.resolve();
  }, { packed: undefined }));

test("the kernel is offered a network card without what needs a control queue", async () => {
  const nic = netDevice({ end: echoEnd(), numQueues: 4 });
  await servingVduse({}, nic, ({ device: { description } }) => {
    assert.equal(description.deviceId, 1);
    assert.equal(description.queueCount, 2);
    assert.equal(description.features & needed, needed);
    const refused = featureMask(2, 17, 18, 19, 21, 22, 23);
    assert.equal(description.features & refused, 0n);
    // Nothing tells where a packed ring was, if requests are not tracked.
    assert.equal(description.features & packed, 0n);
    return Promise.resolve();
  });
  await nic.close();
});

for (const memory of ["window", "files"] as const satisfies MemoryKind[]) {
  for (const isPacked of [false, true]) {
    const rings = isPacked ? "packed" : "split";
    test(`${rings} rings work in ${memory}, and nothing is mapped after a reset`, () =>
      withDisk(async ({ device }) => {
        const before = guestMappingCount();
        const driver = await ModelDriver.probe(device, { memory, isPacked });
        await exercise(driver, 20);
        assert.ok(await device.setStatus(0));
        // Node 20 cannot empty its views, and keeps zero pages there.
        const own = driver.ram.regions.length;
        if (isUnmapped) assert.equal(guestMappingCount(), before + own);
        driver.close();
        const next = await ModelDriver.probe(device, { memory, isPacked });
        await exercise(next);
        next.close();
      }));
  }
}

test("a driver need not accept ACCESS_PLATFORM, and has to accept VERSION_1", () =>
  withDisk(
    async ({ device, errors }) => {
      // As QEMU without an IOMMU: its IOVAs are the guest's addresses.
      const refused = 1n << 33n;
      const driver = await ModelDriver.probe(device, {
        memory: "files",
        refused,
      });
      await exercise(driver);
      driver.close();
      assert.ok(await device.setStatus(0));
      device.driverFeatures &= ~(1n << 32n);
      assert.ok(!await device.setStatus(11));
      assert.match((await errors.next()).message, /it accepts/);
    },
    { errorsExpected: true },
  ));

test("interrupts that the kernel does not take yet are tried again", () =>
  withDisk(async ({ device }) => {
    const answered = deferred<void>();
    let isDriverOk = false;
    device.afterAnswer = () =>
      isDriverOk ? answered.promise : Promise.resolve();
    const probing = ModelDriver.probe(device);
    // From the last message on the kernel is slow to hear of its answer.
    const asked = new Signal();
    const { setStatus } = device;
    device.setStatus = (status) => {
      isDriverOk = status === 15;
      const done = setStatus.call(device, status);
      asked.notify();
      return done;
    };
    await asked.until(() => isDriverOk);
    await within(
      (async () => {
        while (device.queues[1].kick < 0) {
          await new Promise((resolve) => setImmediate(resolve));
        }
      })(),
      "the queues start",
    );
    // Nobody has sent anything: the only interrupt is that of the start.
    const queue = device.queues[0];
    let calls = 0;
    const { called } = queue;
    queue.called = () => {
      calls++;
      called();
    };
    answered.resolve();
    const driver = await within(probing, "DRIVER_OK");
    await eventually(() => calls > 0, "the interrupt has come");
    await exercise(driver);
    driver.close();
  }));

test("a queue that is made ready after DRIVER_OK starts then", () =>
  withDisk(async ({ device }) => {
    const driver = await ModelDriver.probe(device, { late: [1] });
    await exerciseQueue(driver.queues[0], 1);
    const waiting = exerciseQueue(driver.queues[1], 2);
    driver.makeReady(1);
    driver.queues[1].kick();
    await within(waiting, "the late queue");
    driver.close();
  }));

for (const isPacked of [false, true]) {
  test(`a ${isPacked ? "packed" : "split"} queue says where it is, and stays there until it is made ready anew`, () =>
    withDisk(async ({ device }) => {
      const driver = await ModelDriver.probe(device, { isPacked });
      await exerciseQueue(driver.queues[0], 1);
      const { isFailed, state } = await device.ask({
        kind: "getQueueState",
        queue: 0,
      });
      assert.ok(!isFailed);
      // Two requests of three descriptors each.
      const base = isPacked ? 0x8006_8006 : 2;
      assert.deepEqual(state, { queue: 0, base, isPacked });
      const again = await device.ask({ kind: "getQueueState", queue: 0 });
      assert.deepEqual(again.state, state);
      const waiting = exerciseQueue(driver.queues[0], 2);
      await exerciseQueue(driver.queues[1], 3);
      assert.equal(driver.queues[0].inFlight, 1);
      // Not ready, and ready again from there.
      device.queues[0].info = undefined;
      const { looks } = device.queues[0];
      await eventually(() => device.queues[0].looks > looks, "it is noticed");
      driver.makeReady(0, base);
      await within(waiting, "the queue goes on");
      driver.close();
    }));
}

test("a disk that grows tells the kernel and its driver", async () => {
  const disk = blkDevice({ backing: memoryBacking(1 << 20) });
  await servingVduse({}, disk, async ({ device }) => {
    const driver = await ModelDriver.probe(device);
    const calls = device.configCalls;
    await disk.resize(2 << 20);
    // Behind it in the order of what is done for the kernel.
    await device.ask({ kind: "updateIotlb", start: 0n, last: 0n });
    assert.equal(
      new DataView(device.config.buffer).getBigUint64(0, true),
      4096n,
    );
    assert.equal(device.configCalls, calls + 1);
    driver.close();
  });
  await disk.close();
});

/** A device that keeps what it is asked until it is told to go on. */
function slowDevice() {
  const asked = new Signal();
  let count = 0;
  let isHeld = true;
  const released = deferred<void>();
  return {
    options: {
      features: virtqueueFeatures,
      deviceType: "block",
      queueCount: 1,
      device: () => ({
        ...requestOps(async (request) => {
          count++;
          asked.notify();
          if (isHeld) await released.promise;
          return request.write(request.read());
        }),
        getConfig: () => new Uint8Array(8),
      }),
    },
    taken: (wanted: number) => asked.until(() => count >= wanted),
    release() {
      isHeld = false;
      released.resolve();
    },
  };
}

test("a reset waits for what the device has in flight", async () => {
  const slow = slowDevice();
  await servingVduse({}, slow.options, async ({ device }) => {
    const driver = await ModelDriver.probe(device);
    const request = driver.queues[0].submit({
      readable: [Uint8Array.of(1, 2, 3)],
      writable: [3],
    });
    await slow.taken(1);
    let isReset = false;
    const reset = device.setStatus(0).then(() => isReset = true);
    // Time for an answer that would be too early.
    await new Promise((resolve) => setTimeout(resolve, 20));
    assert.ok(!isReset);
    slow.release();
    await within(reset, "the reset");
    await within(request, "the request");
    driver.close();
  });
});

test("a device that stays is taken up by the next target, with nothing lost", async () => {
  const kernel = new VduseModel();
  let driver: ModelDriver | undefined;
  await withDisk(
    async (served) => {
      const { device, options, target } = served;
      driver = await ModelDriver.probe(device);
      await exercise(driver);
      await target.unregister();
      assert.ok(device.isAttached);
      assert.equal(kernel.devices.get(options.address), device);
      // Sent while nobody serves.
      const waiting = exercise(driver);
      const disk = blkDevice({ backing: memoryBacking(1 << 20), numQueues: 2 });
      const next = await registerTarget({ ...disk, ...options, stay: false });
      await within(waiting, "what waited");
      await exercise(driver);
      assert.equal(kernel.created, 1);
      driver.close();
      await next.unregister();
      await disk.close();
      assert.equal(kernel.devices.size, 0);
    },
    { kernel, stay: true },
  );
});

test("a device that a virtual machine runs with is not detached, and waits for the next target", async () => {
  const kernel = new VduseModel();
  kernel.driver = "vhost_vdpa";
  await withDisk(
    async ({ device, options, target, errors }) => {
      const driver = await ModelDriver.probe(device, { memory: "files" });
      await exercise(driver);
      await target.unregister();
      assert.match((await errors.next()).message, /waits for the next process/);
      assert.ok(device.isAttached);
      const waiting = exercise(driver);
      const disk = blkDevice({ backing: memoryBacking(1 << 20), numQueues: 2 });
      const next = await registerTarget({ ...disk, ...options });
      await within(waiting, "what waited");
      assert.equal(kernel.created, 1);
      // Once the machine has let go of it, it goes.
      assert.ok(await device.setStatus(0));
      driver.close();
      await next.unregister();
      await disk.close();
      assert.equal(kernel.devices.size, 0);
    },
    { kernel, errorsExpected: true },
  );
});

for (const isPacked of [false, true]) {
  test(`what a ${isPacked ? "packed" : "split"} queue had in flight is done by the next target, once`, async () => {
    const kernel = new VduseModel();
    const taken = new Signal();
    let count = 0;
    // Answers nothing, and lets go when it is told to.
    const hanging = blkDevice({
      numQueues: 2,
      backing: {
        size: 1 << 20,
        read(_offset, _into, signal) {
          count++;
          taken.notify();
          return new Promise((_, reject) => {
            signal.addEventListener("abort", () => reject(new Error("ended")));
          });
        },
        write: () => Promise.resolve(),
      },
    });
    const options = { kernel, stay: true };
    await servingVduse(options, hanging, async (served) => {
      const { device, target } = served;
      const driver = await ModelDriver.probe(device, { isPacked });
      const used: number[] = [];
      driver.queues[0].onUsed = ({ id }) => used.push(id);
      const reads = Array.from(
        { length: 5 },
        (_, i) =>
          driver.queues[0].submit({
            readable: [header(Type.IN, i)],
            writable: [512, 1],
          }),
      );
      await taken.until(() => count === 5);
      await within(target.unregister(), "unregister");
      assert.deepEqual(used, []);
      const disk = blkDevice({
        backing: memoryBacking(1 << 20),
        numQueues: 2,
      });
      const next = await registerTarget({
        ...disk,
        features: hanging.features,
        ...served.options,
        stay: false,
      });
      const done = await within(Promise.all(reads), "the reads");
      assert.deepEqual(done.map(({ data }) => data[1][0]), [0, 0, 0, 0, 0]);
      assert.equal(new Set(used).size, 5);
      assert.equal(used.length, 5);
      await exercise(driver);
      await next.unregister();
      driver.close();
      await disk.close();
    });
    await hanging.close();
  });
}

for (const memory of ["window", "files"] as const) {
  test(`a device whose requests are not tracked goes on where its used ring in ${memory} is`, async () => {
    const slow = slowDevice();
    slow.release();
    const kernel = new VduseModel();
    await servingVduse({ kernel, stay: true }, slow.options, async (served) => {
      const { device, target, options } = served;
      const driver = await ModelDriver.probe(device, { memory });
      assert.equal(device.driverFeatures & packed, 0n);
      const echo = async (text: string) => {
        const bytes = new TextEncoder().encode(text);
        const request = driver.queues[0].submit({
          readable: [bytes],
          writable: [bytes.length],
        });
        const { data } = await within(request, text);
        assert.deepEqual(data[0], bytes);
      };
      for (const text of ["one", "two", "three"]) await echo(text);
      await target.unregister();
      const waiting = echo("four");
      const next = await registerTarget({
        ...slow.options,
        ...options,
        stay: false,
      });
      await waiting;
      await echo("five");
      assert.equal(driver.queues[0].usedCount, 5);
      await next.unregister();
      driver.close();
    });
  });
}

test("the log is for this user alone, and goes with the device", () =>
  withDisk(async ({ options, target }) => {
    const folder = options.runtimeFolder!;
    const [name] = readdirSync(folder);
    assert.equal(name, `${options.address}.vduse`);
    assert.equal(statSync(join(folder, name)).mode & 0o777, 0o600);
    await target.unregister();
    assert.deepEqual(readdirSync(folder), []);
  }));

test("a device of that name that is another one is replaced, or left where it is attached", async () => {
  for (const isAttached of [false, true]) {
    const kernel = new VduseModel();
    kernel.create("taken", {
      deviceId: 2,
      features: 0n,
      queueCount: 1,
      queueSize: 8,
      config: new Uint8Array(8),
    });
    kernel.devices.get("taken")!.isAttached = isAttached;
    const serving = withDisk(({ device }) => {
      assert.equal(device.description.queueCount, 2);
      return Promise.resolve();
    }, { kernel, address: "taken" });
    if (isAttached) {
      await assert.rejects(
        serving,
        /taken: it is attached.*vdpa dev del taken/,
      );
      assert.ok(kernel.devices.has("taken"), "it is not ours to destroy");
    } else await serving;
  }
});

test("a kernel that creates no device leaves no log", async () => {
  using folder = new TemporaryFolder();
  const kernel = new VduseModel();
  kernel.create = () => {
    throw new Error("no more");
  };
  await assert.rejects(
    withDisk(() => Promise.resolve(), { kernel, runtimeFolder: folder.path }),
    /no more/,
  );
  assert.deepEqual(readdirSync(folder.path), []);
});

test("a driver that is missing is told of", async () => {
  const kernel = new VduseModel();
  kernel.driver = null;
  await withDisk(async ({ errors }) => {
    assert.match((await errors.next()).message, /modprobe virtio_vdpa/);
  }, { kernel });
});

test("what the kernel cannot be asked for is refused with the reason", async () => {
  const disk = blkDevice({ backing: memoryBacking(1 << 20) });
  const kernel = new VduseModel();
  const base = { transport: "VDUSE", address: "a", kernel, ...disk } as const;
  const cases = [
    [{ ...base, deviceType: undefined }, /deviceType: undefined .*block, net/],
    [{ ...base, deviceType: "gpu" }, /deviceType: gpu/],
    [{ ...base, address: "control" }, /name of a VDUSE device: control/],
    [{ ...base, address: "../a" }, /name of a VDUSE device: \.\.\/a/],
    [{ ...base, address: "a".repeat(201) }, /name of a VDUSE device/],
    [{ ...base, queueSize: 100 }, /queueSize: 100/],
  ] as const;
  for (const [options, message] of cases) {
    await assert.rejects(registerTarget(options), message);
  }
  assert.equal(kernel.devices.size, 0);
  await disk.close();
});

test("a log that says anything at all is no way in", async () => {
  const kernel = new VduseModel();
  await withDisk(async ({ device, options, target, errors }) => {
    const driver = await ModelDriver.probe(device, { isPacked: false });
    await exercise(driver);
    await target.unregister();
    const path = join(options.runtimeFolder!, `${options.address}.vduse`);
    const good = new Uint8Array(readFileSync(path));
    const disk = blkDevice({ backing: memoryBacking(1 << 20), numQueues: 2 });
    for (const bytes of damaged(good)) {
      writeFileSync(path, bytes);
      const serving = registerTarget({
        ...disk,
        ...options,
        onError: errors.push,
      });
      // Another device's, or none: refused as a whole.
      const next = await serving.catch((error: Error) => error);
      if (next instanceof Error) {
        assert.match(next.message, /it is attached, and another one/);
        continue;
      }
      assert.match((await errors.next()).message, /Cannot/);
      await next.unregister();
    }
    writeFileSync(path, good);
    const next = await registerTarget({ ...disk, ...options });
    await exercise(driver);
    driver.close();
    await next.unregister();
    await disk.close();
  }, { kernel, stay: true, errorsExpected: true });
});

function* damaged(good: Uint8Array): Generator<Uint8Array> {
  yield new Uint8Array(0);
  yield good.slice(0, 100);
  for (const at of [0, 8, 12, 16, 24, 28]) yield changed(good, at, 0xff);
  // The run, and the region shorter than it has to be.
  yield changed(good, 32, 0);
  yield changed(good, 32, 2);
  yield changed(good, 32, 200);
  yield good.slice(0, 4096);
  yield good.slice(0, 5000);
  // The region's version, size and used index.
  yield changed(good, 4096 + 8, 9);
  yield changed(good, 4096 + 10, 3);
  yield changed(good, 4096 + 15, 0x55);
}

function changed(good: Uint8Array, at: number, value: number): Uint8Array {
  const bytes = good.slice();
  bytes[at] = value;
  return bytes;
}
