// SET_LOG_BASE from an enemy (hostile-inputs.md row 1, CVE-2020-10722): size and
// offset that wrap or pass the end of the file, files of other kinds, a log that
// shrinks, guest addresses beyond it.

import assert from "node:assert/strict";
import { binding, core } from "../../ffi/core.ts";
import { check } from "../../ffi/errors.ts";
import { DirtyLog } from "../../frontend/dirty_log.ts";
import type { VhostUserDevice } from "../../frontend/device.ts";
import {
  FrontendRequest as Request,
  supportedProtocolFeatures,
} from "../../frontend/mod.ts";
import { VRING_FLAG_LOG } from "../../protocol/payloads.ts";
import { gpa } from "../../protocol/address.ts";
import { test } from "../harness.ts";
import { guestMappingCount } from "../support/descriptors.ts";
import { within } from "../support/wait.ts";
import { assertEnds, assertRefused, longs } from "./messages.ts";
import { blkHeader, withBystander, type World } from "./world.ts";

const ramSize = 4 << 20;
const top = 2n ** 64n - 1n;

function open(world: World): Promise<VhostUserDevice> {
  return world.open({ ramSize, protocolFeatures: supportedProtocolFeatures });
}

/** Reads the disk's first sector. */
async function read(guest: VhostUserDevice): Promise<void> {
  const { data } = await within(
    guest.queues[0].submit({ readable: [blkHeader(0)], writable: [512, 1] }),
    "a read",
  );
  assert.deepEqual(data[1], Uint8Array.of(0));
}

function memfd(size: number): number {
  return check(core.memfdCreate(size), "Cannot make a memfd");
}

/** Size, offset, and why they cannot be: of a file of 4096 bytes. */
const wrong: readonly (readonly [string, bigint, bigint, RegExp])[] = [
  ["size + offset = 2^64", top - 0xfffn, 0x1000n, /passes 2\^64/],
  ["size + offset just past 2^64", 0x1000n, top, /passes 2\^64/],
  ["both at their end", top, top, /passes 2\^64/],
  ["no size", 0n, 0n, /size is 0/],
  ["no size, behind the file", 0n, 0x1000n, /size is 0/],
  ["a size past the file", 0x1001n, 0n, /holds 4096 bytes.*needs 4097/],
  ["an offset at its end", 1n, 0x1000n, /holds 4096 bytes/],
  ["an offset far away", 0x1000n, 1n << 62n, /holds 4096 bytes/],
  ["the whole address space", top, 0n, /holds 4096 bytes/],
];

for (const [what, size, offset, reason] of wrong) {
  test(`row 1: a log of ${what} is refused, and the one before goes on`, () =>
    withBystander(async (world) => {
      const guest = await open(world);
      const { connection } = guest;
      const log = await guest.startLog({ rings: false });
      const fd = memfd(4096);
      try {
        const mappings = guestMappingCount();
        await assertRefused(
          world,
          connection,
          Request.SET_LOG_BASE,
          longs(size, offset),
          reason,
          [fd],
        );
        assert.equal(guestMappingCount(), mappings);
        await read(guest);
        assert.ok(log.take().length > 0);
        // Without NEED_REPLY only the end can tell: QEMU does not read the
        // reply's payload.
        await assertEnds(world, connection, () => {
          connection.send(Request.SET_LOG_BASE, longs(size, offset), {
            fds: [fd],
          });
        }, reason);
      } finally {
        core.descriptorClose(fd);
      }
      await guest.close();
    }));
}

test("row 1: a log in a file of another kind is refused", () =>
  withBystander(async (world) => {
    const guest = await open(world);
    const { connection } = guest;
    const pair = new Int32Array(2);
    check(core.socketPair(pair), "Cannot make a socket pair");
    const path = new TextEncoder().encode("/dev/zero");
    const readOnly = new TextEncoder().encode("/proc/self/exe");
    const fds = [
      world.eventfd(),
      ...pair,
      check(core.fileOpen(path, path.length, 1), "Cannot open /dev/zero"),
      check(core.fileOpen(readOnly, readOnly.length, 0), "Cannot open"),
    ];
    try {
      for (const fd of fds) {
        await assertRefused(
          world,
          connection,
          Request.SET_LOG_BASE,
          longs(0x1000n, 0n),
          /Cannot map the dirty log/,
          [fd],
        );
      }
      await read(guest);
    } finally {
      for (const fd of fds.slice(1)) core.descriptorClose(fd);
    }
    await guest.close();
  }));

