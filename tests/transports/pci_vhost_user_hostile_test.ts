/**
 * A virtio-vhost-user device that lies, breaks its rules or goes away, and
 * front-ends that abuse it: each is told in one sentence, nothing is left of
 * it, and where the device is still there the next front-end is served.
 */

import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import { FrontendRequest as Id } from "../../frontend/mod.ts";
import { registerTarget, type Target } from "../../mod.ts";
import type { Request } from "../../virtqueue/mod.ts";
import { assertGuestMemory, guestMemoryBytes } from "../hostile/accounting.ts";
import { test } from "../harness.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";
import type { ModelCapability } from "../support/pci_model.ts";
import {
  VhostUserPciModel,
  type VhostUserPciModelOptions,
} from "../support/vhost_user_pci_model.ts";
import { eventually, within } from "../support/wait.ts";
import { exercise, exerciseQueue, openGuest, withDisk } from "./pci_disk.ts";
import { nextAddress, pciOptions, type PciServed } from "./pci_served.ts";

type Change = (all: ModelCapability[]) => ModelCapability[];

/** Changes the capability of one type. */
const change =
  (type: number, fields: Partial<ModelCapability>): Change => (all) =>
    all.map((capability) =>
      capability.type === type ? { ...capability, ...fields } : capability
    );
const without = (type: number): Change => (all) =>
  all.filter((capability) => capability.type !== type);

/** Devices that cannot be used, and what is said of them. */
const unusable: Record<
  string,
  {
    options?: VhostUserPciModelOptions;
    prepare?: (model: VhostUserPciModel) => void;
    queueCount?: number;
    error: RegExp;
  }
> = {
  "of another identity": {
    prepare: (model) => model.config[2] = 0x41,
    error: /1af4:1041 is no virtio-vhost-user device that is known/,
  },
  "of another vendor": {
    prepare: (model) => model.config[0] = 0,
    error: /1a00:106b is no virtio-vhost-user device/,
  },
  "without doorbells": {
    options: { capabilities: without(6) },
    error: /no doorbell capability/,
  },
  "without shared memory": {
    options: { capabilities: without(8) },
    error: /no shared memory capability/,
  },
  "whose doorbells are behind the BAR": {
    options: { capabilities: change(6, { offset: 0x7fff_f000 }) },
    error: /doorbell capability: bytes .* are outside BAR 2/,
  },
  "whose doorbells are in no BAR": {
    options: { capabilities: change(6, { bar: 5 }) },
    error: /doorbell capability: bytes .* are outside BAR 5 of 0/,
  },
  "whose doorbell capability is cut": {
    options: { capabilities: change(6, { size: 16 }) },
    error: /doorbell capability: it has 16 bytes, needs 20/,
  },
  "with too few doorbells": {
    options: { capabilities: change(6, { length: 4 }) },
    error: /doorbell 1 is at 4 of 4 bytes/,
  },
  "without doorbells for errors": {
    options: { capabilities: change(6, { length: 0x800 }) },
    error: /doorbell 1025 is at 4100 of 2048 bytes/,
  },
  "whose shared memory is behind the BAR": {
    options: { capabilities: change(8, { offset: 0x7fff_f000 }) },
    error: /shared memory capability: bytes/,
  },
  "whose 64-bit shared memory is behind the BAR": {
    options: {
      capabilities: change(8, { size: 24, offset: 2 ** 52, length: 2 ** 52 }),
    },
    error: /shared memory capability: bytes/,
  },
  "with a short configuration": {
    prepare: (model) => model.config[model.capabilityOffsets.get(4)! + 12] = 8,
    error: /its configuration has 8 bytes, needs 24/,
  },
  "with fewer queues than are served": {
    options: { vhostQueues: 4 },
    queueCount: 5,
    error: /Cannot serve 5 queues through PCI device .*: it has 4/,
  },
  "with one queue for messages": {
    prepare: (model) => model.queues.pop(),
    error: /Cannot use queue 1/,
  },
  "that has gone": {
    prepare: (model) => model.isGone = true,
    error: /ffff:ffff is no virtio-vhost-user device/,
  },
};

