// The kernel of the guests that test VDUSE: the newest one for this Debian. The
// release's own kernel may lack VDUSE (that of Debian 12 does), so it comes from
// the backports. Their package list is kept beside, out of the system's.
import { existsSync } from "node:fs";
import { mkdir, readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import {
  isUnpacked,
  mustHaveApt,
  noteRecipe,
  recipeOf,
  unpackInto,
} from "./debian.mjs";
import { capture, SetupError, step } from "./step.mjs";

/** The cloud flavour has VDUSE, virtio_vdpa and vhost_vdpa as modules. */
const METAPACKAGE = "linux-image-cloud-amd64";
const KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg";

/**
 * Unpacks the kernel into CACHE/vdpa-guest. What cannot be had is said, and the
 * tests that need it are skipped by name.
 *
 * @param {string} cache
 */
export async function fetchVdpaGuest(cache) {
  const folder = join(cache, "vdpa-guest");
  const recipe = recipeOf(METAPACKAGE, fetchKernel, backports);
  if (await isUnpacked(folder, recipe)) return;
  try {
    await fetchKernel(folder, join(cache, "backports"), recipe);
  } catch (error) {
    if (!(error instanceof SetupError)) throw error;
    if (error.output) console.error(error.output.trimEnd());
    console.error(
      `${error.message}; without it the tests of VDUSE in guests are skipped`,
    );
  }
}

/**
 * @param {string} folder
 * @param {string} lists where apt keeps its own
 * @param {string} recipe
 */
async function fetchKernel(folder, lists, recipe) {
  mustHaveApt([METAPACKAGE]);
  const apt = await backports(lists);
  try {
    const text = await capture(["apt-cache", ...apt, "depends", METAPACKAGE]);
    const kernel = /Depends: (linux-image-\d\S+)/.exec(text)?.[1];
    if (kernel === undefined) {
      throw new SetupError(
        `Cannot fetch a kernel with VDUSE: the backports have no ${METAPACKAGE}`,
      );
    }
    await unpackInto(
      folder,
      "a kernel with VDUSE",
      "34 MB",
      () => Promise.resolve([kernel]),
      async (unpacked) => {
        // tests/qemu/cache.ts reads this.
        await writeFile(
          join(unpacked, "manifest.json"),
          JSON.stringify({ kernel: kernel.replace(/^linux-image-/, "") }) +
            "\n",
        );
        await noteRecipe(unpacked, recipe);
      },
      apt,
    );
  } finally {
    await rm(lists, { recursive: true, force: true });
  }
}

/** Options for apt that make it see the backports of this release, and no more. */
async function backports(lists) {
  const release = await releaseName();
  const targets = await capture([
    "apt-get",
    "indextargets",
    "--format",
    "$(REPO_URI) $(RELEASE) $(COMPONENT)",
    "Created-By: Packages",
  ]);
  // The mirror that this machine has its Debian from.
  const mirror = targets.split("\n").map((line) => line.split(" "))
    .find(([, name, component]) => name === release && component === "main")
    ?.[0];
  if (mirror === undefined) {
    throw new SetupError(
      "Cannot fetch a kernel with VDUSE: apt's sources have no " +
        `"${release} main" whose mirror would have the backports`,
    );
  }
  await mkdir(join(lists, "lists", "partial"), { recursive: true });
  await mkdir(join(lists, "cache", "archives", "partial"), { recursive: true });
  const sources = join(lists, "sources.list");
  const signed = existsSync(KEYRING) ? `[signed-by=${KEYRING}] ` : "";
  await writeFile(
    sources,
    `deb ${signed}${mirror} ${release}-backports main\n`,
  );
  const apt = [
    `-oDir::Etc::SourceList=${sources}`,
    "-oDir::Etc::SourceParts=/dev/null",
    `-oDir::State::Lists=${join(lists, "lists")}`,
    `-oDir::Cache=${join(lists, "cache")}`,
    // apt's own unprivileged user may not reach this directory.
    ...(process.getuid?.() === 0 ? ["-oAPT::Sandbox::User=root"] : []),
  ];
  await step("Reading the list of Debian's backports", "about 5 s", [
    "apt-get",
    ...apt,
    "update",
  ], { remedy: "the mirror may not have them" });
  return apt;
}

async function releaseName() {
  const text = await readFile("/etc/os-release", "utf8").catch(() => "");
  const id = /^ID=(\S+)/m.exec(text)?.[1];
  const name = /^VERSION_CODENAME=(\S+)/m.exec(text)?.[1];
  if (id === "debian" && name !== undefined) return name;
  throw new SetupError(
    "Cannot fetch a kernel with VDUSE: it comes from Debian's backports, " +
      `and this is ${id ?? "an unknown system"}`,
  );
}
