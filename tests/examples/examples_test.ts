// Each example does what it says.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createServer, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { serveEcho } from "../../examples/plain_ring.ts";
import { serveEntropy } from "../../examples/entropy.ts";
import { httpDisk, serveHttpDisk } from "../../examples/http_disk.ts";
import { serveHub } from "../../examples/hub.ts";
import { serveStation } from "../../examples/station.ts";
import { NetClient } from "../../frontend/mod.ts";
import {
  assertBytes,
  concat,
  DiskGuest,
  IOERR,
  OK,
  pattern,
  TemporaryFolder,
} from "../devices/disk_guest.ts";
import { frameOf } from "../devices/net_guest.ts";
import { test } from "../harness.ts";

test("the entropy source is a device in at most 40 lines, and fills what the guest hands in", async () => {
  if (import.meta.url.endsWith(".ts")) {
    const source = new URL("../../examples/entropy.ts", import.meta.url);
    const lines = readFileSync(source, "utf8").trimEnd().split("\n");
    assert.ok(lines.length <= 40, `${lines.length} lines`);
  }
  using folder = new TemporaryFolder();
  const path = folder.file("entropy.sock");
  await using _target = await serveEntropy(path);
  await using guest = await DiskGuest.connect(path);
  const [driver] = guest.drivers;
  const first = await driver.submit({ writable: [4096] });
  const second = await driver.submit({ writable: [4096] });
  assert.deepEqual([first.written, second.written], [4096, 4096]);
  assert.notDeepEqual(first.data, second.data);
  assert.ok(new Set(first.data[0]).size > 200);
  const large = await driver.submit({ writable: [100_000] });
  assert.equal(large.written, 65536);
  const none = await driver.submit({ readable: [pattern(8)] });
  assert.equal(none.written, 0);
});

test("a device that processes its ring in plain TypeScript answers many requests, across the end of the ring", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("echo.sock");
  await using _target = await serveEcho(path);
  await using guest = await DiskGuest.connect(path, { queueSize: 16 });
  const [driver] = guest.drivers;
  const echo = async (seed: number) => {
    const sent = [pattern(100, seed), pattern(50 + seed, seed + 1)];
    const { written, data } = await driver.submit({
      readable: sent,
      writable: [70, 200],
    });
    assert.equal(written, 150 + seed);
    assertBytes(concat(data).slice(0, written), concat(sent));
  };
  await Promise.all(Array.from({ length: 100 }, (_, seed) => echo(seed)));
  assert.equal(driver.usedCount, 100);
});

test("the plain ring's device declares a looping chain broken, and its stop goes on", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("echo.sock");
  await using _target = await serveEcho(path);
  await using guest = await DiskGuest.connect(path, { queueSize: 16 });
  const [driver] = guest.drivers;
  const [head] = driver.takeDescriptors(1);
  const address = guest.ram.allocate(16);
  driver.descriptor(head, { address, length: 16, flags: 1, next: head });
  driver.publish(head);
  driver.kick();
  await guest.connection.barrier();
  assert.equal(await guest.connection.getVringBase(0), 0);
  assert.equal(driver.usedIndex, 0);
});

