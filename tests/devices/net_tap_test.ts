// A TAP interface as the end of a card with several queue pairs: every frame
// of the host's reaches the guest, on whichever of them it uses.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { createSocket, type Socket } from "node:dgram";
import type { AddressInfo } from "node:net";
import { featureMask, NetFeature, tapEnd } from "../../mod.ts";
import { type NetClient, supportedFeatures } from "../../frontend/mod.ts";
import { test } from "../harness.ts";
import {
  configureInterface,
  makeSubnet,
  tapMissing,
} from "../qemu/host_network.ts";
import { eventually, within } from "../support/wait.ts";
import { ServedNet } from "./net_guest.ts";

const features = supportedFeatures | featureMask(
  ...[NetFeature.MAC, NetFeature.MQ, NetFeature.MRG_RXBUF],
  NetFeature.CTRL_VQ,
);
const guestMac = "52:54:00:00:00:07";
/** UDP flows: enough that the kernel's hash meets both queues. */
const flowCount = 64;
const etherIpv4 = 0x0800;

interface Host {
  readonly served: ServedNet;
  readonly card: NetClient;
  readonly mac: Uint8Array;
  readonly addresses: { readonly host: string; readonly guest: string };
}

const bytesOf = (text: string, separator: string, base: number) =>
  Uint8Array.from(text.split(separator), (part) => parseInt(part, base));

/** A card with two pairs and a control queue on an interface with two queues. */
async function withTap(
  workers: number,
  body: (host: Host) => Promise<void>,
): Promise<void> {
  const end = tapEnd({ name: "vhost2t%d", numQueues: 2 });
  await using served = await ServedNet.start({ end, numQueues: 2 }, {
    workers,
  });
  const addresses = makeSubnet();
  configureInterface(end.name, addresses.host);
  execFileSync("ip", [
    ...["neigh", "add", addresses.guest, "lladdr", guestMac],
    ...["dev", end.name, "nud", "permanent"],
  ]);
  const link = execFileSync("ip", ["link", "show", end.name]).toString();
  const mac = bytesOf(/ether (\S+)/.exec(link)![1], ":", 16);
  const card = await served.card({ pairCount: 2, control: true, features });
  await body({ served, card, mac, addresses });
  assert.deepEqual(served.errors.pending, []);
}

/** The port of a UDP datagram for us, from the host; null for other frames. */
function sourcePort(frame: Uint8Array): number | null {
  const view = new DataView(frame.buffer, frame.byteOffset, frame.length);
  const isUdp = view.getUint16(12) === etherIpv4 && frame[23] === 17;
  return isUdp && view.getUint16(36) === 9 ? view.getUint16(34) : null;
}

/** Each flow sends until it has been received; by which pairs that was. */
async function receiveFlows(host: Host): Promise<Set<number>> {
  const sockets = await Promise.all(
    Array.from({ length: flowCount }, () =>
      new Promise<Socket>((resolve) => {
        const socket = createSocket("udp4");
        socket.bind(0, host.addresses.host, () => resolve(socket));
      })),
  );
  try {
    const awaited = new Set(sockets.map((socket) => socket.address().port));
    const pairs = new Set<number>();
    for (const socket of sockets) {
      socket.send(new Uint8Array(100), 9, host.addresses.guest);
    }
    while (awaited.size > 0) {
      const { bytes, pair } = await within(
        host.card.receive(),
        `the frames of ${awaited.size} flows`,
      );
      const port = sourcePort(bytes);
      if (port !== null && awaited.delete(port)) pairs.add(pair);
    }
    return pairs;
  } finally {
    for (const socket of sockets) socket.close();
  }
}

function datagram(host: Host, from: number, to: number) {
  const frame = new Uint8Array(14 + 20 + 8 + 18);
  const view = new DataView(frame.buffer);
  frame.set(host.mac, 0);
  frame.set(bytesOf(guestMac, ":", 16), 6);
  view.setUint16(12, etherIpv4);
  frame.set([0x45, 0, 0, frame.length - 14, 0, 0, 0, 0, 64, 17], 14);
  frame.set(bytesOf(host.addresses.guest, ".", 10), 26);
  frame.set(bytesOf(host.addresses.host, ".", 10), 30);
  let sum = 0;
  for (let at = 14; at < 34; at += 2) sum += view.getUint16(at);
  view.setUint16(24, ~((sum & 0xffff) + (sum >> 16)));
  view.setUint16(34, from);
  view.setUint16(36, to);
  view.setUint16(38, frame.length - 34);
  return frame;
}

/** Datagrams of both pairs reach a socket of the host's. */
async function sendFlows(host: Host): Promise<void> {
  const socket = createSocket("udp4");
  const ports = new Set<number>();
  socket.on("message", (_, from) => void ports.add(from.port));
  await new Promise<void>((resolve) =>
    socket.bind(0, host.addresses.host, resolve)
  );
  const { port } = socket.address() as AddressInfo;
  for (let i = 0; i < flowCount; i++) {
    await within(
      host.card.send(datagram(host, 1000 + i, port), { pair: i % 2 }),
      "a datagram is sent",
    );
  }
  try {
    await eventually(
      () => ports.size === flowCount,
      () => `all flows reach the host: ${ports.size}`,
    );
  } finally {
    socket.close();
  }
}

const missing = tapMissing();
for (const workers of [0, 2]) {
  const where = `${workers} Workers`;
  const rules: [string, (host: Host) => Promise<void>][] = [
    [
      `TAP: two queue pairs get and send what two queues of the interface do (${where})`,
      async (host) => {
        await sendFlows(host);
        assert.deepEqual([...await receiveFlows(host)].sort(), [0, 1]);
        await sendFlows(host);
      },
    ],
    [
      `TAP: what comes to a pair that the front-end has disabled comes by the other (${where})`,
      async (host) => {
        const { connection } = host.card.device;
        for (const enabled of [false, true, false]) {
          for (const queue of [2, 3]) {
            await connection.setVringEnable(queue, enabled, { ack: true });
          }
          const pairs = await receiveFlows(host);
          assert.deepEqual([...pairs].sort(), enabled ? [0, 1] : [0]);
        }
      },
    ],
    [
      `TAP: what comes to a pair that the driver has given up comes by the other (${where})`,
      async (host) => {
        for (const count of [1, 2, 1]) {
          const answer = await host.card.control(4, 0, Uint8Array.of(count, 0));
          assert.equal(answer, 0);
          const pairs = await receiveFlows(host);
          assert.deepEqual([...pairs].sort(), count === 2 ? [0, 1] : [0]);
        }
      },
    ],
    [
      `TAP: the next front-end, which has one pair, gets everything (${where})`,
      async (host) => {
        await receiveFlows(host);
        await host.card.close();
        await eventually(() => host.served.target.devices.length === 0);
        const card = await host.served.card({ features: supportedFeatures });
        const pairs = await receiveFlows({ ...host, card });
        assert.deepEqual([...pairs], [0]);
      },
    ],
  ];
  for (const [name, body] of rules) {
    if (missing !== null) test.skip(name, missing);
    else test(name, () => withTap(workers, body));
  }
}
