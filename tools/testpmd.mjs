// DPDK's testpmd, a peer in tests and benches: unpacked into the cache, because
// its package would install two hundred others. Where it cannot be had those
// tests are skipped by name.
import { chmod, writeFile } from "node:fs/promises";
import { join } from "node:path";
import {
  candidateOf,
  isUnpacked,
  noteRecipe,
  onPath,
  recipeOf,
  unpackInto,
} from "./debian.mjs";
import { capture, SetupError } from "./step.mjs";

const PACKAGE = "dpdk-dev";
/** Shared libraries that testpmd may need; the C library is there. */
const LIBRARY = /^(?:lib(?!c6$)[a-z0-9.+-]+|ibverbs-providers)$/;

/** What a virtual port of virtio_user or vhost is made of. */
const DRIVERS = ["bus_vdev", "mempool_ring", "net_vhost", "net_virtio"];

/** @param {string} cache the folder for downloads */
export async function fetchTestpmd(cache) {
  const folder = join(cache, "dpdk");
  const recipe = recipeOf(PACKAGE, LIBRARY, DRIVERS, closure, finish);
  if (await isUnpacked(folder, recipe)) return;
  if (onPath("dpdk-testpmd")) return;
  if (!onPath("apt-get") || !onPath("apt-cache") || !onPath("dpkg-deb")) return;
  try {
    if (await candidateOf(PACKAGE) === undefined) return;
    await unpackInto(
      folder,
      "DPDK's testpmd",
      "6 MB",
      closure,
      async (unpacked) => {
        await finish(unpacked);
        await noteRecipe(unpacked, recipe);
      },
    );
  } catch (error) {
    if (!(error instanceof SetupError)) throw error;
    console.error(`${error.message}; the tests against DPDK are skipped`);
  }
}

/** The package and the libraries behind it. */
async function closure() {
  const found = new Set([PACKAGE]);
  for (let asked = [PACKAGE]; asked.length > 0;) {
    const text = await capture([
      "apt-cache",
      "show",
      "--no-all-versions",
      ...asked,
    ], { env: { LC_ALL: "C" } });
    asked = [];
    for (const [, line] of text.matchAll(/^Depends: (.*)$/gm)) {
      for (const entry of line.split(", ")) {
        const [name] = entry.split(/[ :]/);
        if (found.has(name) || !LIBRARY.test(name) || name.endsWith("-dev")) {
          continue;
        }
        // Drivers that nothing depends on have the version in their names too.
        const version = /^librte-eal(\d+)$/.exec(name)?.[1];
        const more = version === undefined
          ? [name]
          : [name, `librte-net-vhost${version}`, `librte-net-virtio${version}`];
        for (const one of more) found.add(one);
        asked.push(...more);
      }
    }
  }
  return [...found];
}

/**
 * A script that starts it with its own libraries and drivers.
 *
 * @param {string} unpacked
 */
async function finish(unpacked) {
  const script = join(unpacked, "dpdk-testpmd");
  await writeFile(
    script,
    `#!/bin/sh
# Made by the set-up.
here=$(cd "$(dirname "$0")" && pwd)/root
export LD_LIBRARY_PATH="$(dirname "$(find "$here" -name 'librte_eal.so.*' | head -n 1)")"
# Preloaded, beside what stdbuf preloads: its option -d refuses whatever lies
# below a folder like /tmp.
for driver in ${DRIVERS.join(" ")}; do
  file=$(ls "$LD_LIBRARY_PATH/librte_$driver.so."* | head -n 1)
  drivers="$drivers \${file##*/}"
done
LD_PRELOAD="$LD_PRELOAD$drivers" exec "$here/usr/bin/dpdk-testpmd" "$@"
`,
  );
  await chmod(script, 0o755);
}
