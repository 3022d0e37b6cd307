// Makes a fresh checkout ready: npm packages, the native core, and what a QEMU
// guest needs. Plain Node with builtins only, because nothing else is there yet.
//
//   node tools/setup.mjs [packages] [core] [guest]
//
// Each part is quick when there is nothing to do.
import { createHash } from "node:crypto";
import { existsSync, realpathSync } from "node:fs";
import { mkdir, readFile, rename, rm, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import {
  candidateOf,
  IN_A_CONTAINER,
  isUnpacked,
  mustHaveApt,
  noteRecipe,
  onPath,
  recipeOf,
  unpackInto,
  updateLists,
} from "./debian.mjs";
import { capture, SetupError, step } from "./step.mjs";
import { fetchTestpmd } from "./testpmd.mjs";
import { fetchVdpaGuest } from "./vdpa_guest.mjs";

export const ROOT = dirname(dirname(fileURLToPath(import.meta.url)));
export const BIN = join(ROOT, "node_modules", ".bin");
/** The pinned Deno itself: see `freeTheNameDeno`. */
export const DENO = join(ROOT, "node_modules", "deno", "deno");
const CACHE = join(ROOT, ".cache");
const GUEST = join(CACHE, "guest");

/** npm packages of package.json, installed again when it or its lock changes. */
export async function installPackages() {
  mustBeLinux();
  const stamp = join(ROOT, "node_modules", ".vhost2-installed");
  const wanted = await hashOf("package.json", "package-lock.json");
  const installed = await readFile(stamp, "utf8").catch(() => "");
  if (installed === wanted) return await freeTheNameDeno();
  // The npm that runs us, or the one on the PATH.
  // (`deno task` puts itself there, which is no script for Node.)
  const npmScript = process.env.npm_execpath ?? "";
  const npm = npmScript.endsWith("npm-cli.js")
    ? [process.execPath, npmScript]
    : ["npm"];
  await step("Installing npm packages", "about 30 s", [
    ...npm,
    "install",
    // The lock file is an input here: `npm ci` cannot be used because it
    // insists on the packages of all other platforms too.
    "--no-save",
    "--no-audit",
    "--no-fund",
    "--loglevel=error",
  ], { cwd: ROOT, remedy: "run by hand: npm install" });
  await freeTheNameDeno();
  await writeFile(stamp, wanted);
}

/**
 * `deno task` takes what it finds in node_modules/.bin for JavaScript, its own
 * native self included, and cannot start itself any more.
 */
async function freeTheNameDeno() {
  if (!existsSync(DENO)) {
    // Puts the executable of this platform into its place.
    const launcher = join(ROOT, "node_modules", "deno", "bin.cjs");
    await capture([process.execPath, launcher, "--version"], { cwd: ROOT });
  }
  await rm(join(BIN, "deno"), { force: true });
}

/** The native core, for all platforms, by build.zig (which knows what is stale). */
export async function buildCore() {
  mustBeLinux();
  await step(
    "Building the native core",
    "about 1 min the first time",
    [join(BIN, "zig"), "build", "--release=safe"],
    { cwd: ROOT },
  );
}

/** QEMU, and in `.cache/guest` a kernel and a busybox, unpacked and not installed. */
export async function prepareGuest() {
  mustBeLinux();
  if (process.arch !== "x64") {
    throw new SetupError(
      `Cannot run the QEMU guests on ${process.arch}: they are x86_64 Debian ` +
        "systems; on an x86_64 machine run: npm test",
    );
  }
  await installQemu();
  const recipe = recipeOf(KERNEL_METAPACKAGE, kernelPackage, fetchGuest);
  if (!await isUnpacked(GUEST, recipe)) await fetchGuest(recipe);
  await buildGuestProgram("verify", "disk verifier");
}

/**
 * What only tests need beside: programs for guests, DPDK as a peer, and a kernel
 * with VDUSE.
 */
export async function preparePeers() {
  await buildGuestProgram("transfer", "TCP transfer");
  await buildGuestProgram("vhost_vdpa", "user of a vDPA disk");
  await fetchTestpmd(CACHE);
  await fetchVdpaGuest(CACHE);
}

/** Debian packages that must be installed, and what shows that they are. */
const INSTALLED_PACKAGES = [
  { name: "qemu-system-x86", isThere: () => onPath("qemu-system-x86_64") },
  // The core is loaded under musl too, by a test.
  { name: "musl", isThere: () => existsSync("/lib/ld-musl-x86_64.so.1") },
];

async function installQemu() {
  const missing = INSTALLED_PACKAGES.filter((entry) => !entry.isThere())
    .map((entry) => entry.name);
  if (missing.length === 0) return;
  mustHaveApt(missing);
  const install = `apt-get install -y --no-install-recommends ${
    missing.join(" ")
  }`;
  if (process.getuid?.() !== 0) {
    throw new SetupError(
      `Cannot install ${missing.join(" and ")}: not root; ` +
        `run by hand: sudo ${install}`,
    );
  }
  const env = { DEBIAN_FRONTEND: "noninteractive" };
  if (await candidateOf(missing[0]) === undefined) await updateLists();
  const run = (/** @type {string} */ remedy) =>
    step(
      `Installing Debian's ${missing.join(" and ")}`,
      "about 1 min",
      install.split(" "),
      { env, remedy },
    );
  try {
    await run("the package lists may be old");
  } catch (error) {
    // Lists older than the archive name files that are gone from it.
    if (!(error instanceof SetupError)) throw error;
    await updateLists();
    await run(`run by hand: apt-get update && ${install}`);
  }
}

/**
 * The cloud flavour: a third of the size of the generic kernel, with ext4 and
 * PCI hot-plug built in and the virtio drivers as modules.
 */
const KERNEL_METAPACKAGE = "linux-image-cloud-amd64";

/** @param {string} recipe */
async function fetchGuest(recipe) {
  mustHaveApt([KERNEL_METAPACKAGE, "busybox-static"]);
  let kernel = await kernelPackage();
  if (kernel === undefined) {
    if (process.getuid?.() === 0) await updateLists();
    kernel = await kernelPackage();
  }
  if (kernel === undefined) {
    throw new SetupError(
      `Cannot fetch the guest's kernel: apt knows no ${KERNEL_METAPACKAGE} ` +
        "(it is Debian's); run by hand: sudo apt-get update, or elsewhere than " +
        `on Debian: ${IN_A_CONTAINER}`,
    );
  }
  await unpackInto(
    GUEST,
    "the guest's kernel and busybox",
    "28 MB",
    async () => {
      kernel = await kernelPackage() ?? kernel;
      return [kernel, "busybox-static"];
    },
    async (unpacked) => {
      // tests/qemu/cache.ts reads this.
      await writeFile(
        join(unpacked, "manifest.json"),
        JSON.stringify({ kernel: kernel.replace(/^linux-image-/, "") }) + "\n",
      );
      await noteRecipe(unpacked, recipe);
    },
  );
}

/**
 * A static program for the guest, named by the hash of its source.
 *
 * @param {string} name @param {string} what
 */
async function buildGuestProgram(name, what) {
  const source = join(ROOT, "tests", "qemu", `${name}.zig`);
  const hash = createHash("sha256").update(await readFile(source)).digest(
    "hex",
  );
  const folder = join(CACHE, "guest-tools");
  const program = join(folder, `${name}-${hash.slice(0, 16)}`);
  if (existsSync(program)) return;
  await mkdir(folder, { recursive: true });
  const building = `${program}.${process.pid}`;
  await step(`Building the guest's ${what}`, "about 20 s", [
    join(BIN, "zig"),
    "build-exe",
    source,
    "-target",
    "x86_64-linux-none",
    // The crc32 instruction of SSE 4.2: the guest's processor has it.
    "-mcpu=x86_64_v2",
    "-OReleaseSafe",
    "-fstrip",
    "-fsingle-threaded",
    `-femit-bin=${building}`,
  ], { cwd: ROOT });
  await rename(building, program);
}

/** The newest kernel image that the metapackage depends on. */
async function kernelPackage() {
  if (await candidateOf(KERNEL_METAPACKAGE) === undefined) return undefined;
  const text = await capture(["apt-cache", "depends", KERNEL_METAPACKAGE]);
  return /Depends: (linux-image-\d\S+)/.exec(text)?.[1];
}

function mustBeLinux() {
  if (process.platform === "linux") return;
  throw new SetupError(
    `Cannot work on ${process.platform}: vhost-user needs Linux; ` +
      `with Docker run: ${IN_A_CONTAINER}`,
  );
}

/** @param {string[]} names files of the project; one that is missing counts as empty */
async function hashOf(...names) {
  const hash = createHash("sha256");
  for (const name of names) {
    hash.update(`${name}\n`);
    hash.update(await readFile(join(ROOT, name)).catch(() => ""));
  }
  return hash.digest("hex");
}

/**
 * Runs `action` and turns what cannot be done into its sentence and exit code 1.
 *
 * @param {() => Promise<number>} action resolves with the exit code
 */
export async function main(action) {
  try {
    process.exitCode = await action();
  } catch (error) {
    if (!(error instanceof SetupError)) throw error;
    if (error.output) console.error(error.output.trimEnd());
    console.error(error.message);
    process.exitCode = 1;
  }
}

const PARTS = {
  packages: installPackages,
  core: buildCore,
  guest: async () => {
    await prepareGuest();
    await preparePeers();
  },
};

if (
  process.argv[1] &&
  realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)
) {
  await main(async () => {
    const wanted = process.argv.slice(2);
    const unknown = wanted.find((name) => !Object.hasOwn(PARTS, name));
    if (unknown !== undefined) {
      throw new SetupError(
        `Cannot set up "${unknown}": the parts are ${
          Object.keys(PARTS).join(", ")
        }`,
      );
    }
    for (const [name, part] of Object.entries(PARTS)) {
      if (wanted.length === 0 || wanted.includes(name)) await part();
    }
    return 0;
  });
}
