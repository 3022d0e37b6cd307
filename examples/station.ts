// A station on its guest's network that exists only here: it answers ARP and
// ping for 10.0.0.1. Its code runs in a Worker of its own, named by this module.
//
//   deno run -A examples/station.ts /tmp/station.sock
//
//   -chardev socket,id=net,path=/tmp/station.sock
//   -netdev vhost-user,id=net,chardev=net -device virtio-net-pci,netdev=net
//
// In the guest: ip addr add 10.0.0.2/24 dev eth0; ping 10.0.0.1
import process from "node:process";
import { endFactory, netDevice, registerTarget } from "../mod.ts";

const mac = [0x02, 0, 0, 0, 0, 1];
const etherType = { arp: 0x0806, ipv4: 0x0800 };
const icmp = 1;

function checksum(view: DataView, from: number, to: number): number {
  let sum = 0;
  for (let at = from; at + 1 < to; at += 2) sum += view.getUint16(at);
  if ((to - from) % 2 === 1) sum += view.getUint8(to - 1) << 8;
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >> 16);
  return ~sum & 0xffff;
}

const isAt = (frame: Uint8Array, at: number, address: readonly number[]) =>
  address.every((byte, i) => frame[at + i] === byte);

/** Turns a request for us into its answer, in place; false for other frames. */
function answer(frame: Uint8Array, address: readonly number[]): boolean {
  const view = new DataView(frame.buffer, frame.byteOffset, frame.length);
  const type = view.getUint16(12);
  if (type === etherType.arp && frame.length >= 42) {
    if (view.getUint16(20) !== 1 || !isAt(frame, 38, address)) return false;
    view.setUint16(20, 2);
    frame.copyWithin(32, 22, 32);
    frame.set([...mac, ...address], 22);
  } else if (type === etherType.ipv4 && frame.length >= 42) {
    const payload = 14 + (frame[14] & 15) * 4;
    const end = 14 + view.getUint16(16);
    const isPing = frame[23] === icmp && isAt(frame, 30, address) &&
      payload + 8 <= end && end <= frame.length && frame[payload] === 8;
    if (!isPing) return false;
    frame.copyWithin(30, 26, 30);
    frame.set(address, 26);
    frame[payload] = 0;
    view.setUint16(payload + 2, 0);
    view.setUint16(payload + 2, checksum(view, payload, end));
  } else return false;
  frame.copyWithin(0, 6, 12);
  frame.set(mac, 6);
  return true;
}

/** Runs in the Worker: everything that the guest sends comes here. */
export const station = endFactory((address: readonly number[]) => ({
  name: "station",
  offloads: 0,
  // No timers, no promises: the Worker may sleep until a frame comes.
  endsByEvents: true,
  open: (link) => ({
    receive(frames, pair) {
      for (let i = 0; i < frames.count; i++) {
        if (answer(frames.at(i), address)) link.send(frames, pair, i, 1);
      }
    },
    close() {},
  }),
  close() {},
}));

/** Serves guests on the socket at `path`, each with a station of its own. */
export async function serveStation(path: string, address = [10, 0, 0, 1]) {
  const { url: module } = import.meta;
  const nic = netDevice({ end: { module, name: "station", options: address } });
  return await registerTarget({
    transport: "vhost-user",
    address: path,
    ...nic,
    workers: 1,
  });
}

if (import.meta.main) await serveStation(process.argv[2]);
