// The inflight region is the front-end's memory: what it is said to be, what is
// in it, and whether it is still there, are all the enemy's choice.
import assert from "node:assert/strict";
import type { FrontendConnection } from "../../frontend/connection.ts";
import {
  GuestRam,
  type InflightWithFile,
  type VhostUserDevice,
} from "../../frontend/mod.ts";
import { core } from "../../ffi/core.ts";
import { featureMask, ProtocolFeature } from "../../mod.ts";
import { FrontendRequest as Id } from "../../protocol/frontend_request.ts";
import { test } from "../harness.ts";
import { within } from "../support/wait.ts";
import { assertEnds, assertRefused, join, longs, words } from "./messages.ts";
import { blkHeader, withBystander, type World } from "./world.ts";

const queueSize = 16;
/** 16 bytes, and 16 for each descriptor, rounded up to 64. */
const stride = 320;

/** The message's payload: 20 bytes, padded to 24. */
function shape(
  mmapSize: bigint,
  mmapOffset: bigint,
  numQueues: number,
  size: number,
): Uint8Array {
  return join(
    longs(mmapSize, mmapOffset),
    words(numQueues | (size << 16), 0),
  );
}

const negotiated = featureMask(
  ProtocolFeature.MQ,
  ProtocolFeature.REPLY_ACK,
  ProtocolFeature.CONFIG,
  ProtocolFeature.INFLIGHT_SHMFD,
);

async function connect(world: World): Promise<FrontendConnection> {
  const connection = await world.connect();
  await connection.setProtocolFeatures(negotiated, { ack: true });
  return connection;
}

test("row 4: GET_INFLIGHT_FD in a loop leaks nothing", () =>
  withBystander(async (world) => {
    await world.repeat(10, async () => {
      const connection = await connect(world);
      for (let i = 0; i < 100; i++) {
        const { fd } = await connection.getInflightFd(1 + i % 2, 1024);
        core.descriptorClose(fd);
      }
      await world.leave(connection);
    });
  }));

test("row 4: a front-end that takes no answer costs no descriptor once it has gone", () =>
  withBystander(async (world) => {
    await world.repeat(5, async () => {
      const connection = await connect(world);
      for (let i = 0; i < 50; i++) {
        connection.send(Id.GET_INFLIGHT_FD, shape(0n, 0n, 2, 32768));
      }
      connection.close();
      await world.ended(connection);
    });
  }));

test("rows 7 and 8: a region that cannot be what it is said to be is refused", () =>
  withBystander(async (world) => {
    using ram = new GuestRam([{ size: 4096 }]);
    const { fd } = ram.regions[0];
    const good = shape(BigInt(2 * stride), 0n, 2, queueSize);
    const top = (1n << 64n) - 1n;
    const wrong: readonly (readonly [Uint8Array, RegExp])[] = [
      [shape(4096n, 0n, 0, queueSize), /num queues 0 is not from 1 to 2/],
      [shape(4096n, 0n, 3, queueSize), /num queues 3 is not from 1 to 2/],
      [shape(4096n, 0n, 0xffff, 1), /num queues 65535/],
      [shape(4096n, 0n, 2, 0), /queue size 0 is not from 1 to 32768/],
      [shape(4096n, 0n, 2, 0xffff), /queue size 65535/],
      [shape(4096n, 0n, 2, 32768), /2 queues of 32768 need 1048704/],
      [shape(BigInt(2 * stride - 1), 0n, 2, queueSize), /need 640/],
      [shape(0n, 0n, 1, 1), /need 64/],
      [shape(4097n, 0n, 2, queueSize), /its file is shorter/],
      [shape(4096n, 8n, 2, queueSize), /its file is shorter/],
      [shape(640n, 4096n, 2, queueSize), /its file is shorter/],
      [shape(640n, 4n, 2, queueSize), /not a multiple of 8/],
      [shape(640n, top - 7n, 2, queueSize), /passes the end/],
      [shape(top, 8n, 2, queueSize), /passes the end/],
      [shape(1n << 62n, 1n << 62n, 2, queueSize), /its file is shorter/],
    ];
    const event = world.eventfd();
    await world.repeat(5, async () => {
      const connection = await connect(world);
      const { SET_INFLIGHT_FD: set } = Id;
      for (const [payload, reason] of wrong) {
        await assertRefused(world, connection, set, payload, reason, [fd]);
      }
      await assertRefused(world, connection, set, good, /not shared/, [event]);
      const none = /0 descriptors|descriptors? came|takes 1|needs 1/;
      await assertRefused(world, connection, set, good, none, []);
      const more = /2 descriptors|takes 1|at most 1/;
      await assertRefused(world, connection, set, good, more, [fd, fd]);
      const many = new Array<number>(8).fill(fd);
      await assertRefused(world, connection, set, good, /8|takes 1/, many);
      const ack = await connection.acknowledged(set, good, { fds: [fd] });
      assert.equal(ack, 0n);
      await world.leave(connection);
    });
  }));

test("rows 7 and 8: a GET_INFLIGHT_FD that cannot be answered ends the connection", () =>
  withBystander(async (world) => {
    using ram = new GuestRam([{ size: 4096 }]);
    const { fd } = ram.regions[0];
    const wrong: readonly (readonly [Uint8Array, number[], RegExp])[] = [
      [shape(0n, 0n, 3, 128), [], /num queues 3/],
      [shape(0n, 0n, 0, 128), [], /num queues 0/],
      [shape(0n, 0n, 1, 0), [], /queue size 0/],
      [shape(0n, 0n, 1, 32769), [], /queue size 32769/],
      [shape(0n, 0n, 1, 128), [fd], /GET_INFLIGHT_FD/],
      [shape(0n, 0n, 1, 128), [fd, fd], /GET_INFLIGHT_FD/],
      [shape(0n, 0n, 1, 128), new Array(8).fill(fd), /GET_INFLIGHT_FD/],
    ];
    await world.repeat(3, async () => {
      for (const [payload, fds, reason] of wrong) {
        const connection = await connect(world);
        await assertEnds(
          world,
          connection,
          () => connection.send(Id.GET_INFLIGHT_FD, payload, { fds }),
          reason,
        );
      }
    });
  }));

