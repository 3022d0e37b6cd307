/** The virtio PCI driver against a model of a device. */

import assert from "node:assert/strict";
import { VirtioPciDevice, type VirtioPciOptions } from "../../pci/mod.ts";
import { test } from "../harness.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";
import {
  type VirtioModelOptions,
  VirtioPciModel,
} from "../support/virtio_pci_model.ts";
import { Events, within } from "../support/wait.ts";

const VERSION_1 = 1n << 32n;
const ACCESS_PLATFORM = 1n << 33n;
const PACKED = 1n << 34n;
const INDIRECT = 1n << 28n;
const EVENT_IDX = 1n << 29n;

/** Runs `body` with an open device; nothing is left afterwards. */
function withDevice(
  options: Partial<VirtioModelOptions>,
  body: (device: VirtioPciDevice, model: VirtioPciModel) => Promise<void>,
  driver: VirtioPciOptions = {},
): Promise<void> {
  return withModel(options, async (model) => {
    const device = await VirtioPciDevice.open(model, driver);
    try {
      await body(device, model);
    } finally {
      await device.close();
    }
    assert.equal(model.dma.count, 0, "DMA mappings are undone");
  });
}

function withModel(
  options: Partial<VirtioModelOptions>,
  body: (model: VirtioPciModel) => Promise<void>,
): Promise<void> {
  return withoutDescriptorLeak(async () => {
    const model = new VirtioPciModel({ deviceId: 0x1044, ...options });
    try {
      await body(model);
    } finally {
      model.close();
      await model.settled();
    }
  });
}

/** Answers each request with what it reads, reversed. */
function echo(model: VirtioPciModel): void {
  model.onRequest = (_, request) => {
    const bytes = request.read().reverse();
    request.complete(request.write(bytes));
  };
}

async function assertEcho(device: VirtioPciDevice, count = 300) {
  const queue = device.addQueue(0, 16);
  device.start();
  for (let round = 0; round < count; round += 20) {
    await within(
      Promise.all(Array.from({ length: 20 }, async (_, i) => {
        const bytes = Uint8Array.of(round & 0xff, i, 3);
        const { data, written } = await queue.submit({
          readable: [bytes],
          writable: [2, 2],
          indirect: i % 2 === 0 && (device.features & INDIRECT) !== 0n,
        });
        assert.equal(written, 3);
        assert.deepEqual([...data[0], data[1][0]], [3, i, round & 0xff]);
      })),
      "requests",
    );
  }
}

const rings: Record<string, bigint> = {
  "split": VERSION_1,
  "split, indirect, event index": VERSION_1 | INDIRECT | EVENT_IDX,
  "packed": VERSION_1 | PACKED,
  "packed, indirect, event index": VERSION_1 | PACKED | INDIRECT | EVENT_IDX,
};

for (const [name, features] of Object.entries(rings)) {
  test(`requests pass through a ${name} queue`, () =>
    withDevice({ features }, async (device, model) => {
      echo(model);
      assert.equal(device.features, features);
      await assertEcho(device);
    }, { packed: true }));
}

test("the device is initialised in the standard's order", () =>
  withDevice({}, async (device, model) => {
    echo(model);
    await assertEcho(device, 20);
    assert.deepEqual(model.statuses, [0, 1, 3, 11, 15]);
    assert.equal(device.type, 4);
    await device.close();
    assert.equal(model.statuses.at(-1), 0);
  }));

test("ACCESS_PLATFORM is taken, and packed rings only when asked for", () =>
  withDevice(
    { features: VERSION_1 | ACCESS_PLATFORM | PACKED | 0xffn },
    (device, model) => {
      assert.equal(device.features, VERSION_1 | ACCESS_PLATFORM | 5n);
      assert.equal(model.acked, device.features);
      return Promise.resolve();
    },
    { features: 5n | PACKED },
  ));

const interrupts: Record<string, Partial<VirtioModelOptions>> = {
  "a vector for each": { vectorCount: 16 },
  "one vector for all": { vectorCount: 1 },
  "the pin": { vectorCount: 0, hasPin: true },
  "no interrupt at all": { vectorCount: 0, hasPin: false },
};

for (const [name, options] of Object.entries(interrupts)) {
  test(`calls and configuration changes come by ${name}`, () =>
    withDevice(options, async (device, model) => {
      echo(model);
      await assertEcho(device, 60);
      const changes = new Events<number>();
      device.onConfigChange = () => changes.push(device.readConfig(0, 1));
      model.deviceConfig[0] = 77;
      model.notifyConfig();
      await changes.find((value) => value === 77);
      assert.ok(
        model.pinInterrupts <= model.signals,
        "the pin is let go of before it may interrupt again",
      );
    }));
}

test("a device that refuses vectors is looked at by time", () =>
  withModel({}, async (model) => {
    model.refusesVectors = true;
    echo(model);
    const device = await VirtioPciDevice.open(model);
    await assertEcho(device, 40);
    await device.close();
  }));

test("configuration is read again while it changes", () =>
  withDevice({ deviceConfig: new Uint8Array(4) }, (device, model) => {
    const bar = model.bars[0]!;
    let changes = 2;
    const { read } = bar;
    bar.read = (offset, width) => {
      // Between the first bytes and the last.
      if (offset === 0x202 && changes-- > 0) {
        model.deviceConfig.fill(changes + 8);
        model.generation++;
      }
      return read(offset, width);
    };
    assert.deepEqual([...device.readConfigBytes(0, 4)], [8, 8, 8, 8]);
    bar.read = (offset, width) => {
      if (offset === 21) model.generation = (model.generation + 1) & 0xff;
      return read(offset, width);
    };
    assert.throws(() => device.readConfigBytes(0, 4), /never stays the same/);
    assert.throws(() => device.readConfig(4, 1), /it has 4/);
    assert.throws(() => device.readConfig(3, 2), /it has 4/);
    assert.throws(() => device.readConfig(-1, 1), /it has 4/);
    device.writeConfig(1, 1, 9);
    assert.equal(model.deviceConfig[1], 9);
    return Promise.resolve();
  }));

