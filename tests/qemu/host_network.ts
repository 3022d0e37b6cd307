// The host's side of a guest's network: addresses on TAP interfaces, and TCP.
import { execFileSync } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import { type AddressInfo, connect, createServer } from "node:net";
import { tapEnd } from "../../devices/net/mod.ts";

/** Why there can be no TAP interfaces here; null if there can. */
export function tapMissing(): string | null {
  try {
    tapEnd({ name: "vhost2t%d" }).close();
  } catch (error) {
    return (error as Error).message;
  }
  try {
    execFileSync("ip", ["link"], { stdio: "ignore" });
    return null;
  } catch {
    return "the command ip is missing (Debian: apt-get install iproute2)";
  }
}

/** A subnet that nobody else uses: of those for tests of networks (RFC 2544). */
export function makeSubnet(): { host: string; guest: string } {
  const [x, y] = randomBytes(2);
  const at = `198.${18 + (x & 1)}.${y}.${x & 0xfc}`.split(".");
  const last = Number(at.pop());
  return {
    host: [...at, last + 1].join("."),
    guest: [...at, last + 2].join("."),
  };
}

/** Gives an interface its address, and brings it up. */
export function configureInterface(name: string, address: string): void {
  execFileSync("ip", ["addr", "add", `${address}/30`, "dev", name]);
  execFileSync("ip", ["link", "set", name, "up"]);
}

/** Sends random bytes to whoever listens there; returns their MD5. */
export function sendTo(
  host: string,
  port: number,
  size: number,
): Promise<string> {
  return new Promise((resolve, reject) => {
    const hash = createHash("md5");
    // The guest has nothing to send, and says so at once.
    const socket = connect({ port, host, allowHalfOpen: true });
    let left = size;
    const write = () => {
      while (left > 0) {
        const chunk = randomBytes(Math.min(left, 256 << 10));
        left -= chunk.length;
        hash.update(chunk);
        if (!socket.write(chunk)) return;
      }
      socket.end();
    };
    socket.on("connect", write);
    socket.on("drain", write);
    socket.on("error", reject);
    socket.on("close", () => resolve(hash.digest("hex")));
    socket.resume();
  });
}

/** Takes one connection, and `size` bytes from it; their MD5. */
export async function receiveOn(host: string, size: number) {
  const hash = createHash("md5");
  let left = size;
  let done = (_digest: string) => {};
  const digest = new Promise<string>((resolve) => done = resolve);
  const server = createServer((socket) => {
    socket.on("data", (chunk) => {
      hash.update(chunk);
      left -= chunk.length;
      if (left > 0) return;
      socket.end();
      server.close();
      done(left === 0 ? hash.digest("hex") : `${-left} bytes too many`);
    });
    socket.on("error", () => {});
  });
  await new Promise<void>((resolve, reject) => {
    server.once("error", reject);
    server.listen(0, host, resolve);
  });
  return {
    port: (server.address() as AddressInfo).port,
    digest,
    close: () => server.close(),
  };
}
