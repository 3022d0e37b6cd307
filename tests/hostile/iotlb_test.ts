// Front-ends that abuse the IOTLB, and drivers whose rings lose their pages
// (row 15): each beside a device that must not notice.
import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import {
  FrontendRequest as Id,
  type Iommu,
  type IotlbMessage,
  IotlbType,
  iova,
  type QueueDriver,
  supportedFeatures,
  uva,
  VhostUserDevice,
} from "../../frontend/mod.ts";
import { plainWire } from "../../protocol/layout.ts";
import { iotlbMessage } from "../../protocol/payloads.ts";
import { BlkRequestType, encodeBlkHeader } from "../../frontend/blk.ts";
import { test } from "../harness.ts";
import { eventually, within } from "../support/wait.ts";
import { anonymousBytes } from "./accounting.ts";
import { Random } from "./random.ts";
import { withBystander, type World } from "./world.ts";

type Guest = VhostUserDevice<QueueDriver> & { readonly iommu: Iommu };

const pageSize = 4096;
/** What garbage, and the test itself, may take meanwhile. */
const slack = 64 << 20;
const formats = [["split", false], ["packed", true]] as const;

async function open(world: World, packed = false): Promise<Guest> {
  const guest = await VhostUserDevice.open({
    path: world.path,
    features: supportedFeatures,
    queueCount: 2,
    queueSize: 16,
    ramSize: 1 << 20,
    iommu: true,
    packed,
  });
  return guest as Guest;
}

/** A read of the first sector. */
async function read(guest: Guest, queue = 0): Promise<void> {
  const { data } = await within(
    guest.queues[queue].submit({
      readable: [encodeBlkHeader(BlkRequestType.IN, 0n)],
      writable: [512, 1],
      initial: 0xff,
    }),
    "a read",
  );
  assert.equal(data[1][0], 0);
}

function message(fields: Partial<IotlbMessage>): IotlbMessage {
  return {
    iova: iova(0n),
    size: BigInt(pageSize),
    uva: uva(0n),
    permission: 3,
    type: IotlbType.UPDATE,
    ...fields,
  };
}

for (const [name, packed] of formats) {
  test(`row 15: ${name}: ring pages are invalidated and told again without end while the datapath runs`, async () => {
    await withBystander(async (world) => {
      const guest = await open(world, packed);
      const areas = guest.queues.flatMap(({ deviceAddresses }) =>
        Object.values(deviceAddresses)
      );
      let isRunning = true;
      const attack = async () => {
        for (let i = 0; isRunning; i++) {
          const area = areas[i % areas.length];
          const start = area - area % BigInt(pageSize);
          await guest.iommu.invalidate(start, BigInt(pageSize));
          // Sometimes told again at once, otherwise asked for.
          if (i % 3 === 0) await guest.iommu.update(start);
        }
      };
      const attacking = attack();
      for (let i = 0; i < 100; i++) await read(guest, i % 2);
      await world.other.serve();
      isRunning = false;
      await attacking;
      await guest.close();
      assert.deepEqual(world.errors, []);
    });
  });

  test(`row 15: ${name}: a ring led to other memory, or out of it, harms nobody`, async () => {
    await withBystander(async (world) => {
      const random = new Random(15);
      for (let round = 0; round < 20; round++) {
        const guest = await open(world, packed);
        await read(guest);
        const areas = Object.values(guest.queues[0].deviceAddresses);
        const area = random.pick(areas);
        const start = area - area % BigInt(pageSize);
        const target = random.pick([
          // Another page of the guest's, the same moved a little, nowhere.
          BigInt(random.below(200) * pageSize),
          BigInt(random.below(1 << 20)),
          random.long(),
        ]);
        await guest.connection.exchange(
          Id.IOTLB_MSG,
          message({
            iova: iova(start),
            uva: uva(guest.ram.regions[0].uva + target),
            permission: 1 + random.below(3),
          }),
        );
        for (const driver of guest.queues) driver.kick();
        await guest.connection.barrier();
        await world.other.serve();
        guest.connection.close();
        await guest.close();
        await world.ended(guest.connection);
      }
      // What a ring's bytes said is the guest's own doing.
      world.errors.length = 0;
    });
  });
}

test("a flood of updates takes a bounded amount of memory", async () => {
  await withBystander(async (world) => {
    const guest = await open(world);
    await read(guest);
    const before = anonymousBytes();
    // Each a page, none joined with another; as many at once as a socket takes.
    for (let round = 0; round < 400; round++) {
      const answers: Promise<bigint>[] = [];
      for (let i = 0; i < 50; i++) {
        const page = round * 50 + i;
        answers.push(guest.connection.exchange(
          Id.IOTLB_MSG,
          message({ iova: iova(BigInt(page * 2 * pageSize)) }),
        ));
      }
      for (const answer of await Promise.all(answers)) assert.equal(answer, 0n);
      if (round % 20 === 0) await world.other.serve();
    }
    assert.ok(anonymousBytes() - before < slack, "memory of the IOTLB");
    // What was evicted is asked for.
    await read(guest);
    await guest.close();
    assert.deepEqual(world.errors, []);
  });
});

