// Configuration space. Rows are those of the catalogue of hostile inputs.
import assert from "node:assert/strict";
import { FrontendRequest as Id } from "../../frontend/mod.ts";
import { RefusedError } from "../../frontend/refused_error.ts";
import { test } from "../harness.ts";
import { assertRefused, join, words } from "./messages.ts";
import { withBystander } from "./world.ts";

const configSize = 60;

test("row 20: SET_CONFIG cut short, past the end or wrapping is refused", () =>
  withBystander(async (world) => {
    const connection = await world.connect();
    const before = await connection.getConfig(0, configSize);
    // offset, size and flags as they say, then the data that really comes.
    const cases: [number, number, number, number, RegExp][] = [
      [0, configSize, 0, 8, /20 bytes/],
      [32, 1, 0, 0, /12 bytes/],
      [0, 0xffffffff, 0, 1, /13 bytes/],
      [0xffffffff, 1, 0, 1, /1 bytes at 4294967295 pass/],
      [0xffffffff, 0xffffffff, 0, 256, /268 bytes/],
      [configSize, 1, 0, 1, /1 bytes at 60 pass its end/],
      [configSize + 1, 0, 0, 0, /0 bytes at 61 pass its end/],
      [32, 29, 0, 29, /29 bytes at 32 pass its end/],
      [0, 257, 0, 257, /269 bytes/],
      [32, 1, 2, 1, /flags 2 are not known/],
      [32, 1, 0xffffffff, 1, /flags \d+ are not known/],
    ];
    await world.repeat(20, async () => {
      for (const [offset, size, flags, length, reason] of cases) {
        const payload = join(
          words(offset, size, flags),
          new Uint8Array(length).fill(0xff),
        );
        const id = Id.SET_CONFIG;
        await assertRefused(world, connection, id, payload, reason);
      }
    });
    assert.deepEqual(await connection.getConfig(0, configSize), before);
    await world.leave(connection);
  }));

test("row 20: GET_CONFIG out of bounds answers with an empty payload, and the connection stays", () =>
  withBystander(async (world) => {
    const connection = await world.connect();
    const cases: [number, number, number][] = [
      [0xffffffff, 1, 1],
      [1, 256, 256],
      [257, 0, 0],
      [0, 0xffffffff, 4],
      [0, 257, 257],
    ];
    for (const [offset, size, length] of cases) {
      const payload = join(words(offset, size, 0), new Uint8Array(length));
      const reply = await connection.request(Id.GET_CONFIG, payload);
      assert.equal(reply.payload.length, 0, `${size} at ${offset}`);
      await world.reported(/GET_CONFIG/);
    }
    await connection.barrier();
    await world.leave(connection);
  }));

test("row 21: GET_CONFIG of a device that has lost its store is refused by an empty reply, again and again", () =>
  withBystander(async (world) => {
    const connection = await world.connect();
    await world.repeat(50, async () => {
      await assert.rejects(connection.getConfig(0, 8), RefusedError);
      await world.reported(/GET_CONFIG.*the store has gone/);
      await assert.rejects(
        connection.setConfig(0, Uint8Array.of(1), { ack: true }),
        RefusedError,
      );
      await world.reported(/SET_CONFIG.*the store has gone/);
    });
    await world.leave(connection);
  }, {
    device: () => ({
      getConfig() {
        throw new Error("the store has gone");
      },
      setConfig() {},
    }),
  }));

test("row 47: what lies behind the configuration space reads as zeros, never as memory of ours", () =>
  withBystander(async (world) => {
    const connection = await world.connect();
    const whole = await connection.getConfig(0, 256);
    assert.deepEqual(
      whole.subarray(configSize),
      new Uint8Array(256 - configSize),
    );
    for (const [offset, size] of [[59, 197], [60, 196], [255, 1], [256, 0]]) {
      const bytes = await connection.getConfig(offset, size);
      assert.deepEqual(bytes, whole.slice(offset, offset + size));
    }
    await world.leave(connection);
  }));

test("row 47: a device that answers more than it may shows no more than was asked", () =>
  withBystander(async (world) => {
    const connection = await world.connect();
    assert.deepEqual(
      await connection.getConfig(8, 4),
      Uint8Array.of(8, 9, 10, 11),
    );
    await world.leave(connection);
  }, {
    device: () => ({
      getConfig: () => Uint8Array.from({ length: 4096 }, (_, i) => i),
    }),
  }));