test("a reset is awaited", () =>
  withModel({}, async (model) => {
    model.resetReads = 10;
    const device = await VirtioPciDevice.open(model);
    assert.equal(model.resetReads, 0);
    model.resetReads = 5;
    await device.close();
    assert.equal(model.resetReads, 0);
  }));

/** Every way in which opening is refused leaves nothing behind. */
const refusals: Record<
  string,
  { change: (model: VirtioPciModel) => void; message: RegExp }
> = {
  "another vendor's": {
    change: (model) => model.config[0] = 0x86,
    message: /1a86:1044 is no virtio device/,
  },
  "that offers no VERSION_1": {
    change: (model) =>
      Object.defineProperty(model, "features", { get: () => 1n }),
    message: /does not offer VERSION_1/,
  },
  "that refuses the features": {
    change: (model) => model.refusedFeatures = VERSION_1,
    message: /does not take the features/,
  },
  "that has gone": {
    change: (model) => model.isGone = true,
    message: /it has gone/,
  },
  "that goes during its reset": {
    change(model) {
      model.onReset = () => model.isGone = true;
    },
    message: /it has gone/,
  },
  "without capabilities": {
    change: (model) => model.config[6] = 0,
    message: /no common configuration capability/,
  },
  "whose capabilities are a circle": {
    change(model) {
      const at = model.capabilityOffsets.get(2)!;
      model.config[at + 1] = 0x40;
    },
    message: /in a circle or nowhere/,
  },
  "whose capabilities lead into the header": {
    change: (model) => model.config[0x41] = 0x10,
    message: /in a circle or nowhere/,
  },
  "whose common configuration is too short": {
    change: (model) => model.config[model.capabilityOffsets.get(1)! + 12] = 55,
    message: /its 55 bytes are less than 56/,
  },
  "whose common configuration is behind its BAR": {
    change: (model) => model.config[model.capabilityOffsets.get(1)! + 11] = 1,
    message: /common configuration capability: bytes .* outside BAR 0 of 16384/,
  },
  "whose common configuration is in no BAR": {
    change: (model) => model.config[model.capabilityOffsets.get(1)! + 4] = 6,
    message: /BAR 6 does not exist/,
  },
  "whose common configuration is in an empty BAR": {
    change: (model) => model.config[model.capabilityOffsets.get(1)! + 4] = 3,
    message: /outside BAR 3 of 0/,
  },
  "whose notification capability is cut": {
    change: (model) => model.config[model.capabilityOffsets.get(2)! + 2] = 16,
    message: /notification capability: it has 16 bytes, needs 20/,
  },
  "whose capability passes the end": {
    change: (model) => model.config[model.capabilityOffsets.get(2)! + 2] = 250,
    message: /notification capability: it has 250 bytes/,
  },
  "whose notification multiplier is odd": {
    change: (model) => model.config[model.capabilityOffsets.get(2)! + 16] = 3,
    message: /multiplier 3 is odd/,
  },
};

for (const [name, { change, message }] of Object.entries(refusals)) {
  test(`a device ${name} is refused`, () =>
    withModel({}, async (model) => {
      change(model);
      await assert.rejects(
        VirtioPciDevice.open(model),
        (error: Error) =>
          error.name === "Vhost2Error" && message.test(error.message),
      );
      assert.equal(model.dma.count, 0);
    }));
}

test("a notification outside its structure is refused", () =>
  withDevice({ queueCount: 2 }, (device, model) => {
    const { read } = model.bars[0]!;
    model.bars[0]!.read = (offset, width) =>
      offset === 30 ? 0x400 : read(offset, width);
    assert.throws(
      () => device.addQueue(0),
      /its notification is at 4096 of 4096 bytes/,
    );
    return Promise.resolve();
  }));

test("a queue that is not there is refused", () =>
  withDevice({ queueCount: 1 }, (device, model) => {
    assert.throws(() => device.addQueue(1), /has none of that number/);
    model.queues[0].size = 0;
    assert.throws(() => device.addQueue(0), /has none of that number/);
    return Promise.resolve();
  }));

test("a split queue's size is a power of two, whatever the device has", () =>
  withDevice({ queueSize: 100 }, (device, model) => {
    assert.equal(device.addQueue(0).queueSize, 64);
    assert.equal(model.queues[0].size, 64);
    return Promise.resolve();
  }));

test("memory that cannot be mapped leaves nothing behind", () =>
  withModel({}, async (model) => {
    model.dma.failure = new Error("locked memory");
    await assert.rejects(VirtioPciDevice.open(model), /locked memory/);
    model.dma.failure = undefined;
    const device = await VirtioPciDevice.open(model);
    assert.equal(device.memory.ram.regions[0].gpa, 1n << 20n);
    await device.close();
  }));

test("a broken device says so, and one that vanishes answers all ones", () =>
  withDevice({}, async (device, model) => {
    const conditions = new Events<string>();
    device.onConfigChange = () => conditions.push(device.condition);
    const queue = device.addQueue(0);
    device.start();
    assert.equal(device.condition, "ok");
    const lost = queue.submit({ writable: [1] });
    model.fail();
    assert.equal(await conditions.next(), "needsReset");
    model.isGone = true;
    assert.equal(device.condition, "gone");
    // Requests of a device that has gone end with it.
    const rejected = assert.rejects(lost, { code: "CLOSED" });
    await device.close();
    await rejected;
  }));
