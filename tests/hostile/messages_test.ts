// The control socket. Rows are those of the catalogue of hostile inputs.
import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import { check } from "../../ffi/errors.ts";
import { FrontendConnection } from "../../frontend/connection.ts";
import { FrontendRequest as Id, RefusedError } from "../../frontend/mod.ts";
import { frontendRequests } from "../../protocol/frontend_request.ts";
import { encodeHeader } from "../../protocol/message.ts";
import { payloadCodecs } from "../../protocol/request_row.ts";
import { test } from "../harness.ts";
import {
  assertEnds,
  assertRefused,
  join,
  longs,
  memoryTable,
  wireRegion,
  words,
} from "./messages.ts";
import { withBystander, type World } from "./world.ts";

const rounds = 200;
const needReply = 0x8;

/** The messages that a device of ours takes in normal operation. */
const taken = frontendRequests.filter(({ id }) =>
  id <= 5 || (id >= 8 && id <= 18) || [21, 24, 25, 34].includes(id) ||
  (id >= 36 && id <= 40)
);

function repeated(fd: number, count: number): number[] {
  return new Array(count).fill(fd);
}

/** A connection for one attack; its device has gone at the end. */
async function connected(
  world: World,
  body: (connection: FrontendConnection) => Promise<void>,
): Promise<void> {
  const connection = await world.connect();
  try {
    await body(connection);
  } finally {
    await world.leave(connection);
  }
}

test("row 2: a vring index beyond the queues is refused, also where its low bits are a queue's", () =>
  withBystander(async (world) => {
    const event = world.eventfd();
    await world.repeat(4, () =>
      connected(world, async (connection) => {
        const indices = [2, 3, 0x100, 0x10000, 0x10001, 0x80000000, 0xffffffff];
        for (const index of indices) {
          for (
            const id of [
              Id.SET_VRING_NUM,
              Id.SET_VRING_BASE,
              Id.SET_VRING_ENABLE,
            ]
          ) {
            const payload = words(index, 1);
            await assertRefused(world, connection, id, payload, /vring \d+ of/);
          }
          await assertRefused(
            world,
            connection,
            Id.SET_VRING_ADDR,
            join(words(index, 0), longs(0n, 0n, 0n, 0n)),
            /vring \d+ of 2/,
          );
        }
        for (const index of [2n, 0x7fn, 0xffn]) {
          for (
            const id of [Id.SET_VRING_KICK, Id.SET_VRING_CALL, Id.SET_VRING_ERR]
          ) {
            const payload = longs(index);
            const reason = /vring \d+ of 2/;
            await assertRefused(world, connection, id, payload, reason, [
              event,
            ]);
          }
        }
        // It has a reply, and none that says no.
        await assertEnds(
          world,
          connection,
          () => connection.send(Id.GET_VRING_BASE, words(0x10000, 0)),
          /GET_VRING_BASE: vring 65536 of 2/,
        );
      }));
  }));

test("row 5: more descriptors than the message takes, for every message", () =>
  withBystander(async (world) => {
    const event = world.eventfd();
    let round = 0;
    const attack = async () => {
      const row = taken[round % taken.length];
      const connection = await world.connect();
      const count = row.descriptors.kind === "count" ? row.descriptors.max : 1;
      const extra = 1 + Math.floor(round / taken.length) % 6;
      const sizes = payloadCodecs[row.payload].minSize;
      connection.send(row.id, new Uint8Array(sizes), {
        needReply: true,
        fds: repeated(event, count + extra),
      });
      const message = await connection.receive();
      if (message !== null) {
        // GET_CONFIG says no by an empty reply, others by a number.
        const isRefused = message.payload.every((byte) => byte === 0)
          ? row.id === Id.GET_CONFIG && message.payload.length === 0
          : true;
        assert.ok(isRefused, `${row.name} was accepted`);
      }
      await world.leave(connection);
      await world.reported(/carries \d descriptors, needs/);
      round++;
    };
    await world.repeat(rounds, attack);
  }));

test("row 6: SET_VRING_NUM again and again, also on a running queue, costs nothing", () =>
  withBystander(async (world) => {
    const device = await world.open();
    const { connection } = device;
    await world.repeat(rounds, async (round) => {
      await connection.setVringNum(0, 2 << (round % 7), { ack: true });
    });
    assert.deepEqual(world.errors, []);
    await device.close();
  }));

