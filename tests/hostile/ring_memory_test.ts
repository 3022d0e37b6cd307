// The memory below rings of a hostile guest: regions that touch, contents that
// change. Rows are those of the catalogue of hostile inputs.
import assert from "node:assert/strict";
import { DescriptorFlag } from "../../frontend/mod.ts";
import type { Request } from "../../mod.ts";
import { pattern } from "../devices/disk_guest.ts";
import { test } from "../harness.ts";
import { Events } from "../support/wait.ts";
import { holding } from "./holding.ts";
import { blkHeader, withBystander } from "./world.ts";

const { NEXT, WRITE, INDIRECT } = DescriptorFlag;
const unmapped = 0xdead_0000_0000n;
/** Bytes of a region. */
const half = 1 << 20;
/** They touch, but only in guest addresses. */
const regions = [
  { size: half, gpa: 0n, uva: 1n << 44n },
  { size: half, gpa: BigInt(half), uva: 1n << 40n },
];

test("row 13: a buffer over two regions that touch only in guest addresses is cut there", () =>
  withBystander(async (world) => {
    const device = await world.open({ regions });
    const [driver] = device.queues;
    const [first, second] = device.ram.regions;
    const edge = BigInt(half);
    const data = pattern(4096);
    const header = device.ram.allocate(17);
    const submit = (type: number) => {
      device.ram.write(header, blkHeader(type));
      return driver.submitChain([
        { address: header, length: 16, isWritable: false },
        { address: edge - 1536n, length: 4096, isWritable: type === 0 },
        { address: header + 16n, length: 1, isWritable: true },
      ]);
    };
    first.bytes.set(data.subarray(0, 1536), half - 1536);
    second.bytes.set(data.subarray(1536), 0);
    await submit(1);
    first.bytes.fill(0, half - 1536);
    second.bytes.fill(0, 0, 8192);
    await submit(0);
    assert.deepEqual(first.bytes.slice(half - 1536), data.slice(0, 1536));
    assert.deepEqual(second.bytes.slice(0, 2560), data.slice(1536));
    assert.equal(second.bytes[2560], 0);
    await device.close();
  }));

test("row 13: an indirect table over two regions is read where it is", () =>
  withBystander(async (world) => {
    const device = await world.open({ regions });
    const [driver] = device.queues;
    const [first, second] = device.ram.regions;
    const buffer = device.ram.allocate(1024);
    device.ram.write(buffer, blkHeader(0));
    const table = new DataView(new ArrayBuffer(48));
    [
      [buffer, 16, NEXT, 1],
      [buffer + 16n, 512, NEXT | WRITE, 2],
      [buffer + 528n, 1, WRITE, 0],
    ].forEach(([address, length, flags, next], i) => {
      table.setBigUint64(16 * i, BigInt(address), true);
      table.setUint32(16 * i + 8, Number(length), true);
      table.setUint16(16 * i + 12, Number(flags), true);
      table.setUint16(16 * i + 14, Number(next), true);
    });
    const bytes = new Uint8Array(table.buffer);
    // Cut in the middle of a descriptor.
    for (const cut of [20, 8, 40, 33]) {
      first.bytes.set(bytes.subarray(0, cut), half - cut);
      second.bytes.set(bytes.subarray(cut), 0);
      device.ram.bytes(buffer + 528n, 1)[0] = 0xff;
      const seen = driver.usedCount;
      const [head] = driver.takeDescriptors(1);
      const address = BigInt(half - cut);
      driver.descriptor(head, {
        address,
        length: 48,
        flags: INDIRECT,
        next: 0,
      });
      driver.publish(head);
      driver.kick();
      await driver.whenUsed(seen + 1);
      assert.equal(device.ram.bytes(buffer + 528n, 1)[0], 0);
    }
    assert.deepEqual(world.errors, []);
    await device.close();
  }));

test("row 13: a ring over two regions that touch in both address spaces is refused", () =>
  withBystander(async (world) => {
    const device = await world.open({
      start: false,
      regions: [
        { size: half, gpa: 0n, uva: 1n << 40n },
        { size: half, gpa: BigInt(half), uva: (1n << 40n) + BigInt(half) },
      ],
    });
    await device.activate();
    const { connection } = device;
    await connection.setVringNum(0, 128, { ack: true });
    const address = device.vringAddress(0);
    const edge = (1n << 40n) + BigInt(half);
    for (const name of ["descriptor", "available", "used"]) {
      await assert.rejects(
        connection.setVringAddr(
          { ...address, [name]: edge - 32n } as typeof address,
          { ack: true },
        ),
      );
      await world.reported(new RegExp(`${name} area .*not inside one memory`));
    }
    await device.close();
  }));

test("row 29: descriptors that change after the pop change nothing", () => {
  const requests = new Events<Request>();
  return withBystander(async (world) => {
    const device = await world.open();
    const [driver] = device.queues;
    const buffer = device.ram.allocate(4096, 4096);
    for (const isIndirect of [false, true]) {
      const done = driver.submitChain(
        [{ address: buffer, length: 64, isWritable: true }],
        { indirect: isIndirect },
      );
      const request = await requests.next();
      // The head is 127 or below: all of the table changes.
      for (let i = 0; i < 128; i++) {
        driver.descriptor(i, {
          address: unmapped,
          length: 0xffffffff,
          flags: NEXT | WRITE | INDIRECT,
          next: 0xffff,
        });
      }
      assert.equal(request.writableBytes, 64);
      assert.equal(request.writable[0].length, 64);
      request.writable[0].fill(0x42);
      request.complete(64);
      assert.equal(await done, 64);
      const bytes = device.ram.bytes(buffer, 128);
      assert.ok(bytes.subarray(0, 64).every((byte) => byte === 0x42));
      assert.ok(bytes.subarray(64).every((byte) => byte === 0));
      bytes.fill(0);
    }
    assert.deepEqual(world.errors, []);
    await device.close();
  }, holding(requests));
});

test("row 29: a header that changes after the pop changes nothing", () => {
  const requests = new Events<Request>();
  return withBystander(async (world) => {
    const device = await world.open();
    const [driver] = device.queues;
    const buffer = device.ram.allocate(16);
    device.ram.write(buffer, blkHeader(7, 42));
    const done = driver.submitChain([
      { address: buffer, length: 16, isWritable: false },
    ]);
    const request = await requests.next();
    device.ram.write(buffer, new Uint8Array(16).fill(0xff));
    assert.deepEqual(request.header, blkHeader(7, 42));
    request.complete(0);
    await done;
    await device.close();
  }, holding(requests, { headerBytes: 16 }));
});
