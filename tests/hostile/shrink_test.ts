// A front-end takes memory away that it has given (row 23: memfd shrunk or
// punched after mapping).
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { writeFileSync } from "node:fs";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { type Device, fileBacking, memoryBacking } from "../../mod.ts";
import { requestOps } from "../../mod.ts";
import { isNode, test } from "../harness.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { eventually } from "../support/wait.ts";
import { addressSpaceBytes, isUnmapped } from "./accounting.ts";
import {
  blkHeader,
  diskSize,
  type Victim,
  withBystander,
  type World,
} from "./world.ts";

const rounds = 20;
const gone = /the front-end took guest memory away/;
/** Sparse: so large that a mapping left behind is noticed. */
const dataSize = 1 << 30;

/** A device with its rings in one region and room for data in a second. */
async function openWithData(world: World) {
  const device = await world.open({
    regions: [{ size: 1 << 20 }, { size: dataSize, gpa: 1n << 40n }],
  });
  const error = world.errorFd;
  await device.connection.setVringErr(0, error, { ack: true });
  const [rings, data] = device.ram.regions;
  return { device, error, rings, data, driver: device.queues[0] };
}

type Opened = Awaited<ReturnType<typeof openWithData>>;

/** Opens a device, lets it run into the hole, and awaits its end. */
async function shrink(
  world: World,
  attack: (opened: Opened) => void | Promise<void>,
): Promise<void> {
  const opened = await openWithData(world);
  await attack(opened);
  await world.reported(gone);
  await world.signalled(opened.error);
  await world.ended(opened.device.connection);
  await opened.device.close();
}

/** Again and again; address space is given back, and the bystander served. */
async function shrinkRepeatedly(
  attack: (opened: Opened, world: World, round: number) => void | Promise<void>,
  victim?: Victim | (() => Victim),
): Promise<void> {
  await withBystander(async (world) => {
    await shrink(world, (opened) => attack(opened, world, 0));
    const before = addressSpaceBytes();
    await world.repeat(rounds, async (round) => {
      await shrink(world, (opened) => attack(opened, world, round));
      await world.other.serve();
    });
    if (isUnmapped) {
      assert.ok(
        addressSpaceBytes() - before < 4 * dataSize,
        "address space was given back",
      );
    }
    const reports = world.errors.filter((message) => gone.test(message));
    assert.equal(reports.length, rounds + 1, "one report for each device");
  }, victim);
}

/** A request whose data is in the second region. */
function submitData(
  { driver, device, data }: Opened,
  type: number,
  length = 65536,
): void {
  const header = device.ram.allocate(17);
  device.ram.write(header, blkHeader(type));
  driver.submitChain([
    { address: header, length: 16, isWritable: false },
    { address: data.gpa, length, isWritable: type === 0 },
    { address: header + 16n, length: 1, isWritable: true },
  ]).catch(() => {});
}

for (const [name, type] of [["reads", 0], ["writes", 1]] as const) {
  test(`a memory disk ${name} a buffer whose file shrank: its device ends, no other`, () =>
    shrinkRepeatedly((opened, _world, round) => {
      // All of it, or the second half of what is asked for.
      opened.data.resizeFile(round % 2 === 0 ? 0 : 32768);
      submitData(opened, type);
    }));

  test(`a file disk ${name} a buffer whose file shrank: its device ends, no other`, async () => {
    using folder = new TemporaryFolder();
    const path = folder.file("disk");
    writeFileSync(path, new Uint8Array(diskSize));
    await shrinkRepeatedly((opened, _world, round) => {
      opened.data.resizeFile(round % 2 === 0 ? 0 : 32768);
      submitData(opened, type);
    }, () => ({ disk: { backing: fileBacking(path), numQueues: 2 } }));
  });
}

test("rings whose file shrank: the device ends, no other", () =>
  shrinkRepeatedly(({ rings, driver }) => {
    rings.resizeFile(0);
    driver.kick();
  }));

test("rings whose file shrank while completions were due: the device ends, no other", () => {
  const pending: (() => void)[] = [];
  return shrinkRepeatedly(async ({ rings, driver }) => {
    for (let i = 0; i < 8; i++) {
      driver.submit({ writable: [64] }).catch(() => {});
    }
    await eventually(() => pending.length === 8, "all requests are open");
    rings.resizeFile(0);
    for (const complete of pending.splice(0)) complete();
  }, {
    queueCount: 2,
    device: () =>
      requestOps(async () => {
        await new Promise<void>((resolve) => pending.push(resolve));
        return 64;
      }),
  });
});