test("row 9: a payload above the limit, with descriptors, ends the connection", () =>
  withBystander(async (world) => {
    const event = world.eventfd();
    const sizes = [4097, 0x10000, 0x7fffffff, 0x80000000, 0xffffffff];
    await world.repeat(rounds, async (round) => {
      const connection = await world.connect();
      const size = sizes[round % sizes.length];
      const header = encodeHeader({ request: 5, flags: 1, size });
      await assertEnds(
        world,
        connection,
        () => connection.sendRaw(header, repeated(event, 8)),
        /payload of \d+ bytes/,
      );
    });
  }));

test("row 10: more than 8 descriptors at once, or in all parts of a message, are closed", () =>
  withBystander(async (world) => {
    const event = world.eventfd();
    const barrier = encodeHeader({ request: 1, flags: 1, size: 0 });
    await world.repeat(rounds, async (round) => {
      const connection = await world.connect();
      const count = 9 + round % 24;
      await assertEnds(
        world,
        connection,
        () => connection.sendRaw(barrier, repeated(event, count)),
        /more than 8 descriptors/,
      );
    });
    await world.repeat(20, async () => {
      const connection = await world.connect();
      // Every byte of the header brings some: a drip instead of a flood.
      await assertEnds(
        world,
        connection,
        () => {
          for (let i = 0; i < barrier.length; i++) {
            if (connection.sendRaw(barrier.subarray(i, i + 1), [event]) === 0) {
              break;
            }
          }
        },
        /9 descriptors in one message/,
      );
    });
  }));

test("row 10: a stream that ends inside a message closes what came with it", () =>
  withBystander(async (world) => {
    const event = world.eventfd();
    const header = encodeHeader({ request: 12, flags: 1, size: 8 });
    const whole = join(header, longs(0n));
    await world.repeat(rounds, async (round) => {
      const connection = await world.connect();
      const cut = 1 + round % (whole.length - 1);
      connection.sendRaw(whole.subarray(0, cut), [event]);
      await world.leave(connection);
      await world.reported(/the stream ends inside a message/);
    });
  }));

test("row 11: descriptors on messages that take none are refused and closed", () =>
  withBystander(async (world) => {
    const event = world.eventfd();
    const { SET_FEATURES, SET_OWNER, SET_VRING_NUM, SET_VRING_ENABLE } = Id;
    const requests: [number, Uint8Array][] = [
      [SET_FEATURES, longs(0n)],
      [SET_OWNER, new Uint8Array(0)],
      [SET_VRING_NUM, words(0, 128)],
      [SET_VRING_ENABLE, words(0, 1)],
      // Bit 8 says that there is none.
      [Id.SET_VRING_KICK, longs(0x100n)],
    ];
    await world.repeat(
      rounds / 10,
      () =>
        connected(world, async (connection) => {
          for (const [id, payload] of requests) {
            const reason = /carries 1 descriptors, needs 0/;
            await assertRefused(world, connection, id, payload, reason, [
              event,
            ]);
          }
          await assertEnds(
            world,
            connection,
            () =>
              connection.send(Id.GET_FEATURES, undefined, {
                fds: [event, event],
              }),
            /GET_FEATURES carries 2 descriptors/,
          );
        }),
    );
  }));

test("row 16: a queue size that is 0, too large or no power of two is refused", () =>
  withBystander((world) =>
    connected(world, async (connection) => {
      for (const size of [0, 3, 127, 1025, 65536, 0x80000000, 0xffffffff]) {
        await assertRefused(
          world,
          connection,
          Id.SET_VRING_NUM,
          words(0, size),
          /queue size \d+ is not (a power of two|from 1 to)/,
        );
      }
    })
  ));

test("row 16: SET_MEM_TABLE with 9 regions, or another number of descriptors", () =>
  withBystander(async (world) => {
    const device = await world.open({ start: false });
    const region = wireRegion(device.ram.regions[0]);
    const { fd } = device.ram.regions[0];
    const some = (count: number) =>
      Array.from({ length: count }, (_, i) => ({
        ...region,
        gpa: BigInt(i) << 40n,
        uva: BigInt(i) << 40n,
        size: 4096n,
      }));
    const cases: [Uint8Array, number, RegExp][] = [
      [memoryTable(some(9)), 8, /9 regions, limit is 8/],
      [memoryTable(some(1), 0xffffffff), 1, /4294967295 regions/],
      [memoryTable(some(2)), 1, /carries 1 descriptors, needs 2/],
      [memoryTable(some(2)), 0, /carries 0 descriptors, needs 2/],
      [memoryTable(some(2)), 3, /carries 3 descriptors, needs 2/],
      [memoryTable([]), 1, /carries 1 descriptors, needs 0/],
      [memoryTable(some(1), 2), 2, /40 bytes/],
      [memoryTable(some(2), 1), 1, /72 bytes/],
    ];
    await world.repeat(rounds / 10, async () => {
      for (const [payload, count, reason] of cases) {
        const fds = repeated(fd, count);
        const id = Id.SET_MEM_TABLE;
        await assertRefused(world, device.connection, id, payload, reason, fds);
      }
    });
    await device.close();
  }));

