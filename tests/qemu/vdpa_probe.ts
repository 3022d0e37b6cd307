/**
 * Runs inside a guest: offers QEMU's own virtio devices through PCI-vDPA to
 * our front-end, and says how it went, a line for each.
 */

import type { GuestRam, RamRegion } from "../../driver/guest_ram.ts";
import {
  BlkClient,
  NetClient,
  type VhostUserDeviceOptions,
} from "../../frontend/mod.ts";
import { registerTarget, type Target } from "../../mod.ts";

const requests = 50;
const everything = (1n << 64n) - 1n;

/** What a user's ops see of a device. */
interface Seen {
  readonly starts: number[];
  readonly stops: number[];
  kicks: number;
}

let sockets = 0;

async function offer(
  address: string,
  features?: bigint,
): Promise<{ target: Target; path: string; seen: Seen }> {
  const seen: Seen = { starts: [], stops: [], kicks: 0 };
  const path = `/tmp/vdpa${sockets++}.sock`;
  const target = await registerTarget({
    transport: "PCI-vDPA",
    address,
    socketPath: path,
    features,
    device: () => ({
      queueStart: (queue) => void seen.starts.push(queue.availableIndex),
      queueStop: (queue) => void seen.stops.push(queue.availableIndex),
      queueKick: () => void seen.kicks++,
    }),
  });
  return { target, path, seen };
}

/** As QEMU has guest memory: below and above 4 GiB. */
const regions: VhostUserDeviceOptions["regions"] = [
  { size: 4 << 20, gpa: 1n << 20n, mmapOffset: 4096 },
  { size: 4 << 20, gpa: 1n << 32n },
];

let seed = 0;

/** What is written comes back; answers how many requests did not. */
async function verify(disk: BlkClient): Promise<number> {
  let wrong = 0;
  const mark = seed++;
  await Promise.all(Array.from({ length: requests }, async (_, i) => {
    const data = Uint8Array.from(
      { length: 4096 },
      (_, j) => (i * 7 + j * 3 + mark) & 0xff,
    );
    const options = { indirect: i % 2 === 0 };
    await disk.write(i * 4096, data, options);
    const read = await disk.read(i * 4096, 4096, options);
    if (!data.every((byte, j) => byte === read[j])) wrong++;
  }));
  return wrong;
}

/** The device reaches only what is in the table now. */
async function plug(disk: BlkClient): Promise<number> {
  const { device } = disk;
  const ram: GuestRam = device.ram;
  const region: RamRegion = ram.addRegion({ size: 2 << 20, gpa: 1n << 33n });
  await device.addRegion(region);
  const wrong = await verify(disk);
  const at = ram.allocate(4096, 4096, region);
  const head = ram.allocate(16, 16, region);
  const status = ram.allocate(1, 1, region);
  const written = await device.queues[0].submitChain([
    { address: head, length: 16, isWritable: false },
    { address: at, length: 4096, isWritable: true },
    { address: status, length: 1, isWritable: true },
  ]);
  const expected = await disk.read(0, 4096);
  const isSame = ram.read(at, 4096).every((byte, i) => byte === expected[i]);
  await device.removeRegion(region);
  ram.removeRegion(region);
  return wrong + (written === 4097 && isSame ? 0 : 1);
}

/** Stopped and continued, hot-plugged, logged: always the same data. */
async function probeDisk(address: string, isPacked = false): Promise<void> {
  const features = isPacked ? everything : undefined;
  const { target, path, seen } = await offer(address, features);
  const disk = await BlkClient.open({
    path,
    regions,
    packed: isPacked,
    queueCount: 2,
  });
  const wrong = [await verify(disk)];
  for (let round = 0; round < 2; round++) {
    await disk.device.stop();
    await disk.device.start();
    wrong.push(await verify(disk));
  }
  await disk.device.reset();
  await disk.device.start();
  wrong.push(await verify(disk));
  const log = await disk.device.startLog();
  // All that the device may have written by itself.
  const all = log.take().length;
  wrong.push(await verify(disk));
  const pages = log.take().length;
  await disk.device.stopLog();
  wrong.push(await plug(disk));
  console.log(
    `${address}: packed ${isPacked}, ${disk.config.capacity} sectors, wrong ${wrong.join()}, starts ${
      seen.starts.slice(0, 2).join()
    }, logged ${pages > 0 && pages < all}, calls ${
      disk.device.queues[0].calls > 0
    }`,
  );
  await disk.close();
  await target.unregister();
}

