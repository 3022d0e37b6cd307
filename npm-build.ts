/**
 * Makes the npm package, and proves that it works.
 *
 *   deno task npm [FOLDER]      into dist/npm unless a folder is given
 *
 * `deno pack` decides which modules belong to it and makes JavaScript of them;
 * TypeScript lowers that to what Node 20 understands and writes the types;
 * `npm pack` makes the tarball. The cores of both architectures are inside as
 * modules, so that the package has no binary to find and no install script.
 *
 * @module
 */

import {
  copyFileSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { Buffer } from "node:buffer";
import { homedir, tmpdir } from "node:os";
import { dirname, join, resolve } from "node:path";
import process from "node:process";
import { npmCommand, provePackage } from "./tests/packaging/npm_proof.ts";
import { root, succeed, tool } from "./tests/packaging/project.ts";

const command = "cli/main.ts";
const documents = ["README.md", "LICENSE"];
/** Everything that the entries and the command can reach. */
const sources = [
  "mod.ts",
  "cli",
  "devices",
  "ffi",
  "driver",
  "pci",
  "frontend",
  "protocol",
  "session",
  "transports",
  "virtqueue",
];
/** In the graph only as literal dynamic imports: must not get lost. */
const cores = ["ffi/embedded/x86_64.js", "ffi/embedded/aarch64.js"];

function readJson(path: string) {
  return JSON.parse(readFileSync(path, "utf8"));
}

const project = readJson(join(root, "deno.json"));

/** What the package offers, by specifier: "." is "./mod.ts". */
const entries: Record<string, string> = project.exports;

const javaScript = (name: string) => name.replace(/\.ts$/, ".js");
const declaration = (name: string) => name.replace(/\.ts$/, ".d.ts");

/** All files below a folder, relative to it, sorted. */
function filesOf(folder: string): string[] {
  return readdirSync(folder, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name).slice(folder.length + 1))
    .sort();
}

/** A copy of what the package is made from, and nothing else of the checkout. */
function stage(folder: string): void {
  for (const name of [...sources, ...documents]) {
    if (!existsSync(join(root, name))) {
      throw new Error(`Cannot pack ${name}: there is no such file`);
    }
    cpSync(join(root, name), join(folder, name), {
      recursive: true,
      dereference: true,
    });
  }
  for (const core of cores) {
    const source = core.replace(/\.js$/, ".ts");
    if (!existsSync(join(folder, source))) {
      throw new Error(`Cannot pack ${source}: run "deno task build" first`);
    }
  }
  const { name, version, license, compilerOptions } = project;
  writeFileSync(
    join(folder, "deno.json"),
    JSON.stringify({
      name,
      version,
      license,
      compilerOptions,
      exports: { ...entries, "./cli": `./${command}` },
      // What is not in the graph is no asset either.
      publish: { include: documents },
      nodeModulesDir: "manual",
      lock: false,
    }),
  );
  // koffi's types.
  symlinkSync(join(root, "node_modules"), join(folder, "node_modules"));
}

/** `deno pack`, unpacked into `target`. */
async function pack(staged: string, target: string): Promise<void> {
  const tarball = join(staged, "packed.tgz");
  await succeed([
    tool("deno"),
    "pack",
    "--quiet",
    "--allow-dirty",
    // The types come from TypeScript: without this, no module has any as soon
    // as one constant of the public API has its type inferred.
    "--allow-slow-types",
    "--no-source-maps",
    "--output",
    tarball,
  ], { cwd: staged });
  mkdirSync(target, { recursive: true });
  await succeed(
    ["tar", "-xzf", tarball, "-C", target, "--strip-components=1"],
  );
}

/** TypeScript, with a configuration of its own in `folder`. */
async function compile(
  folder: string,
  files: string[],
  options: Record<string, unknown>,
): Promise<void> {
  const config = join(folder, "tsconfig.json");
  writeFileSync(
    config,
    JSON.stringify({
      compilerOptions: {
        module: "nodenext",
        rootDir: folder,
        // `deno pack` has just checked the types.
        noCheck: true,
        types: [],
        ...options,
      },
      files: files.map((name) => join(folder, name)),
    }),
  );
  await succeed([tool("tsc"), "-p", config], { cwd: folder });
  rmSync(config);
}

/** `using` and the like become ES2022, which Node 20 runs. */
async function lower(folder: string, target: string): Promise<string[]> {
  const modules = filesOf(folder).filter((name) => name.endsWith(".js"));
  await compile(folder, modules, {
    target: "es2022",
    allowJs: true,
    outDir: target,
  });
  return modules;
}

/** The declarations of `modules`, which name each other as JavaScript. */
async function declare(
  staged: string,
  modules: string[],
  target: string,
): Promise<void> {
  const files = modules.map((name) => name.replace(/\.js$/, ".ts"));
  await compile(staged, files, {
    target: "esnext",
    lib: ["esnext", "dom"],
    allowImportingTsExtensions: true,
    declaration: true,
    emitDeclarationOnly: true,
    outDir: target,
  });
  for (const file of files) {
    const path = join(target, declaration(file));
    const text = readFileSync(path, "utf8");
    writeFileSync(
      path,
      text.replace(
        /((?:from |import\(|import )"\.{1,2}\/[^"]+)\.ts"/g,
        '$1.js"',
      ),
    );
  }
}

