// A disk, and a network card, behind an IOMMU, on the event loop and in Workers.
import assert from "node:assert/strict";
import {
  BlkClient,
  NetClient,
  type NetClientOptions,
  supportedFeatures,
  type VhostUserDeviceOptions,
} from "../../frontend/mod.ts";
import {
  blkDevice,
  echoEnd,
  featureMask,
  hasFeature,
  memoryBacking,
  type Net,
  netDevice,
  NetFeature,
  registerTarget,
  VirtioFeature,
} from "../../mod.ts";
import { test } from "../harness.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { eventually, within } from "../support/wait.ts";
import { assertBytes, pattern } from "./disk_guest.ts";
import { frameOf, swapped } from "./net_guest.ts";

const MiB = 1 << 20;
const kinds = [
  ["split", false, "strict"],
  ["split", false, "passthrough"],
  ["packed", true, "strict"],
] as const;

async function withDisk(
  options: VhostUserDeviceOptions & { readonly packed: boolean },
  workers: number,
  body: (client: BlkClient) => Promise<void>,
): Promise<void> {
  using folder = new TemporaryFolder();
  const path = folder.file("socket");
  const errors: string[] = [];
  const onError = (error: Error) => void errors.push(error.message);
  await using disk = blkDevice({
    backing: memoryBacking(MiB),
    numQueues: 2,
    onError,
  });
  await using _target = await registerTarget({
    transport: "vhost-user",
    address: path,
    ...disk,
    workers,
    onError,
  });
  const client = await BlkClient.open({
    path,
    queueCount: 2,
    queueSize: 32,
    ramSize: 4 * MiB,
    ...options,
  });
  try {
    await body(client);
  } finally {
    await client.close();
  }
  assert.deepEqual(errors, []);
}

for (const [name, packed, mode] of kinds) {
  for (const workers of [0, 2]) {
    test(`a disk behind a ${mode} IOMMU, ${name} rings, ${workers} Workers: what is read is what was written`, async () => {
      await withDisk({ packed, iommu: { mode } }, workers, async (client) => {
        const blocks = Array.from({ length: 60 }, (_, i) => pattern(4096, i));
        await within(
          Promise.all(blocks.map((data, i) => client.write(i * 4096, data))),
          "writes",
        );
        const read = await within(
          Promise.all(blocks.map((_, i) => client.read(i * 4096, 4096))),
          "reads",
        );
        read.forEach((data, i) => assertBytes(data, blocks[i]));
        // Everything is asked for again, the rings' pages too.
        await client.device.iommu!.invalidate(0n, (1n << 64n) - 1n);
        assertBytes(
          await within(client.read(4096, 4096), "a read"),
          blocks[1],
        );
      });
    });
  }
}

async function withCard(
  options: Partial<NetClientOptions>,
  workers: number,
  body: (card: NetClient, nic: Net) => Promise<void>,
): Promise<void> {
  using folder = new TemporaryFolder();
  const path = folder.file("socket");
  const errors: string[] = [];
  const onError = (error: Error) => void errors.push(error.message);
  await using nic = netDevice({ end: echoEnd(), numQueues: 2, onError });
  await using target = await registerTarget({
    transport: "vhost-user",
    address: path,
    ...nic,
    workers,
    onError,
  });
  const card = await NetClient.open({
    path,
    pairCount: 2,
    queueSize: 64,
    ramSize: 4 * MiB,
    ...options,
  });
  try {
    // A queue starts when its ring is known, whatever has been acknowledged.
    await eventually(() => target.devices[0].queues.length === 4);
    await body(card, nic);
  } finally {
    await card.close();
  }
  assert.deepEqual(errors, []);
}

/** Frames on both pairs, each of which comes back whole. */
async function exchange(card: NetClient, count: number): Promise<void> {
  for (let i = 0; i < count; i++) {
    const frame = frameOf(60 + i * 37 % 1400, { seed: i });
    await within(card.send(frame, { pair: i % 2 }), `frame ${i} is sent`);
    const { bytes, pair } = await within(card.receive(), `frame ${i} is back`);
    assert.deepEqual(bytes, swapped(frame));
    assert.equal(pair, i % 2);
  }
}

const netFeatures = supportedFeatures |
  featureMask(NetFeature.MAC, NetFeature.MQ);
for (const [name, packed, mode] of kinds) {
  for (const workers of [0, 2]) {
    for (const isMergeable of [false, true]) {
      const buffers = isMergeable ? "mergeable" : "plain";
      test(`a card behind a ${mode} IOMMU, ${name} rings, ${buffers} buffers, ${workers} Workers: no frame is lost to a translation that is missing`, async () => {
        const features = isMergeable
          ? netFeatures | featureMask(NetFeature.MRG_RXBUF)
          : netFeatures;
        const options = { packed, iommu: { mode }, features };
        await withCard(options, workers, async (card, nic) => {
          const platform = VirtioFeature.ACCESS_PLATFORM;
          assert.ok(hasFeature(card.device.features, platform));
          await exchange(card, 200);
          assert.equal(nic.statistics.snapshot().toGuest.dropped, 0);
        });
      });
    }

    test(`a card behind a ${mode} IOMMU, ${name} rings, ${workers} Workers: goes on after everything was invalidated`, async () => {
      const options = { packed, iommu: { mode }, features: netFeatures };
      await withCard(options, workers, async (card, nic) => {
        let taken = 0;
        for (let round = 0; round < 5; round++) {
          await exchange(card, 10);
          taken += 10;
          await card.device.iommu!.invalidate(0n, (1n << 64n) - 1n);
          // The first on each pair asks for its ring, its answer for another
          // ring and a buffer: until these are known there is no room for it.
          for (const pair of [0, 1]) {
            await within(card.send(frameOf(60), { pair }), "the first");
          }
          const counts = () => nic.statistics.snapshot();
          await eventually(() => {
            const { fromGuest, toGuest } = counts();
            return fromGuest.packets === toGuest.packets + toGuest.dropped &&
              card.pending === toGuest.packets - taken;
          });
          for (; card.pending > 0; taken++) await card.receive();
        }
      });
    });
  }
}
