// Random front-ends and random guests: whatever they do, the process lives,
// nothing is left behind, and the bystander is served.
import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import { check } from "../../ffi/errors.ts";
import type {
  FrontendConnection,
  VhostUserDevice,
} from "../../frontend/mod.ts";
import { frontendRequests } from "../../protocol/frontend_request.ts";
import { memoryBacking, nullBacking } from "../../mod.ts";
import { test } from "../harness.ts";
import { within } from "../support/wait.ts";
import { anonymousBytes } from "./accounting.ts";
import { join, longs, memoryTable, singleRegion, words } from "./messages.ts";
import { Random } from "./random.ts";
import { diskSize, type Victim, withBystander, type World } from "./world.ts";

const seeds = [1, 2, 3, 4, 5, 6];
const slack = 128 << 20;
/** Protocol features that the disk offers: MQ, REPLY_ACK and so on. */
const negotiated = new Set([0, 3, 5, 9, 13, 15, 16]);

/** Files, sockets and events to be sent at random. */
class Fds {
  readonly all: number[];
  readonly memory: number;

  constructor() {
    const ends = new Int32Array(2);
    check(core.socketPair(ends), "Cannot make sockets");
    this.memory = check(core.memfdCreate(1 << 20), "Cannot make a file");
    this.all = [
      ...ends,
      this.memory,
      check(core.eventfdCreate(), "Cannot make an event"),
      check(core.eventfdCreate(), "Cannot make an event"),
    ];
  }

  some(random: Random): number[] {
    const count = random.once(3) ? random.below(12) : random.below(2);
    return Array.from({ length: count }, () => random.pick(this.all));
  }

  close(): void {
    for (const fd of this.all) core.descriptorClose(fd);
  }
}

const regionAt = (random: Random) => ({
  gpa: random.long(),
  size: random.once(2) ? BigInt(random.below(1 << 20)) : random.long(),
  uva: random.long(),
  mmapOffset: random.once(2) ? 0n : random.long(),
});

/** The messages that do not end the connection for want of a feature. */
const taken = frontendRequests.filter(({ gate, id }) =>
  (gate.kind !== "protocol" || gate.bits.every((bit) => negotiated.has(bit))) &&
  id !== 22
);

/** A payload of the row's kind with random values in it. */
function payloadOf(random: Random, kind: string): Uint8Array<ArrayBuffer> {
  switch (kind) {
    case "none":
      return new Uint8Array(0);
    case "u64":
    case "vringDescriptorIndex":
      return longs(random.once(2) ? BigInt(random.below(3)) : random.long());
    case "vringState":
      return words(
        random.once(4) ? random.word() : random.below(2),
        random.word(),
      );
    case "vringAddress":
      return join(
        words(random.below(3), random.below(3)),
        longs(...Array.from({ length: 4 }, () => random.long())),
      );
    case "memoryTable":
      return memoryTable(
        Array.from({ length: random.below(9) }, () => regionAt(random)),
      );
    case "singleMemoryRegion":
      return singleRegion(regionAt(random));
    case "config": {
      const size = random.below(64);
      return join(
        words(random.below(80), size, random.below(3)),
        random.bytes(size),
      );
    }
    default:
      return random.bytes(random.below(64));
  }
}

/** One message, most often of the right form. */
function sendRandom(
  connection: FrontendConnection,
  random: Random,
  fds: Fds,
): void {
  if (random.once(200)) {
    connection.sendRaw(random.bytes(1 + random.below(40)), fds.some(random));
    return;
  }
  const row = random.pick(random.once(50) ? frontendRequests : taken);
  let payload = payloadOf(random, row.payload);
  if (random.once(20)) {
    payload = payload.slice(0, random.below(payload.length + 1));
  }
  if (random.once(20)) payload = random.bytes(random.below(4097));
  const rule = row.descriptors;
  let sent = rule.kind === "count"
    ? Array.from({ length: rule.max }, () => random.pick(fds.all))
    : rule.kind === "byNofd" && (payload[1] & 1) === 0
    ? [fds.all[3]]
    : rule.kind === "perRegion"
    ? new Array(Math.min(8, payload[0] ?? 0)).fill(fds.memory)
    : [];
  if (random.once(10)) sent = fds.some(random);
  // Without NEED_REPLY a refusal is the end: seldom, so that much is reached.
  const flags = random.once(100) ? random.below(256) : 1 | 8;
  connection.send(random.once(100) ? random.word() : row.id, payload, {
    flags,
    fds: sent.slice(0, 32),
  });
}