for (
  const [name, { options, prepare, queueCount, error }] of Object.entries(
    unusable,
  )
) {
  test(`a device ${name} cannot be registered, and is closed`, async () => {
    const before = guestMemoryBytes();
    await withoutDescriptorLeak(async () => {
      const model = new VhostUserPciModel(options);
      if (name === "with one queue for messages") {
        // It forgets its queues at its reset.
        model.onReset = ((reset) => () => {
          reset?.();
          model.queues.pop();
        })(model.onReset);
      }
      prepare?.(model);
      await assert.rejects(
        registerTarget({
          ...pciOptions(model),
          queueCount: queueCount ?? 2,
          device: () => ({}),
        }),
        (thrown: Error) =>
          thrown.name === "Vhost2Error" && error.test(thrown.message),
      );
      assert.ok(model.isClosed);
      assert.equal(model.dma.count, 0);
      await model.settled();
    });
    assertGuestMemory(before);
  });
}

test("options that make no sense are refused before anything is opened", async () => {
  const openDevice = () => assert.fail("nothing is to be opened");
  const device = () => ({});
  const transport = "PCI-vhost-user";
  for (const address of ["", "disk", "/tmp/socket", "00:05"]) {
    await assert.rejects(
      registerTarget({ transport, address, openDevice, device }),
      { code: "OPTION" },
    );
  }
  const model = new VhostUserPciModel();
  const profile = "bhyve" as "qemu";
  await assert.rejects(
    registerTarget({ ...pciOptions(model, profile), device }),
    /Cannot use profile: bhyve \(known: qemu, crosvm\)/,
  );
});

test("a device is registered once, however its address is written", () =>
  withDisk({}, async ({ target }) => {
    const address = target.name.replace(/^PCI-vhost-user:/, "").toUpperCase();
    await assert.rejects(
      registerTarget({
        transport: "PCI-vhost-user",
        address,
        device: () => ({}),
      }),
      { code: "IN_USE" },
    );
  }));

test("a device that cannot be opened leaves its address free", async () => {
  const address = nextAddress();
  const options = {
    transport: "PCI-vhost-user",
    address,
    openDevice: () => Promise.reject(new Error("not today")),
    device: () => ({}),
  } as const;
  await assert.rejects(registerTarget(options), /not today/);
  await assert.rejects(registerTarget(options), /not today/);
});

/** Bytes of a header. */
function header(request: number, flags: number, size: number): Uint8Array {
  return new Uint8Array(Uint32Array.of(request, flags, size).buffer);
}

/** Serves on after the device was reset. */
async function servesOn(served: PciServed): Promise<void> {
  await served.nobody();
  await eventually(() => served.model.vhostStatus === 1, "it waits again");
  const guest = await openGuest(served);
  await exercise(guest);
  await guest.close();
}

/** What a device may put into a buffer, and what is said of it. */
const frames: Record<
  string,
  { bytes: Uint8Array; written?: number; error: RegExp }
> = {
  "half a header": { bytes: new Uint8Array(5), error: /a message of 5 bytes/ },
  "a payload that is longer than said": {
    bytes: new Uint8Array([...header(1, 1, 4), 1, 2, 3, 4, 5]),
    error: /a message of 17 bytes says that its payload has 4/,
  },
  "a payload that is shorter than said": {
    bytes: header(1, 1, 8),
    error: /a message of 12 bytes says that its payload has 8/,
  },
  "a payload of 4 GiB, it says": {
    bytes: header(1, 1, 0xffff_ffff),
    error: /payload has 4294967295/,
  },
  "more than the buffer holds, it says": {
    bytes: header(1, 1, 0),
    written: 100_000,
    error: /100000 bytes written to head/,
  },
  "more than the buffer holds": {
    bytes: new Uint8Array(8192),
    error: /it needs a reset|it says that it needs a reset/,
  },
};