function manifest(packed: Record<string, string>) {
  const { engines, devDependencies } = readJson(join(root, "package.json"));
  return {
    name: packed.name,
    version: packed.version,
    description: "Virtual devices for virtual machines, in TypeScript: " +
      "vhost-user back-ends over a native core",
    keywords: ["vhost-user", "virtio", "qemu", "block device"],
    license: packed.license,
    type: "module",
    engines,
    os: ["linux"],
    cpu: ["x64", "arm64"],
    exports: Object.fromEntries(
      Object.entries(entries).map(([key, file]) => [key, {
        types: declaration(file),
        default: javaScript(file),
      }]),
    ),
    bin: { vhost2: javaScript(command) },
    dependencies: { koffi: devDependencies.koffi },
  };
}

/** npm makes it executable; the kernel wants to know what runs it. */
function makeCommand(path: string): void {
  const text = readFileSync(path, "utf8");
  const body = text.replace(/^#!.*\n/, "");
  writeFileSync(path, `#!/usr/bin/env node\n${body}`);
}

/** Fails when the package holds what it should not, or lacks what it needs. */
function inspect(folder: string, staged: string): void {
  const files = filesOf(folder);
  const modules = [
    ...Object.values(entries).map((name) => name.slice("./".length)),
    command,
  ];
  const needed = [
    ...cores,
    ...documents,
    ...modules.map(javaScript),
    ...modules.map(declaration),
  ];
  const missing = needed.filter((name) => !files.includes(name));
  if (missing.length > 0) {
    throw new Error(`The package lacks ${missing.join(", ")}`);
  }
  const known = new Set(["package.json", ...documents]);
  const foreign = files.filter((name) =>
    !known.has(name) && !/\.(js|d\.ts)$/.test(name) ||
    /^(tests|tools|bench|examples|docs|node_modules)\//.test(name)
  );
  if (foreign.length > 0) {
    throw new Error(`The package should not hold ${foreign.join(", ")}`);
  }
  const paths = [root, staged, dirname(folder), join(homedir(), "/")];
  for (const name of files) {
    const text = readFileSync(join(folder, name), "latin1");
    const base64 = /"([A-Za-z0-9+/=]{1000,})"/.exec(text)?.[1] ?? "";
    const hidden = Buffer.from(base64, "base64").toString("latin1");
    const found = paths.find((path) =>
      text.includes(path) || hidden.includes(path)
    );
    if (found !== undefined) {
      throw new Error(`${name} names a path of this machine: ${found}`);
    }
  }
}

/** Makes the package in `output`; returns the tarball's path. */
export async function buildPackage(output: string): Promise<string> {
  const staged = mkdtempSync(join(tmpdir(), "vhost2-npm-"));
  const unpacked = mkdtempSync(join(tmpdir(), "vhost2-npm-"));
  const folder = join(output, "package");
  try {
    rmSync(output, { recursive: true, force: true });
    mkdirSync(folder, { recursive: true });
    stage(staged);
    await pack(staged, unpacked);
    const modules = await lower(unpacked, folder);
    await declare(staged, modules, folder);
    for (const name of documents) {
      copyFileSync(join(root, name), join(folder, name));
    }
    makeCommand(join(folder, javaScript(command)));
    writeFileSync(
      join(folder, "package.json"),
      JSON.stringify(
        manifest(readJson(join(unpacked, "package.json"))),
        null,
        2,
      ) +
        "\n",
    );
    inspect(folder, staged);
    const said = await succeed(
      [...npmCommand(), "pack", "--json", "--pack-destination", output],
      { cwd: folder },
    );
    return join(output, fileNameOf(JSON.parse(said)));
  } finally {
    rmSync(staged, { recursive: true, force: true });
    rmSync(unpacked, { recursive: true, force: true });
  }
}

/** npm 11 answers a list of packages; newer ones an object by their names. */
function fileNameOf(said: Record<string, { filename: string }>): string {
  return Object.values(said)[0].filename;
}

async function main(): Promise<void> {
  const output = resolve(process.argv[2] ?? join(root, "dist", "npm"));
  const tarball = await buildPackage(output);
  const { name, version } = readJson(join(output, "package", "package.json"));
  const files = filesOf(join(output, "package"));
  const kilobytes = (readFileSync(tarball).length / 1024).toFixed(0);
  console.log(
    `Made ${name} ${version}: ${tarball}, ${kilobytes} KB, ` +
      `${files.length} files`,
  );
  for (const file of files) console.log(`  ${file}`);
  for (const line of await provePackage(tarball)) console.log(line);
}

try {
  await main();
} catch (error) {
  console.error((error as Error).message);
  process.exitCode = 1;
}
