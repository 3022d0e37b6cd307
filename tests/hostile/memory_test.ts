// Guest memory. Rows are those of the catalogue of hostile inputs.
import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import { check } from "../../ffi/errors.ts";
import {
  type FrontendConnection,
  FrontendRequest as Id,
  GuestRam,
  type RegionWithFile,
} from "../../frontend/mod.ts";
import { gpa, uva } from "../../protocol/address.ts";
import { requestOps } from "../../mod.ts";
import type { Device, Queue } from "../../mod.ts";
import { test } from "../harness.ts";
import { Events } from "../support/wait.ts";
import { addressSpaceBytes, isUnmapped } from "./accounting.ts";
import {
  assertRefused,
  memoryTable,
  singleRegion,
  type WireRegion,
  wireRegion,
} from "./messages.ts";
import { withBystander, type World } from "./world.ts";

const rounds = 200;
const top = 2n ** 64n;

/** A memfd of `size` bytes that goes with the callback. */
async function withFile(
  size: number,
  body: (fd: number) => Promise<void>,
): Promise<void> {
  const fd = check(core.memfdCreate(size), "Cannot make a file");
  try {
    await body(fd);
  } finally {
    core.descriptorClose(fd);
  }
}

function region(
  fd: number,
  at: bigint,
  size: bigint,
  mmapOffset = 0n,
): RegionWithFile {
  const description = {
    gpa: gpa(at),
    uva: uva(at),
    size,
    mmapOffset,
    xen: null,
  };
  return { description, fd };
}

/** Refused as a table and as an addition. */
async function assertRegionRefused(
  world: World,
  connection: FrontendConnection,
  wire: WireRegion,
  fd: number,
  reason: RegExp,
): Promise<void> {
  await assertRefused(
    world,
    connection,
    Id.ADD_MEM_REG,
    singleRegion(wire),
    reason,
    [fd],
  );
  await assertRefused(
    world,
    connection,
    Id.SET_MEM_TABLE,
    memoryTable([wire]),
    reason,
    [fd],
  );
}

test("row 23: regions of no size, that wrap, or that their file does not hold", () =>
  withBystander((world) =>
    withFile(0x10000, async (fd) => {
      const connection = await world.connect();
      const good = { gpa: 0n, uva: 0n, size: 0x1000n, mmapOffset: 0n };
      const cases: [Partial<WireRegion>, RegExp][] = [
        [{ size: 0n }, /its size is 0/],
        [{ gpa: top - 0x800n }, /passes the end of the address space/],
        [{ uva: top - 0x800n }, /passes the end of the address space/],
        [{ size: top - 1n, gpa: 2n }, /passes the end of the address space/],
        [{ mmapOffset: top - 0x800n }, /passes 2\^64/],
        [{ mmapOffset: top - 0x1001n }, /its file holds 65536 bytes/],
        [{ mmapOffset: 0xf001n }, /its file holds 65536 bytes/],
        [{ mmapOffset: 2n ** 63n }, /its file holds 65536 bytes/],
        [{ size: 0x10001n }, /its file holds 65536 bytes/],
        [{ size: 2n ** 63n }, /its file holds 65536 bytes/],
        [{ size: top - 1n }, /its file holds 65536 bytes/],
      ];
      await world.repeat(rounds / 10, async () => {
        for (const [change, reason] of cases) {
          const wire = { ...good, ...change };
          await assertRegionRefused(world, connection, wire, fd, reason);
        }
      });
      await world.leave(connection);
    })
  ));

test("row 23: a region in something that is no memory", () =>
  withBystander(async (world) => {
    const connection = await world.connect();
    const ends = new Int32Array(2);
    check(core.socketPair(ends), "Cannot make sockets");
    const wire = { gpa: 0n, uva: 0n, size: 0x1000n, mmapOffset: 0n };
    const reason = /neither shared memory nor a file/;
    const event = world.eventfd();
    await world.repeat(rounds / 10, async () => {
      for (const fd of [ends[0], event]) {
        await assertRegionRefused(world, connection, wire, fd, reason);
      }
    });
    for (const fd of ends) core.descriptorClose(fd);
    await world.leave(connection);
  }));