test("row 16: a payload shorter or longer than its structure, for every message", () =>
  withBystander(async (world) => {
    const event = world.eventfd();
    for (const row of taken) {
      const { minSize, maxSize } = payloadCodecs[row.payload];
      const sizes = new Set([0, 1, minSize - 1, maxSize + 1, 4096]);
      for (const size of sizes) {
        if (size < 0 || (size >= minSize && size <= maxSize)) continue;
        const connection = await world.connect();
        const fds = row.descriptors.kind === "count"
          ? repeated(event, row.descriptors.min)
          : [];
        connection.send(row.id, new Uint8Array(size), { needReply: true, fds });
        const answer = await connection.receive();
        const isRefused = answer === null ||
          answer.payload.some((byte) => byte !== 0) ||
          (row.id === Id.GET_CONFIG && answer.payload.length === 0);
        assert.ok(isRefused, `${row.name} with ${size} bytes was accepted`);
        await world.leave(connection);
        await world.reported(new RegExp(`${row.name}.*${size} bytes`));
      }
    }
  }));

test("row 16: a message may come in any number of pieces", () =>
  withBystander((world) =>
    connected(world, async (connection) => {
      const event = world.eventfd();
      const kick = join(
        encodeHeader({ request: 12, flags: 1, size: 8 }),
        longs(1n),
      );
      for (const step of [1, 5, 12, 19]) {
        for (let at = 0; at < kick.length; at += step) {
          connection.sendRaw(
            kick.subarray(at, at + step),
            at === 0 ? [event] : [],
          );
          // The back-end gets its turn between the pieces.
          await new Promise((resolve) => setTimeout(resolve));
        }
        await connection.barrier();
      }
      assert.deepEqual(world.errors, []);
    })
  ));

test("row 17: a base that does not fit the ring's indices is refused", () =>
  withBystander((world) =>
    connected(world, async (connection) => {
      for (const base of [0x10000, 0x80000000, 0xffffffff]) {
        await assertRefused(
          world,
          connection,
          Id.SET_VRING_BASE,
          words(0, base),
          /base \d+ does not fit 16 bits/,
        );
      }
      await connection.setVringBase(0, 0xffff, { ack: true });
      assert.equal(await connection.getVringBase(0), 0xffff);
    })
  ));

test("row 18: requests that nobody knows: an error ack, or the end", () =>
  withBystander(async (world) => {
    const unknown = [0, 46, 1000, 0x7fffffff, 0x80000000, 0xffffffff];
    await connected(world, async (connection) => {
      for (const request of unknown) {
        const payload = new Uint8Array(24);
        const reason = /unknown request \d+/;
        await assertRefused(world, connection, request, payload, reason);
      }
    });
    for (const request of unknown) {
      const connection = await world.connect();
      await assertEnds(
        world,
        connection,
        () => connection.send(request),
        /unknown request \d+/,
      );
    }
  }));

test("row 18: every message whose feature is not negotiated is refused", () =>
  withBystander(async (world) => {
    const others = frontendRequests.filter((row) => !taken.includes(row));
    assert.equal(others.length, 20);
    for (const row of others) {
      const connection = await world.connect();
      connection.send(
        row.id,
        new Uint8Array(payloadCodecs[row.payload].minSize),
        { needReply: true },
      );
      const answer = await connection.receive();
      if (answer !== null) assert.notEqual(answer.payload[0], 0, row.name);
      await world.leave(connection);
      await world.reported(new RegExp(row.name));
    }
  }));

test("row 19: protocol features that were not offered are refused, and their messages too", () =>
  withBystander(async (world) => {
    const connection = await world.connect();
    const offered = await connection.getProtocolFeatures();
    for (let bit = 0n; bit < 64n; bit++) {
      if ((offered >> bit & 1n) === 1n) continue;
      await assert.rejects(
        connection.setProtocolFeatures(offered | 1n << bit, { ack: true }),
        RefusedError,
      );
      await world.reported(/was not offered/);
    }
    await assertEnds(
      world,
      connection,
      () => connection.send(Id.GET_INFLIGHT_FD, new Uint8Array(24)),
      /GET_INFLIGHT_FD needs INFLIGHT_SHMFD, which is not negotiated/,
    );
  }));

