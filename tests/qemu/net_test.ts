// Linux guests on our network card: with the host over TAP, and with each
// other over a switch; by ICMP and TCP, with the data verified.
import assert from "node:assert/strict";
import { test } from "../harness.ts";
import { startNetBackend } from "./backend.ts";
import { guestCache } from "./cache.ts";
import { type GuestNic, startGuest } from "./guest.ts";
import {
  configureInterface,
  makeSubnet,
  tapMissing,
  transfer,
} from "./host_network.ts";

const GiB = 1 << 30;
/** In the guest. */
const port = 5001;

interface TapCase {
  name: string;
  queues?: number;
  /** Threads of the back-end's that serve the queue pairs; 0 unless given. */
  workers?: number;
  /** An IOMMU that each frame's buffer goes through. */
  iommu?: "strict" | "passthrough";
  /** Bytes each way; 1 GiB unless given. */
  size?: number;
  properties?: GuestNic["properties"];
  /** Feature bits that the driver must have taken (1) or not (0), by number. */
  bits: Record<number, 0 | 1>;
}

const allOff = Object.fromEntries(
  [
    ...["csum", "guest_csum", "gso", "guest_tso4", "guest_tso6", "guest_ecn"],
    ...["guest_ufo", "host_tso4", "host_tso6", "host_ecn", "host_ufo"],
  ].map((name) => [name, false]),
);

const offloaded = { 0: 1, 1: 1, 7: 1, 11: 1 } as const;
const cases: TapCase[] = [
  {
    name: "with checksum and segmentation offloads",
    bits: { ...offloaded, 15: 1, 34: 0 },
  },
  {
    name: "with offloads, from a Worker",
    workers: 1,
    bits: { ...offloaded, 15: 1, 34: 0 },
  },
  {
    name: "without any offload, from a Worker",
    workers: 1,
    properties: allOff,
    bits: { 0: 0, 1: 0, 7: 0, 11: 0, 15: 1 },
  },
  {
    name: "without any offload",
    size: GiB / 8,
    properties: allOff,
    bits: { 0: 0, 1: 0, 7: 0, 11: 0, 15: 1 },
  },
  {
    name: "without mergeable buffers",
    size: GiB / 4,
    properties: { mrg_rxbuf: false },
    bits: { 0: 1, 7: 1, 15: 0 },
  },
  {
    name: "over packed rings, with two queue pairs",
    size: GiB / 4,
    queues: 2,
    properties: { packed: true },
    bits: { 22: 1, 34: 1 },
  },
  {
    name: "over split rings, with two queue pairs in two Workers",
    size: GiB / 4,
    queues: 2,
    workers: 2,
    bits: { 22: 1, 34: 0 },
  },
  {
    name: "behind a strict IOMMU",
    iommu: "strict",
    size: GiB / 8,
    bits: { ...offloaded, 33: 1 },
  },
  {
    name: "behind a passthrough IOMMU, over packed rings, from a Worker",
    iommu: "passthrough",
    workers: 1,
    size: GiB / 4,
    properties: { packed: true },
    bits: { ...offloaded, 33: 1, 34: 1 },
  },
];

const missing = tapMissing();
for (const one of cases) {
  const { size = GiB } = one;
  const name = `a guest pings the host and moves ${size / GiB} GiB each ` +
    `way over TAP, ${one.name}`;
  if (missing === null) test(name, () => overTap(one, size), 600);
  else test.skip(name, missing);
}