for (const [name, { bytes, written, error }] of Object.entries(frames)) {
  for (const isConnected of [true, false]) {
    const when = isConnected ? "with" : "without";
    test(`a buffer with ${name}, ${when} a front-end: reset and served on`, () =>
      withDisk({ errorsExpected: true }, async (served) => {
        const guest = isConnected ? await openGuest(served) : undefined;
        await eventually(() => served.model.bufferCount > 0, "a buffer");
        served.model.deliver(bytes, written);
        await served.errors.find(({ message }) => error.test(message));
        guest?.connection.close();
        await guest?.close();
        await servesOn(served);
      }));
  }
}

/** Messages that end their connection, as on a socket. */
const messages: Record<string, { bytes: Uint8Array; error: RegExp }> = {
  "another version": { bytes: header(1, 2, 0), error: /message version is 2/ },
  "a reply that nobody awaits": {
    bytes: header(1, 5, 0),
    error: /has the REPLY bit set/,
  },
  "an unknown request": {
    bytes: header(0xffff_ffff, 1, 0),
    error: /unknown request 4294967295/,
  },
};

for (const [name, { bytes, error }] of Object.entries(messages)) {
  test(`${name} ends the connection, and the next front-end is served`, () =>
    withDisk({ errorsExpected: true }, async (served) => {
      const guest = await openGuest(served);
      await exercise(guest);
      served.model.deliver(bytes);
      await served.errors.find(({ message }) => error.test(message));
      await within(guest.connection.closed, "the end of the connection");
      await guest.close();
      await servesOn(served);
    }));
}

test("a device that says that it is broken is reset, and serves on", () =>
  withDisk({ errorsExpected: true }, async (served) => {
    for (let round = 0; round < 3; round++) {
      const guest = await openGuest(served);
      await exercise(guest);
      served.model.fail();
      await served.errors.find(({ message }) => /needs a reset/.test(message));
      await within(guest.connection.closed, "the end of the connection");
      await guest.close();
      await servesOn(served);
    }
  }));

test("a device that stays broken is tried again, until it works", () =>
  withDisk({ errorsExpected: true }, async (served) => {
    const { model } = served;
    model.refusedFeatures = 1n << 32n;
    model.fail();
    for (let i = 0; i < 2; i++) {
      await served.errors.find(({ message }) =>
        /does not take the features/.test(message)
      );
    }
    model.refusedFeatures = 0n;
    await servesOn(served);
  }));

/** Ways to vanish. */
const vanishings: Record<string, (model: VhostUserPciModel) => void> = {
  "is unplugged": (model) => {
    model.isGone = true;
    model.onRemoval?.();
  },
  "is asked back": (model) => model.onRemoval?.(),
  "answers all ones after an interrupt": (model) => {
    const [fd] = model.vectors;
    model.isGone = true;
    core.eventfdSignal(fd);
  },
};

for (const [name, vanish] of Object.entries(vanishings)) {
  for (const isConnected of [true, false]) {
    const when = isConnected ? "with" : "without";
    test(`a device that ${name} ${when} a front-end is let go of, and the target ends`, () =>
      withDisk({ errorsExpected: true }, async (served) => {
        const { model, target, errors } = served;
        const guest = isConnected ? await openGuest(served) : undefined;
        if (guest !== undefined) await exercise(guest);
        vanish(model);
        await errors.find(({ message }) => /it has gone/.test(message));
        await within(target.closed, "the end of the target");
        assert.ok(model.isClosed);
        assert.equal(target.devices.length, 0);
        guest?.connection.close();
        await guest?.close();
      }));
  }
}

test("a device that vanishes during a request does no harm", () =>
  withDisk({ errorsExpected: true }, async (served) => {
    const guest = await openGuest(served);
    const lost = exerciseQueue(guest.queues[0], 1).catch(() => {});
    served.model.isGone = true;
    served.model.onRemoval?.();
    await eventually(() => served.model.isClosed, "the device is closed");
    guest.connection.close();
    await guest.close();
    await lost;
  }));

