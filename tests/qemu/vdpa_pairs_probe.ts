/**
 * Runs inside a guest: offers QEMU's network card with two queue pairs through
 * PCI-vDPA to our front-end, and pings the host by each. Linux sends what
 * belongs to a flow to that queue of a TAP interface from which it last came
 * (`tun_automq_select_queue`), if the card has that pair in use.
 *
 *   vdpa_pairs_probe.ts PCI-ADDRESS HOST-IP OWN-IP
 */

import process from "node:process";
import { NetClient } from "../../frontend/mod.ts";
import { registerTarget } from "../../mod.ts";

const [address, host, own] = process.argv.slice(2);
const path = "/tmp/pairs.sock";
const target = await registerTarget({
  transport: "PCI-vDPA",
  address,
  socketPath: path,
});
const card = await NetClient.open({ path, pairCount: 2 });

const octets = (ip: string) => ip.split(".").map(Number);
const mac = [0x52, 0x54, 0, 0, 1, 1];
const everybody = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff];

/** An ARP request (RFC 826) for the host's address; it makes known ours. */
const arp = Uint8Array.of(
  ...[...everybody, ...mac, 0x08, 0x06],
  ...[0, 1, 0x08, 0, 6, 4, 0, 1, ...mac, ...octets(own)],
  ...[0, 0, 0, 0, 0, 0, ...octets(host)],
);

/** Words of 16 bits with their checksum (RFC 1071) at `at`. */
function summed(bytes: readonly number[], at: number): number[] {
  let sum = 0;
  for (let i = 0; i < bytes.length; i += 2) {
    sum += bytes[i] << 8 | bytes[i + 1];
  }
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >> 16);
  const all = [...bytes];
  all[at] = ~sum >> 8 & 0xff;
  all[at + 1] = ~sum & 0xff;
  return all;
}

/** An echo request (RFC 792). */
function ping(hostMac: readonly number[], sequence: number): Uint8Array {
  const icmp = summed([8, 0, 0, 0, 0, 1, 0, sequence], 2);
  const ip = summed([
    ...[0x45, 0, 0, 28, 0, 0, 0, 0, 64, 1, 0, 0],
    ...[...octets(own), ...octets(host)],
  ], 10);
  return Uint8Array.of(...hostMac, ...mac, 0x08, 0, ...ip, ...icmp);
}

const isArpReply = (bytes: Uint8Array) =>
  bytes[12] === 8 && bytes[13] === 6 && bytes[21] === 2;
const isEcho = (bytes: Uint8Array, sequence: number) =>
  bytes[12] === 8 && bytes[13] === 0 && bytes[23] === 1 && bytes[34] === 0 &&
  bytes[41] === sequence;

let hostMac: readonly number[] = everybody;
let sequence = 0;

/** The card is not up when the front-end is: it is asked until it answers. */
async function pingBy(pair: number): Promise<void> {
  sequence++;
  let isAnswered = false;
  card.onFrame = ({ bytes, pair: by }) => {
    if (isArpReply(bytes)) hostMac = [...bytes.subarray(6, 12)];
    else if (isEcho(bytes, sequence) && by === pair) isAnswered = true;
  };
  while (!isAnswered) {
    await card.send(arp, { pair });
    if (hostMac !== everybody) {
      await card.send(ping(hostMac, sequence), { pair });
    }
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

for (let round = 0; round < 2; round++) {
  for (const pair of [0, 1, 0, 1]) await pingBy(pair);
  console.log(`pairs: ${card.config.maxPairCount}, each answered by itself`);
  await card.device.stop();
  await card.device.start();
}
await card.close();
await target.unregister();