for (const access of ["read", "written"] as const) {
  test(`views ${access} after their file shrank are zeros, and the device ends`, () => {
    let device: Device;
    return shrinkRepeatedly(({ data }) => {
      data.bytes.fill(0x77, 0, 8192);
      const { view } = device.memory[1];
      assert.equal(view[4096], 0x77);
      data.resizeFile(4096);
      if (access === "read") assert.equal(view[4096], 0);
      else view[4096] = 1;
      // The whole region went at once: what was left of the file too.
      assert.equal(view[0], 0);
      assert.equal(view[8191], 0);
    }, {
      device: (made) => {
        device = made;
        return {};
      },
    });
  });
}

test("a request that was open when the file shrank completes into nothing", () => {
  const pending: ((fill: number) => void)[] = [];
  return shrinkRepeatedly(async ({ driver, device, data }) => {
    driver.submitChain([{ address: data.gpa, length: 4096, isWritable: true }])
      .catch(() => {});
    void device;
    await eventually(() => pending.length === 1, "the request is open");
    data.resizeFile(0);
    pending.pop()!(0x33);
  }, {
    queueCount: 2,
    device: () =>
      requestOps(async (request) => {
        const fill = await new Promise<number>((r) => pending.push(r));
        for (const view of request.writable) view.fill(fill);
        return request.writableBytes;
      }),
  });
});

test("a hole that is punched into the file reads as zeros, and the device goes on", () =>
  withBystander(async (world) => {
    const opened = await openWithData(world);
    opened.data.bytes.fill(0x55, 0, 8192);
    const { fd } = opened.data;
    const { status } = spawnSync("fallocate", [
      "--punch-hole",
      "--offset=0",
      "--length=4096",
      `/proc/${process.pid}/fd/${fd}`,
    ]);
    assert.equal(status, 0);
    const { view } = world.target.devices[0].memory[1];
    assert.equal(view[0], 0);
    assert.equal(view[4096], 0x55);
    const answer = await opened.driver.submit({
      readable: [blkHeader(0)],
      writable: [512, 1],
    });
    assert.equal(answer.data[1][0], 0);
    assert.deepEqual(world.errors, []);
    await opened.device.close();
  }));

test("a file that grows and shrinks behind the region is no event", () =>
  withBystander(async (world) => {
    const opened = await openWithData(world);
    opened.data.resizeFile(2 * dataSize);
    opened.data.resizeFile(dataSize);
    // Nobody touches the hole, so nobody knows.
    opened.data.resizeFile(0);
    opened.data.resizeFile(dataSize);
    submitData(opened, 0, 512);
    await opened.driver.whenUsed(1);
    assert.deepEqual(world.errors, []);
    await opened.device.close();
  }));

test("two devices whose memory is taken away at once both end, and the third goes on", () =>
  withBystander(async (world) => {
    const first = await openWithData(world);
    const second = await openWithData(world);
    for (const opened of [first, second]) {
      opened.data.resizeFile(0);
      submitData(opened, 0);
    }
    await world.reported(gone);
    await world.reported(gone);
    await first.device.connection.closed;
    await second.device.connection.closed;
    await world.other.serve();
    await first.device.close();
    await second.device.close();
  }));

test("a front-end that comes back after it took memory away is served", () =>
  withBystander(async (world) => {
    await shrink(world, (opened) => {
      opened.data.resizeFile(0);
      submitData(opened, 1);
    });
    const opened = await openWithData(world);
    submitData(opened, 1, 512);
    await opened.driver.whenUsed(1);
    await opened.device.close();
  }, { disk: { backing: memoryBacking(diskSize), numQueues: 2 } }));

for (const where of ["here", "worker"]) {
  const loaded = where === "here"
    ? "with the core loaded"
    : "after the Worker that loaded the core has ended";
  test(`SIGBUS of memory that is not ours ends the process, ${loaded}`, () => {
    const extension = import.meta.url.slice(import.meta.url.lastIndexOf("."));
    const program = fileURLToPath(
      new URL(`foreign_fault${extension}`, import.meta.url),
    );
    const { stdout, stderr, signal, status } = spawnSync(
      process.execPath,
      [...(isNode ? [] : ["run", "--allow-all"]), program, where],
      { encoding: "utf8", timeout: 60_000, killSignal: "SIGKILL" },
    );
    const all = `${stdout}${stderr} (signal ${signal}, status ${status})`;
    assert.match(stdout, /^touching$/m, all);
    assert.doesNotMatch(stdout, /survived/, all);
    assert.equal(signal, "SIGBUS", all);
  });
}