test("interrupts for nothing are nothing", () =>
  withDisk({}, async (served) => {
    const guest = await openGuest(served);
    for (let i = 0; i < 50; i++) {
      for (const fd of served.model.vectors) core.eventfdSignal(fd);
      await exerciseQueue(guest.queues[i % 2], i);
    }
    await guest.close();
    for (const fd of served.model.vectors) core.eventfdSignal(fd);
    await servesOn(served);
  }));

test("a status that the device clears by itself is set again", () =>
  withDisk({}, async (served) => {
    for (let i = 0; i < 3; i++) {
      served.model.vhostStatus = 0;
      served.model.notifyConfig();
      await eventually(() => served.model.vhostStatus === 1, "it waits again");
    }
    await servesOn(served);
  }));

test("a device that does not take answers gets no more of them", () =>
  withDisk({ errorsExpected: true }, async (served) => {
    const { model } = served;
    const held: Request[] = [];
    const { onRequest } = model;
    const connection = served.connect();
    await connection.getFeatures();
    model.onRequest = (queue, request) =>
      queue === 1 ? void held.push(request) : onRequest?.(queue, request);
    const count = 500;
    for (let i = 0; i < count; i++) connection.send(Id.GET_FEATURES);
    await eventually(() => held.length >= 16, "answers are sent");
    // Far fewer than were asked for: the rest waits on the other side.
    await new Promise((resolve) => setTimeout(resolve, 20));
    assert.equal(held.length, 16);
    model.onRequest = onRequest;
    for (const request of held) onRequest?.(1, request);
    for (let i = 0; i < count; i++) {
      const message = await within(connection.receive(), "an answer");
      assert.equal(message?.request, Id.GET_FEATURES);
    }
    connection.close();
    await servesOn(served);
  }));

test("a front-end that goes while its answers are stuck: the device is reset", () =>
  withDisk({ errorsExpected: true }, async (served) => {
    const { model } = served;
    const { onRequest } = model;
    const connection = served.connect();
    await connection.getFeatures();
    model.onRequest = (queue, request) => {
      if (queue === 0) onRequest?.(queue, request);
    };
    connection.send(Id.GET_FEATURES);
    await eventually(() => model.relayed.length >= 2, "it is passed on");
    connection.close();
    await served.nobody();
    const resets = () => model.statuses.filter((status) => status === 0).length;
    const before = resets();
    await eventually(() => resets() > before, "the device is reset");
    model.onRequest = onRequest;
    await servesOn(served);
  }));

/** Where a target may be when it is unregistered; what to close then. */
const moments: Record<
  string,
  (served: PciServed) => Promise<{ close(): void | Promise<void> } | void>
> = {
  "nobody has come": () => Promise.resolve(),
  "a front-end has just come": (served) => Promise.resolve(served.connect()),
  "a front-end's queues run": async (served) => {
    const guest = await openGuest(served);
    await exercise(guest);
    return guest;
  },
  "the device is being reset": async (served) => {
    served.model.fail();
    await served.errors.find(({ message }) => /needs a reset/.test(message));
  },
  "the device waits for another try": async (served) => {
    served.model.refusedFeatures = 1n << 32n;
    served.model.fail();
    await served.errors.find(({ message }) => /features/.test(message));
  },
  "the device has vanished": async (served) => {
    served.model.isGone = true;
    served.model.onRemoval?.();
    await served.errors.next();
  },
};

for (const [name, prepare] of Object.entries(moments)) {
  test(`a target is unregistered while ${name}`, () =>
    withDisk({ errorsExpected: true }, async (served) => {
      const guest = await prepare(served);
      const { target }: { target: Target } = served;
      await within(target.unregister(), "unregister");
      assert.ok(served.model.isClosed);
      await guest?.close();
    }));
}
