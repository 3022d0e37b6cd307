/** Messages through a virtio-vhost-user device: each kind, and each quirk. */

import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import {
  featureMask,
  FrontendRequest as Id,
  ProtocolFeature,
  type VhostUserDevice,
  VirtioFeature,
} from "../../frontend/mod.ts";
import { requestOps, type TargetOps } from "../../mod.ts";
import { ringAddress } from "../../protocol/address.ts";
import { test } from "../harness.ts";
import { Events, eventually, within } from "../support/wait.ts";
import { exercise, exerciseQueue, openGuest, withDisk } from "./pci_disk.ts";
import { type PciServed, servingPci } from "./pci_served.ts";

const MQ = featureMask(ProtocolFeature.MQ);
const REPLY_ACK = featureMask(ProtocolFeature.REPLY_ACK);

test("only what the device passes on is offered", async () => {
  await withDisk({ device: "QEMU 2022" }, async ({ connect }) => {
    const connection = connect();
    assert.equal(await connection.getProtocolFeatures(), MQ);
    const features = await connection.getFeatures();
    for (const bit of [VirtioFeature.LOG_ALL, VirtioFeature.ACCESS_PLATFORM]) {
      assert.equal(features & featureMask(bit), 0n);
    }
    assert.equal(
      await connection.exchange(Id.GET_QUEUE_NUM, null).catch(() => 0n),
      0n,
    );
  }).catch(expectClosed);
  await withDisk({ device: "crosvm" }, async ({ connect }) => {
    const connection = connect();
    const { BACKEND_REQ, CONFIG } = ProtocolFeature;
    assert.equal(
      await connection.getProtocolFeatures(),
      MQ | REPLY_ACK | featureMask(BACKEND_REQ, CONFIG),
    );
    connection.close();
  });
});

/** A message that is refused without an ack ends the connection. */
function expectClosed(error: Error): void {
  assert.match(error.message, /GET_QUEUE_NUM/);
}

test("every message that QEMU's device passes on is handled", () =>
  withDisk({ device: "QEMU 2022" }, async (served) => {
    const guest = await openGuest(served);
    await exercise(guest);
    const { connection } = guest;
    await connection.resetOwner();
    const bases = await Promise.all([0, 1].map((i) => guest.stopQueue(i)));
    assert.ok(bases[0] > 0 && bases[1] > 0);
    await guest.startQueue(0);
    await guest.startQueue(1);
    await exercise(guest);
    const seen = new Set(served.model.relayed);
    for (
      const id of [1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 15, 16, 17, 18]
    ) assert.ok(seen.has(id), `message ${id}`);
    await guest.close();
  }));

test("configuration space and acks go through crosvm's device", () =>
  withDisk({ device: "crosvm" }, async (served) => {
    const guest = await openGuest(served, { acksAll: true });
    const config = await guest.getConfig(0, 60);
    const capacity = new DataView(config.buffer).getBigUint64(0, true);
    assert.equal(capacity, 2048n);
    assert.equal(await guest.connection.acknowledged(Id.SET_OWNER), 0n);
    // Refused, and told so.
    const wrong = new Uint8Array(8);
    assert.equal(
      await guest.connection.acknowledged(Id.SET_VRING_NUM, wrong),
      1n,
    );
    await served.errors.find((error) => /SET_VRING_NUM/.test(error.message));
    await exercise(guest);
    await guest.close();
  }));

test("our own requests go through crosvm's device, and their replies come back", () =>
  withDisk({ device: "crosvm" }, async (served) => {
    const guest = await openGuest(served);
    const changes = new Events<number>();
    guest.onConfigChange = () => changes.push(1);
    const [device] = served.target.devices;
    for (let i = 0; i < 20; i++) {
      device.configChanged();
      await changes.next();
    }
    await exercise(guest);
    await guest.close();
  }));

test("one queue is stopped and goes on while the other runs", () =>
  withDisk({}, async (served) => {
    const guest = await openGuest(served);
    for (let i = 0; i < 3; i++) {
      await guest.stopQueue(0);
      await exerciseQueue(guest.queues[1], i);
      await guest.startQueue(0);
      await exercise(guest, 2);
    }
    await guest.close();
  }));

