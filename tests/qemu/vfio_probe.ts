/**
 * Runs inside a guest: drives QEMU's own virtio devices by VFIO, and says how
 * it went, a line for each.
 */

import { encodeBlkHeader } from "../../frontend/blk.ts";
import { openVfioDevice, VirtioPciDevice } from "../../pci/mod.ts";

const [random, disk] = ["0000:00:05.0", "0000:00:06.0"];
const requests = 100;

/** Random bytes differ from each other. */
async function probeRandom(): Promise<void> {
  using pci = openVfioDevice(random);
  await using device = await VirtioPciDevice.open(pci);
  const queue = device.addQueue(0);
  device.start();
  const seen = new Set<string>();
  for (let i = 0; i < requests; i++) {
    const { data, written } = await queue.submit({ writable: [16] });
    seen.add(data[0].subarray(0, written).join());
  }
  console.log(
    `random: type ${device.type}, ${pci.vectorCount} vectors, ${seen.size} different`,
  );
}

/** What is written comes back. */
async function probeDisk(packed: boolean): Promise<void> {
  using pci = openVfioDevice(disk);
  await using device = await VirtioPciDevice.open(pci, {
    packed,
    memorySize: 4 << 20,
  });
  const isPacked = (device.features >> 34n & 1n) === 1n;
  const isIsolated = (device.features >> 33n & 1n) === 1n;
  const config = new DataView(device.readConfigBytes(0, 8).buffer);
  const queue = device.addQueue(0);
  device.start();
  let wrong = 0;
  for (let i = 0; i < requests; i++) {
    const sector = BigInt(i * 8);
    const data = Uint8Array.from(
      { length: 4096 },
      (_, j) => (i * 7 + j * 3 + (packed ? 1 : 0)) & 0xff,
    );
    const wrote = await queue.submit({
      readable: [encodeBlkHeader(1, sector), data],
      writable: [1],
    });
    const read = await queue.submit({
      readable: [encodeBlkHeader(0, sector)],
      writable: [4096, 1],
      indirect: i % 2 === 0,
    });
    const isRight = wrote.data[0][0] === 0 && read.data[1][0] === 0 &&
      data.every((byte, j) => byte === read.data[0][j]);
    if (!isRight) wrong++;
  }
  console.log(
    `disk: packed ${isPacked}, isolated ${isIsolated}, ${
      config.getBigUint64(0, true)
    } sectors, ${wrong} of ${requests} wrong`,
  );
}

/** Each failure is one sentence. */
function probeFailures(): void {
  for (const address of ["0000:00:07.0", "0000:00:1e.0"]) {
    try {
      openVfioDevice(address).close();
      console.log(`${address} was opened`);
    } catch (error) {
      console.log((error as Error).message);
    }
  }
  // Open once: the group is in use.
  using _first = openVfioDevice(random);
  try {
    openVfioDevice(random).close();
    console.log("opened twice");
  } catch (error) {
    console.log((error as Error).message);
  }
}

await probeRandom();
await probeDisk(false);
await probeDisk(true);
probeFailures();