test("row 1: a payload or a number of descriptors that is wrong is refused", () =>
  withBystander(async (world) => {
    const guest = await open(world);
    const { connection } = guest;
    const fd = memfd(4096);
    const cases = [
      [longs(0x1000n, 0n), []],
      [longs(0x1000n, 0n), [fd, fd]],
      [longs(0x1000n), []],
      [longs(0x1000n), [fd]],
      [longs(0x1000n, 0n, 0n), [fd]],
      [new Uint8Array(0), [fd]],
      [new Uint8Array(15), [fd]],
    ] as const;
    for (const [payload, fds] of cases) {
      await assertRefused(
        world,
        connection,
        Request.SET_LOG_BASE,
        payload,
        /SET_LOG_BASE/,
        fds,
      );
    }
    for (const fds of [[], [fd, fd], [fd]]) {
      await assertRefused(
        world,
        connection,
        Request.SET_LOG_FD,
        new Uint8Array(0),
        /SET_LOG_FD/,
        fds,
      );
    }
    core.descriptorClose(fd);
    await read(guest);
    await guest.close();
  }));

test("row 1: logs and log events without an end leave nothing behind", () =>
  withBystander(async (world) => {
    const event = world.errorFd;
    await world.repeat(20, async () => {
      const guest = await open(world);
      const mappings = guestMappingCount();
      const log = new DirtyLog({ end: BigInt(ramSize) });
      for (let i = 0; i < 50; i++) {
        await guest.connection.setLogBase(log);
        await guest.connection.setLogFd(event);
      }
      await read(guest);
      // Its own mapping, and the back-end's.
      assert.equal(guestMappingCount(), mappings + 2);
      await world.leave(guest.connection);
      log.close();
      await guest.close();
    });
  }));

test("row 1, 23: a log that shrinks ends its device, and no other", () =>
  withBystander(async (world) => {
    for (const size of [0, 1]) {
      const guest = await open(world);
      const log = await guest.startLog();
      check(core.memfdResize(log.fd, size), "Cannot shrink the log");
      const asked = guest.queues[0].submit({
        readable: [blkHeader(0)],
        writable: [512, 1],
      });
      asked.catch(() => {});
      if (size === 0) {
        await world.ended(guest.connection);
        await world.reported(/the dirty log's, became shorter/);
      } else {
        // Its page is still there.
        await within(asked, "the read");
      }
      await guest.close();
    }
  }));

test("row 1: a log too small for the guest is written to its end and no further", () =>
  withBystander(async (world) => {
    const guest = await open(world);
    const fd = memfd(0x3000);
    const address = new BigUint64Array(1);
    check(core.mapShared(fd, 0x3000, address), "Cannot map");
    await guest.startLog();
    // One byte of log, in the middle of the file: eight pages of guest.
    const ack = await guest.connection.acknowledged(
      Request.SET_LOG_BASE,
      longs(1n, 0x1803n),
      { fds: [fd] },
    );
    assert.equal(ack, 0n);
    for (const log of [0n, 0x7000n, 0x8000n, 1n << 40n, top, top - 0xffffn]) {
      await guest.connection.setVringAddr({
        ...guest.vringAddress(0),
        flags: VRING_FLAG_LOG,
        log: gpa(log),
      }, { ack: true });
      await read(guest);
    }
    await guest.stop();
    const bytes = new Uint8Array(binding.view(address[0], 0x3000)).slice();
    const marked = [...bytes.entries()].filter(([, byte]) => byte !== 0);
    assert.deepEqual(marked.map(([at]) => at), [0x1803]);
    core.unmap(address[0], 0x3000);
    core.descriptorClose(fd);
    await guest.close();
  }));

test("row 1: a guest whose log is the memory of its own ring harms itself alone", () =>
  withBystander(async (world) => {
    const guest = await open(world);
    await guest.startLog();
    const [region] = guest.ram.regions;
    await guest.connection.acknowledged(
      Request.SET_LOG_BASE,
      longs(BigInt(region.size), 0n),
      { fds: [region.fd] },
    );
    const asked = guest.queues[0].submit({
      readable: [blkHeader(0)],
      writable: [512, 1],
    });
    asked.catch(() => {});
    await guest.connection.barrier().catch(() => {});
    guest.connection.close();
    await world.ended(guest.connection);
    await guest.close();
  }));