test("a kick that comes before its queue has started is not lost", () =>
  withDisk({}, async (served) => {
    const guest = await openGuest(served, { start: false });
    await guest.activate();
    core.eventfdSignal(guest.queues[0].kickFd);
    const request = exerciseQueue(guest.queues[0], 1);
    await guest.startQueue(0);
    await request;
    await guest.close();
  }));

test("a queue without a kick is polled, one without a call is not called", () =>
  withDisk({}, async (served) => {
    const guest = await openGuest(served, { start: false });
    await guest.activate();
    await guest.startQueue(0, { polled: true });
    await exerciseQueue(guest.queues[0], 1);
    await guest.connection.setVringCall(0, null);
    await guest.connection.barrier();
    const rung = served.model.rung.size;
    const write = guest.queues[0].submit({
      readable: [new Uint8Array(16)],
      writable: [512, 1],
    });
    await eventually(() => {
      guest.queues[0].poll();
      return guest.queues[0].inFlight === 0;
    }, "the request completes");
    await write;
    assert.equal(served.model.rung.size, rung);
    await guest.close();
  }));

test("memory that changes under running queues is found in its new place", () =>
  withDisk({}, async (served) => {
    const guest = await openGuest(served);
    await exercise(guest);
    const device = served.target.devices[0];
    const added = guest.ram.addRegion({ size: 1 << 20, gpa: 1n << 34n });
    await guest.sendMemory();
    await guest.connection.barrier();
    assert.equal(device.memory.length, 3);
    added.bytes[5] = 55;
    assert.equal(device.memory[2].view[5], 55);
    await exercise(guest);
    guest.ram.removeRegion(added);
    await guest.sendMemory();
    await guest.connection.barrier();
    assert.equal(device.memory.length, 2);
    await exercise(guest);
    await guest.close();
  }));

test("a table that only adds keeps the views of what stays", () =>
  withDisk({}, async (served) => {
    const guest = await openGuest(served);
    await guest.connection.barrier();
    const device = served.target.devices[0];
    const { view } = device.memory[0];
    guest.ram.addRegion({ size: 1 << 20, gpa: 1n << 34n });
    await guest.sendMemory();
    await guest.connection.barrier();
    assert.equal(view.length, 1 << 20, "the same mapping");
    await exercise(guest);
    await guest.close();
  }));

test("a broken ring is told by the error doorbell", () =>
  withDisk({ device: "crosvm", errorsExpected: true }, async (served) => {
    const guest = await openGuest(served);
    const error = core.eventfdCreate();
    await guest.connection.setVringErr(0, error, { ack: true });
    // Far ahead of us.
    guest.queues[0].setAvailableIndex(0x4000);
    guest.queues[0].kick();
    await served.errors.find((error) => /available index/.test(error.message));
    assert.equal(served.model.rung.get(served.model.vhostQueues), 0);
    core.descriptorClose(error);
    await guest.close();
  }));

/** Counts and answers: an op that needs neither ring nor disk. */
function counting(count: (name: string) => void): TargetOps {
  return {
    ...requestOps((request) => request.write(request.read())),
    deviceCreate: () => count("create"),
    deviceDestroy: () => count("destroy"),
  };
}

/** Each step of a front-end's start, after which it goes. */
const steps: Record<string, (guest: VhostUserDevice) => Promise<void> | void> =
  {
    "GET_FEATURES": () => {},
    "SET_FEATURES": (guest) => guest.connection.setFeatures(guest.features),
    "SET_MEM_TABLE": (guest) => guest.activate(),
    "SET_VRING_NUM": async (guest) => {
      await guest.activate();
      await guest.connection.setVringNum(0, 16);
    },
    "SET_VRING_ADDR": async (guest) => {
      await guest.activate();
      await guest.connection.setVringNum(0, 16);
      await guest.connection.setVringAddr(guest.vringAddress(0));
    },
    "SET_VRING_KICK": async (guest) => {
      await guest.activate();
      await guest.startQueue(0, { enable: false });
    },
    "SET_VRING_ENABLE": (guest) => guest.start(),
  };