test("row 23: regions that overlap, by guest or by front-end addresses", () =>
  withBystander((world) =>
    withFile(0x10000, async (fd) => {
      const connection = await world.connect();
      const first = {
        gpa: 0x1000n,
        uva: 0x1000n,
        size: 0x2000n,
        mmapOffset: 0n,
      };
      await connection.addMemRegion(region(fd, 0x1000n, 0x2000n), {
        ack: true,
      });
      const far = 0x100000n;
      const cases: [bigint, bigint, bigint, RegExp][] = [
        [0x1000n, far, 0x1000n, /guest addresses overlap/],
        [0x2fffn, far, 1n, /guest addresses overlap/],
        [0n, far, 0x1001n, /guest addresses overlap/],
        [0n, far, 0x10000n, /guest addresses overlap/],
        [far, 0x1000n, 0x1000n, /front-end addresses overlap/],
        [far, 0x2fffn, 1n, /front-end addresses overlap/],
        [far, 0n, 0x10000n, /front-end addresses overlap/],
      ];
      await world.repeat(rounds / 10, async () => {
        for (const [at, user, size, reason] of cases) {
          const second = { gpa: at, uva: user, size, mmapOffset: 0n };
          await assertRefused(
            world,
            connection,
            Id.ADD_MEM_REG,
            singleRegion(second),
            reason,
            [fd],
          );
          await assertRefused(
            world,
            connection,
            Id.SET_MEM_TABLE,
            memoryTable([first, second]),
            reason,
            [fd, fd],
          );
        }
      });
      assert.equal(world.target.devices[0].memory.length, 1);
      await world.leave(connection);
    })
  ));

test("row 23: a table of which one region is bad changes nothing", () =>
  withBystander((world) =>
    withFile(0x10000, async (fd) => {
      const connection = await world.connect();
      await connection.setMemTable([region(fd, 0n, 0x1000n)], { ack: true });
      const [before] = world.target.devices[0].memory[0].buffers;
      const good = Array.from({ length: 7 }, (_, i) => ({
        gpa: BigInt(i + 1) << 32n,
        uva: BigInt(i + 1) << 32n,
        size: 0x1000n,
        mmapOffset: 0n,
      }));
      await world.repeat(rounds, async () => {
        await assertRefused(
          world,
          connection,
          Id.SET_MEM_TABLE,
          memoryTable([...good, { ...good[0], size: 0n }]),
          /memory region 7: its size is 0/,
          new Array(8).fill(fd),
        );
      });
      assert.ok(world.target.devices[0].memory[0].buffers[0] === before);
      assert.equal(before.byteLength, 0x1000);
      await world.leave(connection);
    })
  ));

test("row 23: 509 regions are taken, the 510th is refused, and all go again", () =>
  withBystander((world) =>
    withFile(510 * 0x1000, async (fd) => {
      const connection = await world.connect();
      const at = (i: number) =>
        region(fd, BigInt(i) * 0x1000n, 0x1000n, BigInt(i) * 0x1000n);
      assert.equal(await connection.getMaxMemSlots(), 509);
      for (let round = 0; round < 2; round++) {
        for (let i = 0; i < 509; i++) {
          await connection.addMemRegion(at(i), { ack: true });
        }
        await assertRefused(
          world,
          connection,
          Id.ADD_MEM_REG,
          singleRegion(at(509).description),
          /the table would pass 509 regions/,
          [fd],
        );
        assert.equal(world.target.devices[0].memory.length, 509);
        for (let i = 0; i < 509; i++) {
          await connection.removeMemRegion(at(508 - i), { ack: true });
        }
        assert.equal(world.target.devices[0].memory.length, 0);
      }
      await world.leave(connection);
    })
  ));

test("row 23: REM_MEM_REG of a region that is not there, or not quite", () =>
  withBystander((world) =>
    withFile(0x10000, async (fd) => {
      const connection = await world.connect();
      const there = region(fd, 0x1000n, 0x2000n);
      await connection.addMemRegion(there, { ack: true });
      const wire = {
        gpa: 0x1000n,
        uva: 0x1000n,
        size: 0x2000n,
        mmapOffset: 0n,
      };
      const cases: Partial<WireRegion>[] = [
        { gpa: 0n },
        { uva: 0x2000n },
        { size: 0x1000n },
        { size: 0n },
        { gpa: 0x2000n, uva: 0x2000n, size: 0x1000n },
        { gpa: top - 1n },
      ];
      await world.repeat(rounds / 10, async () => {
        for (const change of cases) {
          // Old front-ends attach the file: it is closed either way.
          await assertRefused(
            world,
            connection,
            Id.REM_MEM_REG,
            singleRegion({ ...wire, ...change }),
            /there is no such region/,
            [fd],
          );
        }
      });
      await connection.removeMemRegion(there, { ack: true });
      await world.leave(connection);
    })
  ));

test("regions of odd sizes and offsets, with gpa and uva the same, show the right bytes", () =>
  withBystander(async (world) => {
    using ram = new GuestRam([
      { size: 0x1234, gpa: 0x10_0000n, uva: 0x10_0000n },
      { size: 1, gpa: 0x20_0000n, uva: 0x20_0000n },
      { size: 0x2001, gpa: 0x30_0000n, uva: 0x30_0000n, mmapOffset: 0x1007 },
    ]);
    ram.regions.forEach(({ bytes }, i) => bytes.fill(i + 1));
    const connection = await world.connect();
    for (const part of ram.regions) {
      await connection.addMemRegion(part, { ack: true });
    }
    const [device] = world.target.devices;
    ram.regions.forEach((part, i) => {
      const { view } = device.memory[i];
      assert.deepEqual(view, part.bytes);
      const last = part.gpa + BigInt(part.size - 1);
      assert.deepEqual(device.translate(last, 100), Uint8Array.of(i + 1));
      assert.equal(device.translate(last + 1n, 1), null);
    });
    await world.leave(connection);
  }));

