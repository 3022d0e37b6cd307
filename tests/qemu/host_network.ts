// The host's side of a guest's network: addresses on TAP interfaces, and TCP.
import { execFileSync, spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
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

/** The guest's program for TCP (transfer.zig) at work on the host. */
export interface Transfer {
  /** The port, once it listens: `receive` only. */
  readonly port: Promise<number>;
  /** Of all bytes, at the end. */
  readonly checksum: Promise<string>;
}

/** Starts it. */
export function transfer(program: string, words: string[]): Transfer {
  const child = spawn(program, words, { stdio: ["ignore", "pipe", "inherit"] });
  let output = "";
  let listens = (_port: number) => {};
  const port = new Promise<number>((resolve) => listens = resolve);
  child.stdout!.setEncoding("utf8").on("data", (text: string) => {
    output += text;
    const [, found] = /transfer listening (\d+)\n/.exec(output) ?? [];
    if (found !== undefined) listens(Number(found));
  });
  const checksum = new Promise<string>((resolve, reject) => {
    child.on("close", () => {
      const [, sum] = /transfer \w+ ok: (\w+)/.exec(output) ?? [];
      if (sum !== undefined) resolve(sum);
      else reject(new Error(`transfer ${words.join(" ")}: ${output}`));
    });
  });
  // It may fail before anybody asks.
  checksum.catch(() => {});
  return { port, checksum };
}