/** Kicks by the device's own register, which comes by message 3. */
async function probeNotifier(address: string): Promise<void> {
  const { target, path, seen } = await offer(address);
  const disk = await BlkClient.open({
    path,
    regions,
    queueCount: 2,
    takesHostNotifiers: true,
    start: false,
  });
  const { hostNotifiers } = disk.device;
  const both = new Promise<void>((resolve) => {
    disk.device.onHostNotifier = () => {
      if (hostNotifiers.has(0) && hostNotifiers.has(1)) resolve();
    };
  });
  await disk.device.start();
  await both;
  const before = seen.kicks;
  const wrong = await verify(disk);
  console.log(
    `${address}: host notifier, ${wrong} wrong, ${
      seen.kicks - before
    } kicks relayed, ${disk.device.queues[0].kicks > 0}`,
  );
  await disk.close();
  await target.unregister();
}

const mac = (last: number) => Uint8Array.of(0x52, 0x54, 0, 0, 0, last);

/** From the first card to the second. */
function frameOf(length: number, fill: number): Uint8Array<ArrayBuffer> {
  const frame = new Uint8Array(length).fill(fill);
  frame.set(mac(2));
  frame.set(mac(1), 6);
  return frame;
}

const greeting = frameOf(60, 0xff).join();

async function receiveFrame(card: NetClient): Promise<string> {
  for (;;) {
    const frame = (await card.receive()).bytes.join();
    if (frame !== greeting) return frame;
  }
}

/**
 * Like any card, one that is being started drops what comes too early, and a
 * front-end is not told when it is up: it is sent frames until one comes.
 */
async function greet(a: NetClient, b: NetClient): Promise<void> {
  let isUp = false;
  const arrival = b.receive().then(() => isUp = true);
  while (!isUp) {
    await a.send(frameOf(60, 0xff));
    await Promise.race([
      arrival,
      new Promise((resolve) => setTimeout(resolve, 100)),
    ]);
  }
}

/** Two cards on one cable; then it is pulled. */
async function probeNet(first: string, second: string): Promise<void> {
  const cards = [await offer(first), await offer(second)];
  const [a, b] = await Promise.all(
    cards.map(({ path }) => NetClient.open({ path, regions })),
  );
  let wrong = 0;
  for (let round = 0; round < 3; round++) {
    await greet(a, b);
    for (let i = 0; i < 20; i++) {
      const frame = frameOf(100 + i, i);
      await a.send(frame);
      if (await receiveFrame(b) !== frame.join()) wrong++;
    }
    await b.device.stop();
    await b.device.start();
  }
  console.log(
    `net: ${a.config.mac} ${b.config.mac}, link ${a.config.isLinkUp}, ${wrong} wrong`,
  );
  const changed = new Promise<void>((resolve) =>
    a.device.onConfigChange = resolve
  );
  console.log("net: pull the cable");
  await changed;
  await a.refreshConfig();
  console.log(`net: link ${a.config.isLinkUp}`);
  await a.close();
  await b.close();
  for (const { target } of cards) await target.unregister();
}

const [disk, other, first, second] = ["06", "07", "08", "09"].map((n) =>
  `0000:00:${n}.0`
);
await probeDisk(disk);
await probeDisk(disk, true);
await probeNotifier(disk);
await probeDisk(other);
await probeNet(first, second);