test("row 14: a ring that begins in a region and ends outside is refused", () =>
  withBystander(async (world) => {
    const device = await world.open({ start: false });
    await device.activate();
    const { connection } = device;
    await connection.setVringNum(0, 128, { ack: true });
    const good = device.vringAddress(0);
    const [part] = device.ram.regions;
    const end = part.uva + BigInt(part.size);
    const cases: [string, bigint][] = [
      ["descriptor", end - 128n * 16n + 16n],
      ["descriptor", part.uva - 16n],
      ["available", end - 256n],
      ["used", end - 1024n],
      ["used", end],
      ["used", top - 4n],
      ["descriptor", top - 16n],
    ];
    const error = world.eventfd();
    await connection.setVringErr(0, error, { ack: true });
    for (const [name, address] of cases) {
      await assert.rejects(
        connection.setVringAddr(
          { ...good, [name]: address } as typeof good,
          { ack: true },
        ),
      );
      await world.reported(new RegExp(`${name} area .*not inside one memory`));
    }
    await device.close();
  }));

test("row 14: a ring that grows past its region after its address was set does not start", () =>
  withBystander(async (world) => {
    const device = await world.open({ start: false, queueSize: 8 });
    await device.activate();
    const { connection } = device;
    const error = world.eventfd();
    await connection.setVringErr(0, error, { ack: true });
    await connection.setVringNum(0, 8, { ack: true });
    const [part] = device.ram.regions;
    const address = device.vringAddress(0);
    const used = part.uva + BigInt(part.size - 72);
    await connection.setVringAddr(
      { ...address, used } as typeof address,
      { ack: true },
    );
    await connection.setVringNum(0, 32768, { ack: true });
    await connection.setVringKick(0, device.queues[0].kickFd, { ack: true });
    await connection.setVringEnable(0, true, { ack: true });
    await world.reported(/queue 0 .*not inside one memory region/);
    await world.signalled(error);
    assert.equal(world.target.devices[0].queues.length, 0);
    // Said once, not at every message that follows.
    const count = world.errors.length;
    await connection.barrier();
    assert.equal(world.errors.length, count);
    assert.equal(core.eventfdTake(error), 0);
    await device.close();
  }));

/** A device whose requests stay open until they are let go. */
function slowDevice() {
  const opened = new Events<() => void>();
  let fill = 0x11;
  return {
    opened,
    device: () =>
      requestOps(async (request) => {
        await new Promise<void>((resolve) => opened.push(resolve));
        for (const view of request.writable) view.fill(fill);
        return request.writableBytes;
      }),
    setFill: (value: number) => fill = value,
  };
}

for (const kind of ["SET_MEM_TABLE", "REM_MEM_REG"] as const) {
  test(`row 22: ${kind} during I/O waits for it, then the old memory is out of reach`, () => {
    const slow = slowDevice();
    return withBystander(async (world) => {
      const device = await world.open();
      const { connection } = device;
      const submit = device.queues[0].submit({ writable: [64] });
      const letGo = await slow.opened.next();
      const served = world.target.devices[0];
      const { view } = served.memory[0];
      await withFile(4 << 20, async (fd) => {
        let isAnswered = false;
        const changed = (kind === "REM_MEM_REG"
          ? connection.removeMemRegion(device.ram.regions[0], { ack: true })
          : connection.setMemTable([region(fd, 1n << 40n, 4n << 20n)], {
            ack: true,
          })).then(() =>
            isAnswered = true
          );
        await world.other.serve();
        assert.equal(isAnswered, false);
        assert.equal(view.length, 4 << 20);
        letGo();
        const { written, data } = await submit;
        assert.equal(written, 64);
        assert.deepEqual(data[0], new Uint8Array(64).fill(0x11));
        await changed;
        assertGone(view);
        assert.equal(served.queues.length, 0);
      });
      await device.close();
    }, { device: slow.device });
  });

  test(`row 22: ${kind} while a queue is starting waits for the start`, () => {
    const starts = new Events<() => void>();
    let stops = 0;
    return withBystander(async (world) => {
      const device = await world.open({ start: false });
      await device.activate();
      const { connection } = device;
      const starting = device.startQueue(0);
      const begin = await starts.next();
      await withFile(4 << 20, async (fd) => {
        const changed = kind === "REM_MEM_REG"
          ? connection.removeMemRegion(device.ram.regions[0], { ack: true })
          : connection.setMemTable([region(fd, 1n << 40n, 4n << 20n)], {
            ack: true,
          });
        await world.other.serve();
        assert.equal(stops, 0);
        begin();
        await starting;
        await changed;
        assert.equal(stops, 1);
        assert.equal(world.target.devices[0].queues.length, 0);
      });
      await device.close();
    }, {
      device: () => ({
        queueStart: () => new Promise<void>((resolve) => starts.push(resolve)),
        queueStop: () => void stops++,
      }),
    });
  });
}