test("row 19: virtio features that were not offered are refused", () =>
  withBystander((world) =>
    connected(world, async (connection) => {
      const offered = await connection.getFeatures();
      for (let bit = 0n; bit < 64n; bit++) {
        if ((offered >> bit & 1n) === 1n) continue;
        await assertRefused(
          world,
          connection,
          Id.SET_FEATURES,
          longs(offered | 1n << bit),
          /was not offered/,
        );
      }
    })
  ));

test("row 24: SET_OWNER twice, GET_VRING_BASE of a ring that never started", () =>
  withBystander((world) =>
    connected(world, async (connection) => {
      await connection.setOwner({ ack: true });
      await connection.setOwner({ ack: true });
      assert.equal(await connection.getVringBase(0), 0);
      assert.equal(await connection.getVringBase(0), 0);
      await connection.setVringBase(1, 77, { ack: true });
      assert.equal(await connection.getVringBase(1), 77);
      assert.equal(await connection.getVringBase(1), 77);
    })
  ));

test("row 24: SET_VRING_ENABLE with anything but 0 and 1 is refused", () =>
  withBystander((world) =>
    connected(world, async (connection) => {
      for (const value of [2, 256, 0xffffffff]) {
        await assertRefused(
          world,
          connection,
          Id.SET_VRING_ENABLE,
          words(0, value),
          /enable must be 0 or 1/,
        );
      }
    })
  ));

test("row 24: version 0, 2 and 3, and the REPLY bit, end the connection", () =>
  withBystander(async (world) => {
    const event = world.eventfd();
    const cases: [number, RegExp][] = [
      [0, /version is 0/],
      [2, /version is 2/],
      [3, /version is 3/],
      [1 | 4, /REPLY bit/],
      [1 | 4 | needReply, /REPLY bit/],
    ];
    await world.repeat(rounds, async (round) => {
      const [flags, reason] = cases[round % cases.length];
      const connection = await world.connect();
      await assertEnds(
        world,
        connection,
        () =>
          connection.send(Id.SET_VRING_KICK, longs(0n), {
            flags,
            fds: [event],
          }),
        reason,
      );
    });
  }));

test("row 23: kick, call and error descriptors that are no eventfd are refused and closed", () =>
  withBystander(async (world) => {
    const file = check(core.memfdCreate(4096), "Cannot make a file");
    const ends = new Int32Array(2);
    check(core.socketPair(ends), "Cannot make sockets");
    const { SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR } = Id;
    await world.repeat(
      rounds / 10,
      () =>
        connected(world, async (connection) => {
          for (const id of [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR]) {
            for (const fd of [file, ends[0]]) {
              const reason = /it is not an eventfd/;
              const payload = longs(0n);
              await assertRefused(world, connection, id, payload, reason, [fd]);
            }
          }
        }),
    );
    for (const fd of [file, ...ends]) core.descriptorClose(fd);
  }));

test("row 23: a back-end channel that is not a connected socket is refused and closed", () =>
  withBystander(async (world) => {
    const file = check(core.memfdCreate(4096), "Cannot make a file");
    const event = world.eventfd();
    await world.repeat(
      rounds / 10,
      () =>
        connected(world, async (connection) => {
          for (const fd of [file, event]) {
            await assertRefused(
              world,
              connection,
              Id.SET_BACKEND_REQ_FD,
              new Uint8Array(0),
              /it is not a connected socket/,
              [fd],
            );
          }
        }),
    );
    core.descriptorClose(file);
  }));

test("row 23: a back-end channel that talks out of turn is closed, the device goes on", () =>
  withBystander(async (world) => {
    const device = await world.open();
    const { connection } = device;
    for (const bytes of [new Uint8Array(64).fill(0xff), words(2, 5, 8, 0, 0)]) {
      const ends = new Int32Array(2);
      check(core.socketPair(ends), "Cannot make sockets");
      connection.send(Id.SET_BACKEND_REQ_FD, undefined, { fds: [ends[1]] });
      core.descriptorClose(ends[1]);
      await connection.barrier();
      const channel = FrontendConnection.fromFd(ends[0]);
      channel.sendRaw(bytes);
      await channel.closed;
      await connection.barrier();
    }
    await device.close();
  }));

test("row 23: one eventfd may kick two rings", () =>
  withBystander(async (world) => {
    const device = await world.open({ queueCount: 2 });
    const [first, second] = device.queues;
    await device.connection.setVringKick(1, first.kickFd, { ack: true });
    const header = new Uint8Array(16);
    const submit = second.submit({
      readable: [header],
      writable: [512, 1],
      kick: false,
    });
    const other = first.submit({ readable: [header], writable: [512, 1] });
    assert.equal((await submit).data[1][0], 0);
    assert.equal((await other).data[1][0], 0);
    await device.close();
  }));