/** Reads whatever comes until the end. */
async function swallow(connection: FrontendConnection): Promise<void> {
  for (;;) {
    const message = await connection.receive();
    if (message === null) return;
    message.descriptors.close();
  }
}

async function fuzzMessages(world: World, random: Random): Promise<void> {
  const fds = new Fds();
  try {
    for (let life = 0; life < 100; life++) {
      const connection = await world.connect();
      const reading = swallow(connection);
      for (let i = 0; i < 50 && connection.isOpen; i++) {
        sendRandom(connection, random, fds);
        if (random.once(10)) {
          await new Promise((resolve) => setImmediate(resolve));
        }
      }
      // What was sent is taken, and so are replies, before the end.
      if (random.once(2)) {
        await new Promise((resolve) => setTimeout(resolve));
      }
      connection.close();
      await within(reading, "the end of the replies");
      await world.ended(connection);
      if (life % 10 === 0) await world.other.serve();
    }
  } finally {
    fds.close();
  }
}

/** Random descriptors, heads and indices in the rings of a device. */
function scribble(device: VhostUserDevice, random: Random): void {
  const driver = random.pick(device.queues);
  const size = driver.queueSize;
  const [region] = device.ram.regions;
  const address = () =>
    random.once(10) ? random.long() : BigInt(random.below(region.size));
  for (let i = 0; i < random.below(16); i++) {
    driver.descriptor(random.below(size), {
      address: address(),
      length: random.once(10) ? random.word() : random.below(8192),
      flags: random.once(20) ? random.below(65536) : random.below(8),
      next: random.once(20) ? random.below(65536) : random.below(size),
    });
  }
  // A block header somewhere, so that requests get as far as the backing.
  const at = random.below(region.size - 16);
  new DataView(region.bytes.buffer, region.bytes.byteOffset).setUint32(
    at,
    random.pick([0, 1, 4, 8, 11, 13]),
    true,
  );
  if (random.once(50)) {
    driver.setAvailableIndex(random.below(65536));
  } else {
    for (let i = 0; i < random.below(8); i++) {
      driver.publish(
        random.once(50) ? random.below(65536) : random.below(size),
      );
    }
  }
  // All of the memory is the guest's: the rings' fields too.
  if (random.once(10)) {
    region.bytes.set(random.bytes(64), random.below(region.size - 64));
  }
  driver.kick();
}

async function fuzzRings(world: World, random: Random): Promise<void> {
  for (let life = 0; life < 30; life++) {
    const device = await world.open({
      queueCount: 2,
      queueSize: random.pick([2, 16, 128]),
      ramSize: random.pick([1 << 16, 1 << 20]),
      usesCalls: false,
    });
    for (let i = 0; i < 100 && device.connection.isOpen; i++) {
      scribble(device, random);
      if (random.once(5)) {
        await new Promise((resolve) => setImmediate(resolve));
      }
      try {
        if (random.once(40)) await device.stopQueue(0);
        if (random.once(40)) {
          await device.startQueue(0, { base: random.below(65536) });
        }
      } catch (error) {
        // A hole was found meanwhile, and that was the end.
        if (device.connection.isOpen) throw error;
      }
      // And now and then a piece of it is no more.
      if (random.once(400)) {
        device.ram.regions[0].resizeFile(random.below(1 << 16));
      }
    }
    const { connection } = device;
    connection.close();
    await device.close();
    await world.ended(connection);
    if (life % 5 === 0) await world.other.serve();
  }
}

const backings = { memoryBacking, nullBacking };

for (const seed of seeds) {
  const name = seed % 2 === 0 ? "memoryBacking" : "nullBacking";
  const victim = (): Victim => ({
    disk: { backing: backings[name](diskSize), numQueues: 2 },
  });
  test(`random messages to a disk of ${name}, seed ${seed}`, () =>
    withBystander(async (world) => {
      const before = anonymousBytes();
      await fuzzMessages(world, new Random(seed));
      assert.ok(anonymousBytes() - before < slack);
    }, victim));

  test(`random rings of a disk of ${name}, seed ${seed}`, () =>
    withBystander(async (world) => {
      const before = anonymousBytes();
      await fuzzRings(world, new Random(seed));
      assert.ok(anonymousBytes() - before < slack);
    }, victim));
}