/** A view that outlived its region: empty, or zeros where it cannot be. */
function assertGone(view: Uint8Array): void {
  if (isUnmapped) assert.equal(view.length, 0);
  else assert.ok(view.every((byte) => byte === 0));
}

test("a view that outlives its region is empty, and never shows what is mapped there later", () => {
  const views: Uint8Array[] = [];
  const keep = (device: Device, queue: Queue) => {
    if (views.length > 0) return;
    const translated = device.translate(0x1000n, 64);
    assert.ok(translated !== null);
    views.push(device.memory[0].view, translated);
    views.push(queue.descriptorTable, queue.availableRing, queue.usedRing);
  };
  return withBystander(async (world) => {
    const device = await world.open();
    const { connection } = device;
    assert.equal(views.length, 5);
    const [old] = device.ram.regions;
    old.bytes.fill(0x55);
    const other = device.ram.addRegion({ size: 4 << 20 });
    other.bytes.fill(0xaa);
    for (let round = 0; round < 20; round++) {
      const next = round % 2 === 0 ? other : old;
      await connection.setMemTable([next], { ack: true });
      const [now] = world.target.devices[0].memory;
      assert.equal(now.view[4096], round % 2 === 0 ? 0xaa : 0x55);
      for (const view of views) assertGone(view);
      views.push(now.view);
    }
    // And by removal, with another file mapped right after.
    await connection.removeMemRegion(old, { ack: true });
    await connection.addMemRegion(other, { ack: true });
    for (const view of views) assertGone(view);
    await device.close();
    for (const view of views) assertGone(view);
  }, {
    device: (device) => ({ queueStart: (queue) => keep(device, queue) }),
  });
});

if (!isUnmapped) {
  test.skip(
    "500 tables of 64 GiB, one after the other, do not use up the address space",
    "Node 20 cannot empty views: after 1 TiB of old tables a new one is refused; Node 22 and Deno run it",
  );
} else {
  test("500 tables of 64 GiB, one after the other, do not use up the address space", () =>
    withBystander((world) =>
      withFile(2 ** 36, (first) =>
        withFile(2 ** 36, async (second) => {
          const connection = await world.connect();
          const table = (round: number) =>
            region(round % 2 === 0 ? first : second, 0n, 2n ** 36n);
          await connection.setMemTable([table(1)], { ack: true });
          const before = addressSpaceBytes();
          for (let round = 0; round < 500; round++) {
            await connection.setMemTable([table(round)], { ack: true });
          }
          assert.ok(addressSpaceBytes() - before < 2 ** 35);
          assert.deepEqual(world.errors, []);
          await world.leave(connection);
        }))
    ));
}

test("a table that the system cannot map is refused, and the one before stays", () =>
  withBystander((world) =>
    withFile(2 ** 50, async (fd) => {
      const connection = await world.connect();
      const huge = { gpa: 0n, uva: 0n, size: 2n ** 50n, mmapOffset: 0n };
      await connection.setMemTable([region(fd, 0n, 0x1000n)], { ack: true });
      const [before] = world.target.devices[0].memory[0].buffers;
      await world.repeat(rounds / 10, () =>
        assertRefused(
          world,
          connection,
          Id.SET_MEM_TABLE,
          memoryTable([huge]),
          /mmap failed with ENOMEM|old mappings are in quarantine/,
          [fd],
        ));
      assert.ok(world.target.devices[0].memory[0].buffers[0] === before);
      await world.leave(connection);
    })
  ));

test("the same table again and again keeps the mapping", () =>
  withBystander(async (world) => {
    const device = await world.open();
    const [part] = device.ram.regions;
    const [before] = world.target.devices[0].memory[0].buffers;
    await world.repeat(
      rounds,
      () =>
        assertAccepted(
          device.connection,
          memoryTable([wireRegion(part)]),
          part.fd,
        ),
    );
    assert.ok(world.target.devices[0].memory[0].buffers[0] === before);
    await device.close();
  }));

async function assertAccepted(
  connection: FrontendConnection,
  payload: Uint8Array,
  fd: number,
): Promise<void> {
  const ack = await connection.acknowledged(Id.SET_MEM_TABLE, payload, {
    fds: [fd],
  });
  assert.equal(ack, 0n);
}