/** Serves `content` with ranges; `requests` are the ranges asked for. */
async function startServer(content: Uint8Array) {
  const requests: string[] = [];
  let isBroken = false;
  const server: Server = createServer((request, response) => {
    if (isBroken) return void response.writeHead(500).end();
    const length = String(content.length);
    if (request.method === "HEAD") {
      return void response.writeHead(200, { "content-length": length }).end();
    }
    const [, from, to] = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range!)!;
    requests.push(`${from}-${to}`);
    const part = content.subarray(Number(from), Number(to) + 1);
    response.writeHead(206, { "content-length": String(part.length) })
      .end(part);
  });
  await new Promise<void>((resolve) => {
    server.listen(0, "127.0.0.1", resolve);
  });
  const { port } = server.address() as AddressInfo;
  return {
    url: `http://127.0.0.1:${port}/disk.img`,
    requests,
    break() {
      isBroken = true;
    },
    async [Symbol.asyncDispose]() {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

test("a disk from HTTP ranges reads from the server, and keeps writes to itself", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("disk.sock");
  const content = pattern(1 << 20);
  await using server = await startServer(content);
  await using _target = await serveHttpDisk(server.url, path);
  await using guest = await DiskGuest.connect(path);
  const first = await guest.read(8, 8192);
  assertBytes(first.data, content.slice(4096, 12288));
  assert.deepEqual(server.requests, ["4096-12287"]);
  const written = pattern(4096, 5);
  assert.equal((await guest.write(16, written)).status, OK);
  // From memory alone.
  assertBytes((await guest.read(16, 4096)).data, written);
  assert.equal(server.requests.length, 1);
  // From both.
  const both = await guest.read(8, 12288);
  assertBytes(
    both.data,
    concat([content.slice(4096, 8192), written, content.slice(12288, 16384)]),
  );
  server.break();
  assert.equal((await guest.read(8, 4096)).status, IOERR);
  assertBytes((await guest.read(16, 4096)).data, written);
});

test("a server without such a file is said when the disk is made", async () => {
  await using server = await startServer(new Uint8Array(4096));
  server.break();
  await assert.rejects(httpDisk(server.url), /status 500/);
});

test("the hub passes everything to everybody else, but what a DHCP server says", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("hub.sock");
  await using _target = await serveHub(path);
  await using one = await NetClient.open({ path });
  await using two = await NetClient.open({ path });
  await using three = await NetClient.open({ path });
  const offer = frameOf(300);
  offer.set([8, 0, 0x45], 12);
  offer[23] = 17;
  offer.set([0, 67, 0, 68], 34);
  await one.send(offer);
  const other = offer.slice();
  other[35] = 68;
  await one.send(other);
  for (const card of [two, three]) {
    assertBytes((await card.receive()).bytes, other);
  }
  assert.equal(one.pending + two.pending + three.pending, 0);
});

/** The sum of IPv4's: 0 over what has its checksum in it. */
function internetSum(bytes: Uint8Array): number {
  let sum = 0;
  bytes.forEach((byte, i) => sum += i % 2 === 0 ? byte << 8 : byte);
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >> 16);
  return ~sum & 0xffff;
}

test("the station answers ARP and ping from a Worker, and nothing else", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("station.sock");
  await using _target = await serveStation(path);
  await using card = await NetClient.open({ path });
  const [ours, theirs] = [[10, 0, 0, 2], [10, 0, 0, 1]];
  const guest = [0x52, 0x54, 0, 0, 0, 9];
  const everybody = Array(6).fill(255);
  const arp = (target: number[]) =>
    Uint8Array.from([
      ...[...everybody, ...guest, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
      ...[...guest, ...ours, 0, 0, 0, 0, 0, 0, ...target],
    ]);
  await card.send(arp([10, 0, 0, 3]));
  await card.send(arp(theirs));
  const resolved = (await card.receive()).bytes;
  const station = [...resolved.subarray(6, 12)];
  assert.deepEqual([...resolved], [
    ...[...guest, ...station, 8, 6, 0, 1, 8, 0, 6, 4, 0, 2],
    ...[...station, ...theirs, ...guest, ...ours],
  ]);
  const ping = new Uint8Array(14 + 20 + 8 + 33);
  ping.set([...station, ...guest, 8, 0, 0x45, 0, 0, ping.length - 14]);
  ping.set([64, 1], 22);
  ping.set([...ours, ...theirs], 26);
  ping[34] = 8;
  ping.set(pattern(33, 5), 42);
  new DataView(ping.buffer).setUint16(36, internetSum(ping.subarray(34)));
  // Of another protocol, for somebody else, and cut short: no answers.
  for (const [at, value] of [[23, 17], [33, 9], [17, 255]]) {
    const other = ping.slice();
    other[at] = value;
    await card.send(other);
  }
  await card.send(ping);
  const { bytes } = await card.receive();
  const expected = ping.slice();
  expected.set([...guest, ...station]);
  expected.set([...theirs, ...ours], 26);
  expected[34] = 0;
  expected.set(bytes.subarray(36, 38), 36);
  assertBytes(bytes, expected);
  assert.equal(internetSum(bytes.subarray(34)), 0);
  assert.equal(card.pending, 0);
});
