/** `import ... from "http://.../mod.ts"` needs `--allow-ffi` and nothing else. */

import assert from "node:assert/strict";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { join, relative, sep } from "node:path";
import { fileURLToPath } from "node:url";
import { test } from "../harness.ts";
import {
  architecture,
  Child,
  root,
  run,
  succeed,
  tool,
  withFolder,
} from "./project.ts";
import { getFeatures, libraryFeatures } from "./raw_frontend.ts";

const ownFeature = 1n << 5n;
const embeddedCore = `/ffi/embedded/${architecture}.ts`;

interface CheckoutServer {
  /** "127.0.0.1:PORT". */
  readonly host: string;
  /** What was asked for, in order: a path, or a URL when we were a proxy. */
  readonly requests: string[];
  /** Served in place of the file of that path. */
  readonly replaced: Map<string, string>;
}

/** Serves the files of the checkout while `body` runs. */
async function withServer(
  body: (server: CheckoutServer) => Promise<void>,
): Promise<void> {
  const requests: string[] = [];
  const replaced = new Map<string, string>();
  const server = createServer((request, response) => {
    const path = request.url ?? "";
    requests.push(path);
    const file = join(root, path);
    const text = replaced.get(path) ??
      (file.startsWith(root + sep) && path.endsWith(".ts") && existsSync(file)
        ? readFileSync(file, "utf8")
        : undefined);
    response.writeHead(text === undefined ? 404 : 200, {
      "content-type": "application/typescript",
      // The client's keep-alive connection must not outlive the test.
      connection: "close",
    });
    response.end(text ?? "");
  });
  // A client that would want a tunnel to somewhere is heard too.
  server.on("connect", (request, socket) => {
    requests.push(request.url ?? "");
    socket.end("HTTP/1.1 403 Forbidden\r\n\r\n");
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as AddressInfo;
  try {
    await body({ host: `127.0.0.1:${port}`, requests, replaced });
  } finally {
    server.closeAllConnections();
    await new Promise((resolve) => server.close(resolve));
  }
}

/**
 * An empty cache, and a world in which this server is the npm registry, JSR
 * and the proxy to everything else: what is fetched from anywhere is in its
 * list.
 */
function environment(
  host: string,
  folder: string,
): Record<string, string | undefined> {
  const url = `http://${host}/`;
  return {
    DENO_DIR: join(folder, "cache"),
    NPM_CONFIG_REGISTRY: `${url}npm/`,
    npm_config_registry: `${url}npm/`,
    JSR_URL: `${url}jsr/`,
    HTTP_PROXY: url,
    HTTPS_PROXY: url,
    http_proxy: url,
    https_proxy: url,
    NO_PROXY: "127.0.0.1",
    no_proxy: "127.0.0.1",
    DENO_NO_UPDATE_CHECK: "1",
  };
}

/** Only these two, and no question to a person. */
function permissions(host: string): string[] {
  return ["--no-prompt", "--allow-ffi", `--allow-import=${host}`];
}

interface GraphModule {
  readonly specifier: string;
  readonly dependencies?: readonly {
    /** Absent for what is imported for its types only. */
    readonly code?: { readonly specifier?: string };
  }[];
}

/** The modules of ours that `mod.ts` reaches, as the server's paths. */
async function graph(): Promise<string[]> {
  const info = JSON.parse(
    await succeed([tool("deno"), "info", "--json", "--no-lock", "mod.ts"], {
      cwd: root,
    }),
  );
  const modules = new Map(
    (info.modules as GraphModule[]).map((module) => [module.specifier, module]),
  );
  const start: string = info.roots[0];
  const reached = new Set([start]);
  // A Set's iteration goes on with what is added during it.
  for (const specifier of reached) {
    for (const { code } of modules.get(specifier)?.dependencies ?? []) {
      if (code?.specifier?.startsWith("file:")) reached.add(code.specifier);
    }
  }
  return [...reached]
    .map((specifier) => `/${relative(root, fileURLToPath(specifier))}`)
    .filter((path) => !path.includes("/node_modules/"))
    .sort();
}

function importScript(host: string): string {
  return `import { registerTarget } from "http://${host}/mod.ts";
if (typeof registerTarget !== "function") throw new Error("not a function");
`;
}

test("mod.ts imported by URL serves a device with --allow-ffi alone, and fetches its own modules and nothing else", async () => {
  const expected = await graph();
  assert.ok(expected.includes("/mod.ts"));
  assert.ok(expected.includes(embeddedCore));
  await withFolder(async (folder) => {
    await withServer(async ({ host, requests }) => {
      const socket = join(folder, "device.sock");
      const script = join(folder, "serve.ts");
      writeFileSync(
        script,
        importScript(host) + `
const target = await registerTarget({
  transport: "vhost-user",
  address: ${JSON.stringify(socket)},
  features: ${ownFeature}n,
  device: () => ({}),
});
console.log("ready");
for await (const _ of Deno.stdin.readable);
await target.unregister();
`,
      );
      const child = new Child([
        tool("deno"),
        "run",
        "--no-config",
        "--no-lock",
        ...permissions(host),
        script,
      ], { cwd: folder, env: environment(host, folder) });
      try {
        await child.line(/^ready$/);
        assert.equal(await getFeatures(socket), ownFeature | libraryFeatures);
        const { status, stderr } = await child.end();
        assert.equal(status, 0, stderr);
      } finally {
        child.process.kill("SIGKILL");
      }
      assert.deepEqual([...requests].sort(), expected);
    });
  });
});

test("Workers of a library that was imported by URL import it by URL too, with the same permissions", async () => {
  await withFolder(async (folder) => {
    await withServer(async ({ host }) => {
      const script = join(folder, "serve.ts");
      writeFileSync(
        script,
        importScript(host) + `
import { blkDevice, nullBacking } from "http://${host}/mod.ts";
const disk = blkDevice({ backing: nullBacking(1 << 20) });
const target = await registerTarget({
  transport: "vhost-user",
  address: ${JSON.stringify(join(folder, "device.sock"))},
  ...disk,
  workers: 2,
});
await target.unregister();
console.log("served and ended");
`,
      );
      const { status, stdout, stderr } = await run([
        tool("deno"),
        "run",
        "--no-config",
        "--no-lock",
        ...permissions(host),
        script,
      ], { cwd: folder, env: environment(host, folder) });
      assert.equal(stdout, "served and ended\n", stderr);
      assert.equal(status, 0, stderr);
    });
  });
});

test("without --allow-ffi the import by URL fails with one sentence that names it", async () => {
  await withFolder(async (folder) => {
    await withServer(async ({ host }) => {
      const script = join(folder, "serve.ts");
      writeFileSync(script, importScript(host));
      const { status, stderr } = await run([
        tool("deno"),
        "run",
        "--no-config",
        "--no-lock",
        "--no-prompt",
        `--allow-import=${host}`,
        script,
      ], { cwd: folder, env: environment(host, folder) });
      assert.notEqual(status, 0);
      assert.match(stderr, /Cannot load the core: .*--allow-ffi/);
    });
  });
});

test("a lock file refuses an embedded core that was tampered with", async () => {
  await withFolder(async (folder) => {
    await withServer(async ({ host, replaced }) => {
      const script = join(folder, "load.ts");
      writeFileSync(script, importScript(host) + `console.log("loaded");`);
      let count = 0;
      // Each with an empty cache: a filled one would not ask again.
      const load = (...flags: string[]) =>
        run([
          tool("deno"),
          "run",
          "--no-config",
          `--lock=${join(folder, "deno.lock")}`,
          ...flags,
          ...permissions(host),
          script,
        ], {
          cwd: folder,
          env: environment(host, join(folder, String(count++))),
        });
      const first = await load();
      assert.equal(first.stdout, "loaded\n", first.stderr);
      const same = await load("--frozen");
      assert.equal(same.stdout, "loaded\n", same.stderr);

      const text = readFileSync(join(root, embeddedCore), "utf8");
      // One byte of code: a quarter into the library.
      const at = text.length >> 2;
      const other = text[at] === "A" ? "B" : "A";
      replaced.set(
        embeddedCore,
        text.slice(0, at) + other + text.slice(at + 1),
      );
      const tampered = await load("--frozen");
      assert.notEqual(tampered.status, 0);
      assert.equal(tampered.stdout, "");
      assert.match(tampered.stderr, /[Ii]ntegrity check failed/);
      assert.ok(tampered.stderr.includes(embeddedCore), tampered.stderr);
    });
  });
});