async function overTap(one: TapCase, size: number): Promise<void> {
  const { queues = 1, workers = 0, iommu, properties, bits } = one;
  await using backend = await startNetBackend([
    ...["--tap", "vhost2t%d", "--num-queues", String(queues)],
    ...["--workers", String(workers)],
  ]);
  const [, interfaceName] = /\(tap (\S+),/.exec(backend.output())!;
  const { host, guest: address } = makeSubnet();
  configureInterface(interfaceName, host);
  const program = guestCache().program("transfer");
  const sink = transfer(program, ["receive", "0", String(size)]);
  await using guest = await startGuest({
    cpus: queues,
    lifetimeMs: 560_000,
    extras: { programs: ["transfer"] },
    iommu,
    backends: [backend],
    nics: [{
      id: "nic",
      socketPath: backend.socketPath,
      mac: "52:54:00:00:00:01",
      queues,
      iommuPlatform: iommu !== undefined,
      properties,
    }],
    script: `
      ip addr add ${address}/30 dev eth0
      ip link set eth0 up
      echo "features $(cat /sys/class/net/eth0/device/features)"
      echo "queues $(ls -d /sys/class/net/eth0/queues/rx-* | wc -l)"
      ping -c 3 -w 20 ${host} >/dev/null
      ping -c 2 -s 20000 -w 20 ${host} >/dev/null
      echo pinged
      transfer receive ${port} ${size}
      transfer send ${host} ${await sink.port} ${size}
    `,
  });
  const [, features] = await guest.waitFor(/^features ([01]+)/);
  for (const [bit, value] of Object.entries(bits)) {
    assert.equal(features[Number(bit)], String(value), `feature ${bit}`);
  }
  await guest.waitFor(new RegExp(`^queues ${queues}$`));
  await guest.waitFor(/^pinged$/);
  await guest.waitFor(/^transfer listening/);
  const limit = { timeoutMs: 400_000 };
  const started = performance.now();
  const source = transfer(program, [
    ...["send", address, String(port), String(size)],
  ]);
  const [, received] = await guest.waitFor(
    /^transfer receive ok: (\w+)/,
    limit,
  );
  assert.equal(received, await source.checksum);
  const between = performance.now();
  const [, sent] = await guest.waitFor(/^transfer send ok: (\w+)/, limit);
  assert.equal(sent, await sink.checksum);
  const rate = (ms: number) =>
    `${Math.round(size / (1 << 20) / (ms / 1000))} MiB/s`;
  console.log(
    `to the guest ${rate(between - started)}, from it ${
      rate(performance.now() - between)
    }`,
  );
  assert.equal(await guest.exited, 0);
  await backend.stop();
  assert.doesNotMatch(backend.output(), /Cannot/);
}

test(
  "two guests ping each other and move data over the switch, offloading to each other",
  async () => {
    const size = GiB / 2;
    await using backend = await startNetBackend(["--switch", "lan"]);
    const start = (number: number, script: string) =>
      startGuest({
        extras: { programs: ["transfer"] },
        backends: [backend],
        nics: [{
          id: "nic",
          socketPath: backend.socketPath,
          mac: `52:54:00:00:00:0${number}`,
          // The second does its own checksums: what the first leaves to it the
          // switch completes.
          properties: number === 2 ? { csum: false, guest_csum: false } : {},
        }],
        script: `
        ip addr add 10.0.0.${number}/24 dev eth0
        ip link set eth0 up
        ${script}
      `,
      });
    await using receiver = await start(
      2,
      `
      transfer receive ${port} ${size}
      read line
    `,
    );
    await receiver.waitFor(/^transfer listening/);
    await using sender = await start(
      1,
      `
      ping -c 3 -w 20 10.0.0.2 >/dev/null
      ping -c 2 -s 20000 -w 20 10.0.0.2 >/dev/null
      echo pinged
      transfer send 10.0.0.2 ${port} ${size}
      read line
    `,
    );
    await sender.waitFor(/^pinged$/);
    const [, sent] = await sender.waitFor(/^transfer send ok: (\w+)/);
    const [, received] = await receiver.waitFor(/^transfer receive ok: (\w+)/);
    assert.equal(received, sent);
    for (const guest of [sender, receiver]) {
      guest.type("end");
      assert.equal(await guest.exited, 0);
    }
    await backend.stop();
  },
  600,
);
