// A hub with a firewall: guests see each other's frames, but none of them can
// answer for the DHCP server. Attach as many as you like, each with
//
//   -chardev socket,id=net,path=/tmp/hub.sock
//   -netdev vhost-user,id=net,chardev=net -device virtio-net-pci,netdev=net
//
//   deno run -A examples/hub.ts /tmp/hub.sock
import process from "node:process";
import {
  netDevice,
  type NetEnd,
  type NetLink,
  registerTarget,
} from "../mod.ts";

/** UDP over IPv4 from port 67: what only a DHCP server sends. */
function isFromDhcpServer(frame: Uint8Array): boolean {
  const view = new DataView(frame.buffer, frame.byteOffset, frame.length);
  if (frame.length < 42 || view.getUint16(12) !== 0x0800) return false;
  const payload = 14 + (frame[14] & 15) * 4;
  return frame[23] === 17 && frame.length >= payload + 2 &&
    view.getUint16(payload) === 67;
}

/** Serves any number of guests on the socket at `address`. */
export async function serveHub(address: string) {
  const links = new Set<NetLink>();
  const end: NetEnd = {
    name: "hub",
    offloads: 0,
    open(link) {
      links.add(link);
      return {
        receive(frames, pair) {
          for (let i = 0; i < frames.count; i++) {
            if (isFromDhcpServer(frames.at(i))) continue;
            for (const other of links) {
              if (other !== link) other.send(frames, pair, i, 1);
            }
          }
        },
        close: () => void links.delete(link),
      };
    },
    close() {},
  };
  const nic = netDevice({ end });
  return await registerTarget({ transport: "vhost-user", address, ...nic });
}

if (import.meta.main) await serveHub(process.argv[2]);
