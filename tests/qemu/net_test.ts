// Linux guests on our network card: with the host over TAP, and with each
// other over a switch; by ICMP and TCP, with the data verified.
import assert from "node:assert/strict";
import { test } from "../harness.ts";
import { startNetBackend } from "./backend.ts";
import { type GuestNic, startGuest } from "./guest.ts";
import {
  configureInterface,
  makeSubnet,
  receiveOn,
  sendTo,
  tapMissing,
} from "./host_network.ts";

const MiB = 1 << 20;
const port = 5001;

interface TapCase {
  name: string;
  /**
   * Bytes each way: what takes less than 40 s under TCG, where the guest's nc,
   * 1 KiB per system call, and its md5sum set the pace.
   */
  size: number;
  queues?: number;
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

const cases: TapCase[] = [
  {
    name: "with checksum and segmentation offloads",
    size: 48 * MiB,
    bits: { 0: 1, 1: 1, 7: 1, 11: 1, 15: 1, 34: 0 },
  },
  {
    name: "without any offload",
    size: 8 * MiB,
    properties: allOff,
    bits: { 0: 0, 1: 0, 7: 0, 11: 0, 15: 1 },
  },
  {
    name: "without mergeable buffers",
    size: 16 * MiB,
    properties: { mrg_rxbuf: false },
    bits: { 0: 1, 7: 1, 15: 0 },
  },
  {
    name: "over packed rings, with two queue pairs",
    size: 16 * MiB,
    queues: 2,
    properties: { packed: true },
    bits: { 22: 1, 34: 1 },
  },
];

const missing = tapMissing();
for (const one of cases) {
  const name = `a guest pings the host and moves ${one.size / MiB} MiB each ` +
    `way over TAP, ${one.name}`;
  if (missing === null) test(name, () => overTap(one), 200);
  else test.skip(name, missing);
}

async function overTap({ size, queues = 1, properties, bits }: TapCase) {
  await using backend = await startNetBackend([
    ...["--tap", "vhost2t%d", "--num-queues", String(queues)],
  ]);
  const [, interfaceName] = /\(tap (\S+),/.exec(backend.output())!;
  const { host, guest: address } = makeSubnet();
  configureInterface(interfaceName, host);
  const sink = await receiveOn(host, size);
  await using guest = await startGuest({
    cpus: queues,
    backends: [backend],
    nics: [{
      id: "nic",
      socketPath: backend.socketPath,
      mac: "52:54:00:00:00:01",
      queues,
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
      # Its input must not end before what it receives does.
      mkfifo /tmp/quiet
      exec 3<>/tmp/quiet
      nc -l -p ${port} <&3 | md5sum >/tmp/sum &
      while ! netstat -tln | grep -q :${port}; do usleep 20000; done
      echo listening
      wait
      echo "received $(cut -c1-32 /tmp/sum)"
      dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
      for i in $(seq ${size / (8 * MiB)}); do cat /tmp/data; done \\
        | nc ${host} ${sink.port} &
      for i in $(seq ${size / (8 * MiB)}); do cat /tmp/data; done | md5sum \\
        >/tmp/sum
      wait
      echo "sent $(cut -c1-32 /tmp/sum)"
    `,
  });
  const [, features] = await guest.waitFor(/^features ([01]+)/);
  for (const [bit, value] of Object.entries(bits)) {
    assert.equal(features[Number(bit)], String(value), `feature ${bit}`);
  }
  await guest.waitFor(new RegExp(`^queues ${queues}$`));
  await guest.waitFor(/^pinged$/);
  await guest.waitFor(/^listening$/);
  const started = performance.now();
  const digest = await sendTo(address, port, size);
  const [, received] = await guest.waitFor(/^received (\w+)/);
  assert.equal(received, digest);
  const between = performance.now();
  const [, sent] = await guest.waitFor(/^sent (\w+)/);
  assert.equal(sent, await sink.digest);
  const rate = (ms: number) => `${Math.round(size / MiB / (ms / 1000))} MiB/s`;
  console.log(
    `to the guest ${rate(between - started)}, from it ${
      rate(performance.now() - between)
    }`,
  );
  assert.equal(await guest.exited, 0);
  await backend.stop();
}

test(
  "two guests ping each other and move data over the switch, offloading to each other",
  async () => {
    const size = 16 * MiB;
    await using backend = await startNetBackend(["--switch", "lan"]);
    const start = (number: number, script: string) =>
      startGuest({
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
      mkfifo /tmp/quiet
      exec 3<>/tmp/quiet
      nc -l -p ${port} <&3 | md5sum >/tmp/sum &
      while ! netstat -tln | grep -q :${port}; do usleep 20000; done
      echo listening
      wait
      echo "received $(cut -c1-32 /tmp/sum)"
      read line
    `,
    );
    await receiver.waitFor(/^listening$/);
    await using sender = await start(
      1,
      `
      ping -c 3 -w 20 10.0.0.2 >/dev/null
      ping -c 2 -s 20000 -w 20 10.0.0.2 >/dev/null
      echo pinged
      dd if=/dev/urandom of=/tmp/data bs=1M count=${size / MiB} 2>/dev/null
      echo "sent $(md5sum </tmp/data | cut -c1-32)"
      nc 10.0.0.2 ${port} </tmp/data &
      read line
    `,
    );
    await sender.waitFor(/^pinged$/);
    const [, sent] = await sender.waitFor(/^sent (\w+)/);
    const [, received] = await receiver.waitFor(/^received (\w+)/);
    assert.equal(received, sent);
    for (const guest of [sender, receiver]) {
      guest.type("end");
      assert.equal(await guest.exited, 0);
    }
    await backend.stop();
  },
  200,
);
