// configChanged: BACKEND_CONFIG_CHANGE_MSG once for what has not been read, and
// never lost.

import assert from "node:assert/strict";
import {
  BackendRequest,
  ProtocolFeature,
  supportedProtocolFeatures,
  type VhostUserDevice,
} from "../../frontend/mod.ts";
import { type Device, featureMask } from "../../mod.ts";
import { test } from "../harness.ts";
import { Events, within } from "../support/wait.ts";
import { type Deferred, deferred } from "./deferred.ts";
import { echo, type Served, withGuest } from "./served.ts";

const withoutAcks = supportedProtocolFeatures &
  ~featureMask(ProtocolFeature.REPLY_ACK);

/** One byte of configuration space, and a guest that is told of changes. */
class World {
  value = 0;
  readonly guest: VhostUserDevice;
  readonly device: Device;
  /** Each message, as long as its ack is not given. */
  readonly told = new Events<Deferred<bigint>>();
  /** All of them. */
  count = 0;

  constructor(guest: VhostUserDevice, device: Device) {
    this.guest = guest;
    this.device = device;
    guest.connection.onBackendRequest = ({ id }) => {
      assert.equal(id, BackendRequest.BACKEND_CONFIG_CHANGE_MSG);
      this.count++;
      const ack = deferred<bigint>();
      this.told.push(ack);
      return ack.promise;
    };
  }

  change(times = 1): void {
    for (let i = 0; i < times; i++) {
      this.value++;
      this.device.configChanged();
    }
  }

  async read(): Promise<number> {
    return (await this.guest.getConfig(0, 1))[0];
  }

  next(): Promise<Deferred<bigint>> {
    return within(this.told.next(), "CONFIG_CHANGE_MSG");
  }

  /** The next one is read and acknowledged. */
  async take(): Promise<void> {
    (await this.next()).resolve(0n);
  }
}

function world(
  body: (world: World, served: Served) => Promise<void>,
  protocolFeatures = supportedProtocolFeatures,
): Promise<void> {
  let made: World | undefined;
  const device = () => ({
    ...echo(),
    getConfig: () => Uint8Array.of(made?.value ?? 0),
  });
  const options = { device, guest: { protocolFeatures, queueCount: 1 } };
  return withGuest(options, async (guest, served) => {
    made = new World(guest, served.recording.devices[0]);
    await body(made, served);
  });
}

test("changes while one is not acknowledged are told by one message, after its ack", () =>
  world(async (world) => {
    await world.guest.start();
    world.change();
    const first = await world.next();
    world.change(3);
    assert.equal(await world.read(), 4);
    world.change(3);
    // By then it would have come: the answers share no socket, but a process.
    assert.equal(await world.read(), 7);
    assert.equal(world.count, 1);
    first.resolve(0n);
    const second = await world.next();
    assert.equal(await world.read(), 7);
    second.resolve(0n);
    // Nothing is owed: the next message is that of the next change.
    await world.read();
    world.change();
    await world.take();
    assert.equal(await world.read(), 8);
    assert.equal(world.count, 3);
  }));

test("changes in one turn are told by at most two messages, the last after all of them", () =>
  world(async (world) => {
    await world.guest.start();
    world.change(100);
    await world.take();
    await world.take();
    assert.equal(await world.read(), 100);
    await world.read();
    world.change();
    await world.take();
    assert.equal(await world.read(), 101);
    assert.equal(world.count, 3);
  }, withoutAcks));

test("a front-end that refuses a change is told of the next one", () =>
  world(async (world) => {
    await world.guest.start();
    world.change();
    (await world.next()).resolve(1n);
    world.change();
    await world.take();
  }));

test("a change while all queues are stopped is told when one starts", () =>
  world(async (world) => {
    world.change(2);
    await world.guest.activate();
    assert.equal(await world.read(), 2);
    assert.equal(world.count, 0);
    await world.guest.startQueue(0);
    await world.take();
    await world.guest.stopQueue(0);
    world.change();
    assert.equal(await world.read(), 3);
    assert.equal(world.count, 1);
    await world.guest.startQueue(0);
    await world.take();
    assert.equal(world.count, 2);
  }));

test("a change that the old back-end channel took unread is told on the new one", () =>
  world(async (world) => {
    const { guest } = world;
    await guest.start();
    world.change();
    const unread = await world.next();
    await guest.connection.setBackendChannel({ ack: true });
    await world.take();
    assert.equal(world.count, 2);
    unread.resolve(0n);
    world.change();
    await world.take();
    assert.equal(world.count, 3);
  }));

test("a back-end channel that has closed costs nothing but itself", () =>
  world(async (world) => {
    const { guest } = world;
    await guest.start();
    const channel = await guest.connection.setBackendChannel({ ack: true });
    channel.close();
    await channel.closed;
    world.change(2);
    await guest.enableQueue(0, true);
    assert.equal(await world.read(), 2);
    await guest.connection.setBackendChannel({ ack: true });
    await world.take();
    assert.equal(world.count, 1);
  }));