for (const device of ["QEMU 2022", "crosvm"] as const) {
  test(`a front-end may go after each step of its start, ${device}`, () => {
    const seen: string[] = [];
    return servingPci({ device }, {
      queueCount: 2,
      features: 1n << 29n,
      device: () => counting((name) => seen.push(name)),
    }, async (served) => {
      for (const [name, step] of Object.entries(steps)) {
        for (const isSettled of [false, true]) {
          const guest = await openGuest(served, {
            start: false,
            queueSize: 16,
          });
          await step(guest);
          if (isSettled) await guest.connection.barrier();
          guest.connection.close();
          await guest.close();
          await within(served.nobody(), `the end after ${name}`);
        }
      }
      const guest = await openGuest(served);
      const answer = await within(
        guest.queues[0].submit({
          readable: [Uint8Array.of(1, 2)],
          writable: [2],
        }),
        "a request",
      );
      assert.deepEqual([...answer.data[0]], [1, 2]);
      await guest.close();
    }).then(() => {
      assert.equal(
        seen.filter((name) => name === "create").length,
        seen.filter((name) => name === "destroy").length,
      );
    });
  });
}

/** What the device does not pass on, or we do not take, ends the connection. */
const unusable: Record<
  string,
  {
    device: "QEMU 2022" | "crosvm";
    send: (guest: VhostUserDevice) => void;
    error?: RegExp;
  }
> = {
  "GET_CONFIG through QEMU's": {
    device: "QEMU 2022",
    send: ({ connection }) => connection.send(Id.GET_CONFIG),
  },
  "a memory table of nothing but lies": {
    device: "crosvm",
    send: ({ connection }) =>
      connection.send(Id.SET_MEM_TABLE, new Uint8Array(16)),
    error: /SET_MEM_TABLE/,
  },
  "a region larger than the shared memory": {
    device: "QEMU 2022",
    send: ({ connection, ram }) => {
      const [{ description, fd }] = ram.regions;
      void connection.setMemTable([{
        description: { ...description, size: 1n << 40n },
        fd,
      }]);
    },
    error: /bytes 0 to 1099511627776 are not in the/,
  },
  "a region whose offset wraps": {
    device: "QEMU 2022",
    send: ({ connection, ram }) => {
      const [{ description, fd }] = ram.regions;
      void connection.setMemTable([{
        description: { ...description, mmapOffset: (1n << 64n) - 4096n },
        fd,
      }]);
    },
    error: /are not in the/,
  },
  "a region without bytes": {
    device: "QEMU 2022",
    send: ({ connection, ram }) => {
      const [{ description, fd }] = ram.regions;
      void connection.setMemTable([{
        description: { ...description, size: 0n },
        fd,
      }]);
    },
    error: /bytes 0 to 0 are not in/,
  },
  "a ring outside of memory": {
    device: "QEMU 2022",
    send: ({ connection, vringAddress }) =>
      void connection.setVringAddr({
        index: 0,
        flags: 0,
        descriptor: ringAddress(0x10n),
        available: ringAddress(0x10n),
        used: ringAddress(0x10n),
        log: 0n as ReturnType<typeof vringAddress>["log"],
      }),
    error: /SET_VRING_ADDR/,
  },
  "a vring that is not there": {
    device: "QEMU 2022",
    send: ({ connection }) => void connection.setVringNum(7, 16),
    error: /vring 7 of 2/,
  },
};

for (const [name, { device, send, error }] of Object.entries(unusable)) {
  test(`${name} ends the connection, and the next front-end is served`, () =>
    withDisk({ device, errorsExpected: true }, async (served) => {
      const guest = await openGuest(served, { protocolFeatures: MQ });
      await exercise(guest);
      send(guest);
      await within(guest.connection.closed, "the end of the connection");
      await guest.close();
      await served.nobody();
      if (error !== undefined) {
        await served.errors.find(({ message }) => error.test(message));
      }
      const next = await openGuest(served);
      await exercise(next);
      await next.close();
    }));
}

test("memory that its front-end takes away ends only its connection", () =>
  withDisk({ errorsExpected: true }, async (served: PciServed) => {
    const guest = await openGuest(served);
    await exercise(guest);
    guest.ram.regions[0].resizeFile(0);
    guest.queues[0].kick();
    // Somebody touches it.
    guest.ram.regions[0].bytes[0];
    served.target.devices[0]?.memory[0].view[0];
    await within(guest.connection.closed, "the end of the connection");
    await guest.close();
    await served.nobody();
    const next = await openGuest(served);
    await exercise(next);
    await next.close();
  }));