/** A device with a region that the test can write, and its writer. */
async function openWithRegion(
  world: World,
  fill: (view: DataView) => void,
): Promise<{ device: VhostUserDevice; ram: GuestRam }> {
  const ram = new GuestRam([{ size: 4096 }]);
  fill(viewOf(ram));
  const device = await world.open({
    protocolFeatures: negotiated & ~featureMask(ProtocolFeature.INFLIGHT_SHMFD),
    recovers: true,
    queueSize,
    start: false,
  });
  await device.connection.setVringErr(0, world.errorFd, { ack: true });
  await device.activate();
  const given: InflightWithFile = {
    description: {
      mmapSize: 4096n,
      mmapOffset: 0n,
      numQueues: 1,
      queueSize,
    },
    fd: ram.regions[0].fd,
  };
  await device.connection.setInflightFd(given, { ack: true });
  return { device, ram };
}

function viewOf(ram: GuestRam): DataView {
  const { bytes } = ram.regions[0];
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** A part as a back-end leaves it with nothing in flight. */
function sound(view: DataView): void {
  view.setUint16(8, 1, true);
  view.setUint16(10, queueSize, true);
}

async function assertServes(device: VhostUserDevice): Promise<void> {
  const answer = await within(
    device.queues[0].submit({ readable: [blkHeader(0)], writable: [512, 1] }),
    "a read",
  );
  assert.equal(answer.data[1][0], 0);
}

const damages: readonly (readonly [string, (view: DataView) => void])[] = [
  ["another version", (view) => view.setUint16(8, 2, true)],
  ["desc_num below the queue", (view) => view.setUint16(10, 8, true)],
  ["desc_num beyond the region", (view) => view.setUint16(10, 17, true)],
  ["desc_num of all ones", (view) => view.setUint16(10, 0xffff, true)],
  ["a last_batch_head outside", (view) => {
    view.setUint16(12, queueSize, true);
    view.setUint16(14, 0xffff, true);
  }],
  ["a next outside", (view) => {
    view.setUint16(12, 3, true);
    view.setUint16(14, 0xfffe, true);
    view.setUint16(16 + 3 * 16 + 6, 0xffff, true);
  }],
  ["a next that leads to itself", (view) => {
    view.setUint16(12, 3, true);
    view.setUint16(14, 0xfffe, true);
    view.setUint16(16 + 3 * 16 + 6, 3, true);
  }],
  ["a batch longer than the queue", (view) => view.setUint16(14, 5, true)],
];

for (const [what, damage] of damages) {
  test(`row 12: a region with ${what} starts no queue`, () =>
    withBystander(async (world) => {
      // Its eventfd is there before descriptors are counted.
      assert.ok(world.errorFd >= 0);
      await world.repeat(3, async () => {
        const { device, ram } = await openWithRegion(world, (view) => {
          sound(view);
          damage(view);
        });
        await device.startQueue(0);
        await world.reported(/its inflight region is damaged/);
        await world.signalled(world.errorFd);
        // Set right, it is started when the front-end sets it up again.
        new Uint8Array(viewOf(ram).buffer).fill(0);
        sound(viewOf(ram));
        await device.startQueue(0);
        await assertServes(device);
        await device.close();
        ram.close();
      });
    }));
}

test("row 12: heads that nobody made available are only what they say", () =>
  withBystander(async (world) => {
    const { device, ram } = await openWithRegion(world, (view) => {
      sound(view);
      // All marked, with counters that no back-end gives.
      for (let head = 0; head < queueSize; head++) {
        view.setUint8(16 + head * 16, 0xff);
        view.setBigUint64(24 + head * 16, BigInt(-head), true);
      }
    });
    await device.startQueue(0);
    // Their descriptors are empty: the ring is broken, no more.
    await world.reported(/Cannot go on with queue 0/);
    await device.close();
    ram.close();
  }));

test("a region that is written while it is used changes nothing", () =>
  withBystander(async (world) => {
    const { device, ram } = await openWithRegion(world, () => {});
    await device.startQueue(0);
    const { bytes } = ram.regions[0];
    for (let i = 0; i < 100; i++) {
      bytes.fill(i * 37);
      await assertServes(device);
    }
    await device.close();
    ram.close();
  }));

for (const when of ["before the start", "while it is used"]) {
  test(`a region that shrinks ${when} is memory taken away`, () =>
    withBystander(async (world) => {
      // Its eventfd is there before descriptors are counted.
      assert.ok(world.errorFd >= 0);
      await world.repeat(3, async () => {
        const { device, ram } = await openWithRegion(world, () => {});
        if (when === "while it is used") {
          await device.startQueue(0);
          await assertServes(device);
        }
        ram.regions[0].resizeFile(0);
        if (when === "before the start") await device.startQueue(0);
        else {
          device.queues[0].submit({
            readable: [blkHeader(0)],
            writable: [512, 1],
          }).catch(() => {});
        }
        await world.reported(/the front-end took guest memory away/);
        await world.ended(device.connection);
        await device.close();
        ram.close();
        await world.other.serve();
      });
    }));
}
