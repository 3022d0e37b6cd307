/**
 * Uses the npm package as its users do: installed into an empty project on
 * Node, a target registered from it, its command started.
 *
 * @module
 */

import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { Child, root, run, succeed, tool, withFolder } from "./project.ts";
import { getFeatures, libraryFeatures, RawFrontend } from "./raw_frontend.ts";

/** The npm that runs us, or the one on the PATH. */
export function npmCommand(): string[] {
  // Deno's tasks set it too, to Deno.
  const script = process.env.npm_execpath;
  return script?.endsWith("npm-cli.js") ? ["node", script] : ["npm"];
}

/** What an outer `npm run` says about its own project must not reach npm. */
const outerNpm: Record<string, undefined> = Object.fromEntries(
  Object.keys(process.env)
    .filter((name) => /^npm_(package|lifecycle|config_local_prefix)/.test(name))
    .map((name) => [name, undefined]),
);

/** Virtio features of the test's device: a bit of no meaning here. */
const ownFeature = 1n << 5n;

const serveScript = `
import {
  blkDevice,
  echoEnd,
  netDevice,
  nullBacking,
  registerTarget,
} from "@vhost2/vhost2";
import * as frontend from "@vhost2/vhost2/frontend";
import * as pci from "@vhost2/vhost2/pci";
for (const entry of [frontend, pci]) {
  if (Object.keys(entry).length === 0) throw new Error("an empty entry");
}
const target = await registerTarget({
  transport: "vhost-user",
  address: process.argv[2],
  features: ${ownFeature}n,
  device: () => ({}),
});
// Its Workers import the package's modules.
for (
  const device of [
    blkDevice({ backing: nullBacking(1 << 20) }),
    netDevice({ end: echoEnd(), numQueues: 2 }),
  ]
) {
  const inWorkers = await registerTarget({
    transport: "vhost-user",
    address: process.argv[2] + "-workers",
    ...device,
    workers: 2,
  });
  await inWorkers.unregister();
}
console.log("ready");
process.stdin.resume().on("end", () => target.unregister());
`;

/** What a user writes in TypeScript is checked against the package's types. */
const typedScript = `
import {
  registerTarget,
  type Target,
  type TargetOptions,
} from "@vhost2/vhost2";
import "@vhost2/vhost2/frontend";
import { openVfioDevice } from "@vhost2/vhost2/pci";
const target: Target = await registerTarget({
  transport: "vhost-user",
  address: "/nowhere",
  device: (device) => ({
    deviceInit() { const regions: number = device.memory.length; void regions; },
    queueKick(queue) { const index: number = queue.index; void index; },
  }),
});
const passedOn: TargetOptions = {
  transport: "PCI-vDPA",
  address: "0000:00:06.0",
  socketPath: "/nowhere",
  openDevice: openVfioDevice,
};
void passedOn;
// @ts-expect-error: the types are there, and not "any".
target.noSuchMember;
`;

async function install(project: string, tarball: string): Promise<void> {
  writeFileSync(
    join(project, "package.json"),
    JSON.stringify({ private: true, type: "module" }),
  );
  const { status, stdout, stderr } = await run([
    ...npmCommand(),
    "install",
    "--no-audit",
    "--no-fund",
    "--loglevel=error",
    "--prefer-offline",
    "--prefix",
    project,
    tarball,
  ], { cwd: project, env: outerNpm });
  if (status === 0) return;
  const { devDependencies } = JSON.parse(
    readFileSync(join(root, "package.json"), "utf8"),
  );
  // What npm says at length about a network that is not there helps nobody.
  const offline = /npm error code (E(?:CONN|NOT|AI_|TIME|4|5)\w+)/.exec(stderr);
  const reason = offline?.[1] ?? `\n${stdout}${stderr}`;
  throw new Error(
    `Cannot try the package (it is made: ${tarball}): npm could not install ` +
      `it with koffi ${devDependencies.koffi}, neither from its cache nor ` +
      `from the registry: ${reason}`,
  );
}

async function checkTypes(project: string): Promise<void> {
  writeFileSync(join(project, "typed.ts"), typedScript);
  await succeed([
    tool("tsc"),
    "--noEmit",
    "--strict",
    "--target",
    "es2022",
    "--lib",
    "esnext,dom",
    "--module",
    "nodenext",
    "--types",
    "",
    "typed.ts",
  ], { cwd: project });
}

/** Serves from a script; returns what a front-end was offered. */
async function serve(project: string): Promise<bigint> {
  const socket = join(project, "device.sock");
  writeFileSync(join(project, "serve.mjs"), serveScript);
  const server = new Child(["node", "serve.mjs", socket], { cwd: project });
  try {
    await server.line(/^ready$/);
    const features = await getFeatures(socket);
    if (features !== (ownFeature | libraryFeatures)) {
      throw new Error(`The package offers features 0x${features.toString(16)}`);
    }
    const { status, stderr } = await server.end();
    if (status !== 0 || stderr !== "") {
      throw new Error(`The server ended with ${status}: ${stderr}`);
    }
    return features;
  } finally {
    server.process.kill("SIGKILL");
  }
}

/** Serves a disk with the package's command; returns its bytes. */
async function serveDisk(project: string, size: number): Promise<number> {
  const socket = join(project, "disk.sock");
  const server = new Child([
    join(project, "node_modules", ".bin", "vhost2"),
    "blk",
    "--socket-path",
    socket,
    "--memory",
    String(size),
  ], { cwd: project });
  try {
    await server.line(/^vhost2: listening on /);
    const frontend = await RawFrontend.connect(socket);
    // struct virtio_blk_config starts with the u64 capacity in sectors of 512.
    const config = await frontend.getConfig(8);
    await frontend.close();
    server.signal("SIGTERM");
    const { status, stderr } = await server.finished;
    if (status !== 0) throw new Error(`vhost2 ended with ${status}: ${stderr}`);
    return new DataView(config.buffer, config.byteOffset, 8)
      .getUint32(0, true) * 512;
  } finally {
    server.process.kill("SIGKILL");
  }
}

/**
 * Installs the tarball and uses it; throws when something is not as it should
 * be, in one sentence where the reason is outside the package.
 *
 * @returns what was shown, one line each
 */
export async function provePackage(tarball: string): Promise<string[]> {
  return await withFolder(async (project) => {
    await install(project, tarball);
    const shown = ["Installed it in an empty project"];
    await checkTypes(project);
    shown.push("TypeScript checks a user's code against its types");
    const features = await serve(project);
    shown.push(
      `A script on Node serves a device with features 0x${
        features.toString(16)
      }`,
    );
    const version = await succeed(
      [...npmCommand(), "exec", "--no", "--", "vhost2", "--version"],
      { cwd: project, env: outerNpm },
    );
    shown.push(`npx vhost2 --version: ${version.trim()}`);
    const size = 4 << 20;
    const served = await serveDisk(project, size);
    if (served !== size) {
      throw new Error(`vhost2 serves a disk of ${served} bytes, not ${size}`);
    }
    shown.push(`vhost2 blk serves a disk of ${size} bytes`);
    return shown;
  });
}