test("a flood of refused messages is answered, and its reports are bounded", async () => {
  await withBystander(async (world) => {
    const guest = await open(world);
    const random = new Random(22);
    for (let i = 0; i < 3000; i++) {
      const answer = await guest.connection.exchange(
        Id.IOTLB_MSG,
        message({
          type: random.pick([0, 1, 2, 3, 4, 255]),
          size: random.pick([0n, random.long()]),
          iova: iova(random.long()),
          uva: uva(random.long()),
          permission: random.below(256),
        }),
      );
      assert.ok(answer === 0n || answer === 1n);
    }
    await read(guest);
    await guest.close();
    assert.ok(world.errors.length <= 1001, `${world.errors.length} reports`);
    world.errors.length = 0;
  });
});

test("misses that nobody answers, reads or maps cost a bounded amount, kick as the driver may", async () => {
  await withBystander(async (world) => {
    for (const how of ["silent", "refusing", "closed"] as const) {
      const guest = await open(world);
      await read(guest);
      const channel = await guest.connection.setBackendChannel({ ack: true });
      if (how === "silent") {
        guest.connection.onBackendRequest = () => new Promise(() => {});
      } else if (how === "refusing") {
        guest.connection.onBackendRequest = () => 1n;
      } else channel.close();
      const before = anonymousBytes();
      // As many pages as a chain may have, and another chain behind it.
      for (const start of [1n << 40n, 1n << 41n]) {
        guest.queues[0].submitChain(
          Array.from({ length: 8 }, (_, i) => ({
            address: start + BigInt(i * 64 * pageSize),
            length: 32 * pageSize,
            isWritable: true,
          })),
        ).catch(() => {});
      }
      for (let i = 0; i < 300; i++) {
        guest.queues[0].kick();
        await guest.connection.barrier();
      }
      await world.other.serve();
      assert.ok(anonymousBytes() - before < slack, `${how}: memory`);
      guest.connection.close();
      await guest.close();
      await world.ended(guest.connection);
    }
  });
});

test("a front-end that takes neither misses nor answers stops being read, and harms nobody", async () => {
  await withBystander(async (world) => {
    const guest = await open(world);
    await read(guest);
    guest.connection.onBackendRequest = () => new Promise(() => {});
    guest.connection.pause();
    const update = iotlbMessage.encode(message({ permission: 1 }), plainWire);
    const before = anonymousBytes();
    const header = new Uint32Array([Id.IOTLB_MSG, 1, update.length]);
    const frame = new Uint8Array([
      ...new Uint8Array(header.buffer),
      ...update,
    ]);
    let sent = 0;
    let isFull = 0;
    // Until the socket takes no more, since nobody reads the other end.
    while (isFull < 20 && sent < 1 << 26) {
      const count = guest.connection.sendRaw(frame);
      sent += count;
      isFull = count === frame.length ? 0 : isFull + 1;
      if (isFull > 0) {
        // Half a frame would end the connection, which is not the point.
        if (count > 0) break;
        await new Promise((resolve) => setTimeout(resolve, 1));
      }
    }
    assert.ok(sent < 1 << 26, "the back-end hoards its answers");
    await world.other.serve();
    assert.ok(anonymousBytes() - before < slack, "memory");
    guest.connection.resume();
    guest.connection.close();
    await guest.close();
    await world.ended(guest.connection);
    world.errors.length = 0;
  });
});

test("opening and leaving with misses out, in a loop, leaves nothing behind", async () => {
  await withBystander(async (world) => {
    await world.repeat(20, async (round) => {
      const guest = await open(world, round % 2 === 1);
      guest.iommu.onMiss = round % 3 === 0
        ? () => new Promise(() => {})
        : undefined;
      guest.queues[0].submitChain([
        { address: 1n << 40n, length: 1, isWritable: true },
      ]).catch(() => {});
      await guest.connection.barrier();
      guest.connection.close();
      await guest.close();
      await world.ended(guest.connection);
    });
  });
});

test("random IOTLB messages between requests: what is asked for again is right", async () => {
  await withBystander(async (world) => {
    const guest = await open(world);
    const random = new Random(33);
    for (let i = 0; i < 300; i++) {
      // Anything may be taken away at any time.
      const { descriptor } = guest.queues[0].deviceAddresses;
      await guest.iommu.invalidate(
        descriptor + BigInt(random.below(64) * pageSize - 8 * pageSize),
        BigInt(1 + random.below(8 * pageSize)),
      );
      // And what was never mapped be told of, as long as it is elsewhere.
      await guest.connection.exchange(
        Id.IOTLB_MSG,
        message({
          iova: iova(BigInt(random.below(1 << 20)) * 512n),
          uva: uva(random.long()),
          size: BigInt(1 + random.below(1 << 30)),
          permission: 1 + random.below(3),
        }),
      ).catch(() => {});
      if (i % 3 === 0) await read(guest, i % 2);
    }
    await eventually(() => guest.queues[0].inFlight === 0, "all is done");
    await guest.close();
    world.errors.length = 0;
  });
});

test("descriptors on an IOTLB message are closed with the connection that sent them", async () => {
  await withBystander(async (world) => {
    await world.repeat(5, async () => {
      const guest = await open(world);
      const event = core.eventfdCreate();
      guest.connection.send(
        Id.IOTLB_MSG,
        iotlbMessage.encode(message({}), plainWire),
        { fds: [event] },
      );
      core.descriptorClose(event);
      await within(guest.connection.closed, "the end of the connection");
      await guest.close();
      await world.ended(guest.connection);
    });
    world.errors.length = 0;
  });
});
