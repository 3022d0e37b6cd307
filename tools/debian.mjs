// Debian's packages: asked for, and downloaded and unpacked into a folder of
// ours, where nothing has to be installed.
import { createHash } from "node:crypto";
import { existsSync } from "node:fs";
import {
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  rename,
  rm,
  writeFile,
} from "node:fs/promises";
import { delimiter, dirname, join } from "node:path";
import process from "node:process";
import { capture, SetupError, step } from "./step.mjs";

/** Works where this project works at all: see `mustBeLinux`. */
export const IN_A_CONTAINER =
  'docker run --rm -it -v "$PWD":/vhost2 -w /vhost2 node:20-bookworm npm test';

/** @param {string} program */
export function onPath(program) {
  return (process.env.PATH ?? "").split(delimiter)
    .some((folder) => folder !== "" && existsSync(join(folder, program)));
}

/** @param {string[]} names what would be fetched */
export function mustHaveApt(names) {
  if (onPath("apt-get") && onPath("apt-cache") && onPath("dpkg-deb")) return;
  throw new SetupError(
    `Cannot get ${names.join(" and ")}: this is not Debian (no apt-get); ` +
      `with Docker run: ${IN_A_CONTAINER}`,
  );
}

/** @param {string} name */
export async function candidateOf(name) {
  const text = await capture(["apt-cache", "policy", name], {
    env: { LC_ALL: "C" },
  });
  const version = /Candidate: (\S+)/.exec(text)?.[1];
  return version === "(none)" ? undefined : version;
}

export async function updateLists() {
  await step("Updating Debian's package lists", "about 15 s", [
    "apt-get",
    "update",
  ], { remedy: "run by hand: sudo apt-get update" });
}

/**
 * Names what is wanted by what makes it: functions count by their text. A
 * folder that was unpacked by another recipe, of an older clone, is unpacked
 * again.
 *
 * @param {unknown[]} parts
 */
export function recipeOf(...parts) {
  return createHash("sha256").update(parts.map(String).join("\n")).digest(
    "hex",
  );
}

/** The file in an unpacked folder that has the recipe. */
const RECIPE = ".recipe";

/**
 * For `unpackInto`'s `finish`: what `isUnpacked` looks at.
 *
 * @param {string} unpacked
 * @param {string} recipe
 */
export async function noteRecipe(unpacked, recipe) {
  await writeFile(join(unpacked, RECIPE), recipe);
}

/**
 * Whether `folder` was unpacked by `recipe`.
 *
 * @param {string} folder
 * @param {string} recipe
 */
export async function isUnpacked(folder, recipe) {
  const found = await readFile(join(folder, RECIPE), "utf8").catch(() => "");
  return found === recipe;
}

/**
 * Downloads packages and unpacks them into `folder`/root. The folder is filled
 * beside and renamed when whole, so that a killed or a concurrent set-up never
 * leaves half of it. What is there already makes room.
 *
 * @param {string} folder
 * @param {string} what for people
 * @param {string} size likewise
 * @param {() => Promise<string[]>} packages asked again with new lists when
 *   they are not to be had
 * @param {(unpacked: string) => Promise<void>} finish what else belongs there
 * @param {string[]} [apt] options for apt, where its lists are others than the
 *   system's, and new
 */
export async function unpackInto(
  folder,
  what,
  size,
  packages,
  finish,
  apt = [],
) {
  await mkdir(dirname(folder), { recursive: true });
  const unpacked = await mkdtemp(`${folder}-`);
  const isRoot = process.getuid?.() === 0;
  const fetchAll = async () =>
    step(`Fetching ${what}`, size, [
      "apt-get",
      ...apt,
      "download",
      // apt's own unprivileged user may not reach this directory.
      ...(isRoot ? ["-oAPT::Sandbox::User=root"] : []),
      ...await packages(),
    ], { cwd: unpacked, remedy: "run by hand: sudo apt-get update" });
  try {
    try {
      await fetchAll();
    } catch (error) {
      // Lists older than the archive name files that are gone from it.
      if (!isRoot || apt.length > 0) throw error;
      await updateLists();
      await fetchAll();
    }
    const archives = (await readdir(unpacked))
      .filter((name) => name.endsWith(".deb"));
    await step(`Unpacking ${what}`, "about 5 s", [
      "sh",
      "-ec",
      'for file in *.deb; do dpkg-deb -x "$file" root; done',
    ], { cwd: unpacked });
    for (const name of archives) await rm(join(unpacked, name));
    await finish(unpacked);
    await rename(folder, join(unpacked, "old")).catch(() => {});
    await rename(unpacked, folder).catch((error) => {
      // Another set-up may have been faster.
      if (!existsSync(join(folder, "root"))) throw error;
    });
    await rm(join(folder, "old"), { recursive: true, force: true });
  } finally {
    await rm(unpacked, { recursive: true, force: true });
  }
}
