// Postcopy: POSTCOPY_ADVISE, LISTEN, SET_MEM_TABLE with its reply and ack, END
// (vhost-user-spec.md sections 1.2 and 1.5, DESIGN.md section 8).

import assert from "node:assert/strict";
import {
  type ChildProcess,
  spawn,
  type StdioOptions,
} from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { core } from "../../ffi/core.ts";
import {
  encodeBlkHeader,
  FrontendRequest as Request,
  PageFaults,
  ProtocolFeature,
  RefusedError,
  VhostUserDevice,
} from "../../frontend/mod.ts";
import {
  blkDevice,
  featureMask,
  fileBacking,
  registerTarget,
  Vhost2Error,
} from "../../mod.ts";
import { openUserfault } from "../../session/postcopy.ts";
import { isNode, test } from "../harness.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { Events, within } from "../support/wait.ts";
import { pageAt, pageSize, PageSource } from "./page_source.ts";
import {
  adviseAndListen,
  dataPage,
  mapAndStart,
  postcopyOptions,
} from "./postcopy_guest.ts";
import {
  assertWorks,
  opened,
  type Served,
  type ServeOptions,
  serving,
} from "./served.ts";

const pagefault = featureMask(ProtocolFeature.PAGEFAULT);
const memSlots = featureMask(ProtocolFeature.CONFIGURE_MEM_SLOTS);

/** Why this machine cannot run these tests; null if it can. */
function refusal(): string | null {
  try {
    core.descriptorClose(openUserfault());
    return null;
  } catch (error) {
    return (error as Error).message;
  }
}
const reason = refusal();

/** A test for where the kernel gives out userfaultfds. */
function postcopyTest(name: string, body: () => Promise<void>): void {
  if (reason !== null) return test.skip(name, reason);
  test(name, body);
}
const source = new PageSource();
// The Worker is there before anything is counted.
await source.stop();

function withPostcopy(
  options: ServeOptions,
  body: (guest: VhostUserDevice, served: Served) => Promise<void>,
): Promise<void> {
  return serving(
    { ...options, postcopy: true },
    (served) => opened(served, postcopyOptions, (guest) => body(guest, served)),
  );
}

/** `withPostcopy`, mapped and started, with somebody who fills the pages. */
function withPages(
  body: (
    guest: VhostUserDevice,
    bases: readonly bigint[],
  ) => Promise<void>,
): Promise<void> {
  return withPostcopy({}, async (guest) => {
    await source.serve(await adviseAndListen(guest));
    try {
      const bases = await mapAndStart(guest);
      await body(guest, bases);
    } finally {
      guest.connection.close();
      await guest.connection.closed;
      await source.stop();
    }
  });
}

postcopyTest(
  "POSTCOPY_ADVISE, POSTCOPY_LISTEN, SET_MEM_TABLE with its ack, POSTCOPY_END: requests wait for their pages",
  () =>
    withPages(async (guest, bases) => {
      const answer = guest.ram.allocate(pageSize);
      for (const page of [3, 4, 70, 255]) {
        const before = source.filled;
        const written = await within(
          guest.queues[0].submitChain([
            {
              address: dataPage(guest, page),
              length: pageSize,
              isWritable: false,
            },
            { address: answer, length: pageSize, isWritable: true },
          ]),
          `the request for page ${page}`,
        );
        assert.equal(written, pageSize);
        assert.equal(source.filled, before + 1);
        const expected = pageAt(bases[1] + BigInt(page * pageSize));
        assert.deepEqual(guest.ram.read(answer, pageSize), expected);
      }
      // What the front-end itself has touched was never waited for.
      assert.equal(source.filled, 4);
      await guest.connection.endPostcopy();
      // The queue has never stopped; a page that nobody sent is a page of zeros.
      await within(
        guest.queues[0].submitChain([
          {
            address: dataPage(guest, 100),
            length: pageSize,
            isWritable: false,
          },
          { address: answer, length: pageSize, isWritable: true },
        ]),
        "a request after the end",
      );
      assert.deepEqual(
        guest.ram.read(answer, pageSize),
        new Uint8Array(pageSize),
      );
      assert.equal(source.filled, 4);
      await guest.connection.endPostcopy();
    }),
);

postcopyTest(
  "postcopy: a device that writes part of a missing page leaves the rest as the front-end sent it",
  () =>
    withPages(async (guest, bases) => {
      const bytes = new TextEncoder().encode("written by the device");
      const from = guest.ram.allocate(bytes.length);
      guest.ram.write(from, bytes);
      const page = dataPage(guest, 9);
      await within(
        guest.queues[0].submitChain([
          { address: from, length: bytes.length, isWritable: false },
          { address: page + 100n, length: bytes.length, isWritable: true },
        ]),
        "the request",
      );
      assert.equal(source.filled, 1);
      const expected = pageAt(bases[1] + BigInt(9 * pageSize));
      expected.set(bytes, 100);
      assert.deepEqual(guest.ram.read(page, pageSize), expected);
    }),
);

postcopyTest(
  "postcopy: a disk writes a missing page to its file",
  () =>
    withoutDescriptorLeak(async () => {
      using folder = new TemporaryFolder();
      const path = folder.file("disk");
      writeFileSync(path, new Uint8Array(1 << 16));
      await using disk = blkDevice({ backing: fileBacking(path) });
      await using target = await registerTarget({
        transport: "vhost-user",
        address: folder.file("socket"),
        ...disk,
        postcopy: true,
      });
      const guest = await VhostUserDevice.open({
        ...postcopyOptions,
        path: folder.file("socket"),
      });
      await source.serve(await adviseAndListen(guest));
      try {
        const [, base] = await mapAndStart(guest);
        const out = 1;
        const header = guest.ram.allocate(16);
        guest.ram.write(header, encodeBlkHeader(out, 8n));
        const status = guest.ram.allocate(1);
        guest.ram.write(status, Uint8Array.of(0xff));
        await within(
          guest.queues[0].submitChain([
            { address: header, length: 16, isWritable: false },
            {
              address: dataPage(guest, 5),
              length: pageSize,
              isWritable: false,
            },
            { address: status, length: 1, isWritable: true },
          ]),
          `the write (${target.name})`,
        );
        assert.deepEqual([...guest.ram.read(status, 1)], [0]);
        assert.equal(source.filled, 1);
        assert.deepEqual(
          new Uint8Array(readFileSync(path)).slice(4096, 8192),
          pageAt(base + BigInt(5 * pageSize)),
        );
      } finally {
        guest.connection.close();
        await guest.close();
        await source.stop();
      }
    }),
);

postcopyTest(
  "postcopy: no queue starts before the front-end's ack of the bases",
  () =>
    withPostcopy(
      { errorsExpected: true },
      async (guest, { recording, errors }) => {
        const { connection, ram } = guest;
        const fd = await adviseAndListen(guest);
        core.descriptorClose(fd);
        await connection.setFeatures(guest.features);
        // Everything but the memory: the queue starts as soon as it is mapped.
        await guest.startQueue(0);
        await connection.barrier();
        assert.equal(recording.count("queueStart 0"), 0);
        await connection.mapPostcopy(ram.regions);
        assert.equal(recording.count("queueStart 0"), 0);
        connection.acknowledgePostcopyMap();
        await recording.completed("queueStart 0");
        await assertWorks(guest);
        // A second table stops it until the next ack.
        const again = await connection.mapPostcopy(ram.regions);
        assert.equal(recording.count("queueStop 0"), 1);
        assert.equal(recording.count("queueStart 0"), 1);
        connection.acknowledgePostcopyMap();
        await assertWorks(guest);
        assert.equal(recording.count("queueStart 0"), 2);
        // Regions that were mapped already are where they were.
        const [region] = ram.regions;
        assert.deepEqual(await connection.mapPostcopy([region]), [again[0]]);
        connection.acknowledgePostcopyMap();
        await connection.barrier();
        assert.deepEqual(errors.pending, []);
      },
    ),
);

for (
  const [what, send] of [
    [
      "another message",
      (guest: VhostUserDevice) =>
        void guest.connection.getFeatures().catch(() => {}),
    ],
    ["an ack that is not 0", (guest: VhostUserDevice) =>
      guest.connection.send(
        Request.SET_MEM_TABLE,
        Uint8Array.of(0, 0, 0, 0, 1, 0, 0, 0),
      )],
  ] as const
) {
  postcopyTest(
    `postcopy: ${what} in place of the ack ends the connection`,
    () =>
      withPostcopy({ errorsExpected: true }, async (guest, { errors }) => {
        core.descriptorClose(await adviseAndListen(guest));
        await guest.connection.mapPostcopy(guest.ram.regions);
        send(guest);
        await guest.connection.closed;
        assert.match((await errors.next()).message, /ack of/);
      }),
  );
}

postcopyTest(
  "POSTCOPY_LISTEN is refused before POSTCOPY_ADVISE and after a memory table",
  () =>
    withPostcopy({ errorsExpected: true }, async (guest, { errors }) => {
      const { connection, ram } = guest;
      const refused = async (why: RegExp) => {
        await assert.rejects(
          connection.listenPostcopy({ ack: true }),
          RefusedError,
        );
        assert.match((await errors.next()).message, why);
      };
      await refused(/POSTCOPY_ADVISE has not come/);
      core.descriptorClose(await connection.advisePostcopy());
      await connection.setMemTable(ram.regions, { ack: true });
      await refused(/guest memory was set before/);
      await connection.setMemTable([], { ack: true });
      // An ADVISE that comes again gives another userfaultfd.
      core.descriptorClose(await adviseAndListen(guest));
      await refused(/POSTCOPY_ADVISE has not come/);
      await connection.endPostcopy();
      await connection.setMemTable(ram.regions, { ack: true });
    }),
);

postcopyTest(
  "postcopy: a file that cannot be watched is refused, and nothing of it is mapped",
  () =>
    withPostcopy({ errorsExpected: true }, async (guest, { errors, path }) => {
      core.descriptorClose(await adviseAndListen(guest));
      const disk = `${path}.ram`;
      writeFileSync(disk, new Uint8Array(1 << 20));
      const bytes = new TextEncoder().encode(disk);
      const fd = core.fileOpen(bytes, bytes.length, 1);
      assert.ok(fd >= 0);
      const { description } = guest.ram.regions[0];
      await assert.rejects(
        guest.connection.setMemTable([{ description, fd }], { ack: true }),
        RefusedError,
      );
      core.descriptorClose(fd);
      assert.match((await errors.next()).message, /cannot be watched/);
    }),
);

postcopyTest(
  "PAGEFAULT takes the place of CONFIGURE_MEM_SLOTS, and is there only with postcopy: true",
  async () => {
    await withPostcopy({}, ({ protocolFeatures }) => {
      assert.equal(protocolFeatures & (pagefault | memSlots), pagefault);
      return Promise.resolve();
    });
    await serving(
      { errorsExpected: true },
      (served) =>
        opened(served, postcopyOptions, async (guest) => {
          assert.equal(
            guest.protocolFeatures & (pagefault | memSlots),
            memSlots,
          );
          await assert.rejects(guest.connection.advisePostcopy());
          assert.match((await served.errors.next()).message, /needs PAGEFAULT/);
        }),
    );
  },
);

for (
  const { what, words, postcopyTimeoutMs, killed, message } of [
    {
      what: "dies while this thread waits for its page",
      words: [],
      postcopyTimeoutMs: Infinity,
      killed: "SIGKILL",
      message: null,
    },
    {
      what: "lives, and does not fill the page that this thread waits for,",
      words: ["stays"],
      postcopyTimeoutMs: 1000,
      killed: null,
      message: /did not fill a page .*postcopyTimeoutMs: 1000/,
    },
  ]
) {
  postcopyTest(
    `postcopy: a front-end that ${what} costs its device, and nobody else anything`,
    () =>
      serving(
        { postcopy: true, postcopyTimeoutMs, errorsExpected: true },
        async (served) => {
          await opened(served, {}, async (bystander) => {
            await bystander.activate();
            await bystander.startQueue(0);
            await assertWorks(bystander);
            const child = startProgram(
              "postcopy_frontend",
              [served.path, ...words],
              // What is said of a connection's end is not the test's.
              ["ignore", "inherit", message === null ? "inherit" : "ignore"],
            );
            const ended = new Promise((resolve) => child.once("exit", resolve));
            if (message !== null) {
              assert.match((await served.errors.next()).message, message);
            }
            await served.recording.completed("deviceDestroy");
            await ended;
            assert.equal(child.signalCode, killed);
            await assertWorks(bystander);
          });
        },
      ),
  );
}

/** A program of this folder, in a process of its own. */
function startProgram(
  name: string,
  words: readonly string[],
  stdio: StdioOptions,
): ChildProcess {
  const extension = import.meta.url.slice(import.meta.url.lastIndexOf("."));
  const program = fileURLToPath(
    new URL(`${name}${extension}`, import.meta.url),
  );
  return spawn(
    process.execPath,
    [...(isNode ? [] : ["run", "--allow-all"]), program, ...words],
    { stdio },
  );
}

for (
  const [what, workers, how, wanted] of [
    ["its main thread, which listens for the signal", 0, "listens", 0],
    ["its main thread, which does not", 0, "", "SIGINT"],
    ["its Worker", 1, "listens", 0],
  ] as const
) {
  postcopyTest(
    `postcopy: SIGINT ends a process although its front-end lives and never fills the page for ${what}`,
    async () => {
      using folder = new TemporaryFolder();
      const path = folder.file("socket");
      const child = startProgram(
        "postcopy_backend",
        [path, String(workers), how],
        ["ignore", "pipe", "inherit"],
      );
      const ended = new Promise((resolve) =>
        child.once("exit", (code, signal) => resolve(code ?? signal))
      );
      try {
        await new Promise((resolve) => child.stdout!.once("data", resolve));
        const one = { ...postcopyOptions, queueCount: 1 };
        await opened({ path }, one, async (guest) => {
          const fd = await adviseAndListen(guest);
          const asked = new Events<void>();
          const faults = new PageFaults(fd, () => asked.push());
          try {
            await mapAndStart(guest);
            guest.queues[0].submitChain([
              { address: dataPage(guest, 3), length: 64, isWritable: false },
              { address: guest.ram.allocate(64), length: 64, isWritable: true },
            ]).catch(() => {});
            await asked.next();
            process.kill(child.pid!, "SIGINT");
            assert.equal(await within(ended, "the end of the process"), wanted);
          } finally {
            faults.close();
          }
        });
      } finally {
        child.kill("SIGKILL");
        await ended;
      }
    },
  );
}

test("a postcopyTimeoutMs that is no time is refused", async () => {
  using folder = new TemporaryFolder();
  for (const postcopyTimeoutMs of [0, 999, 1500.5, 2 ** 32, NaN]) {
    await assert.rejects(
      registerTarget({
        transport: "vhost-user",
        address: folder.file("socket"),
        postcopyTimeoutMs,
        device: () => ({}),
      }),
      new RegExp(
        `^Vhost2Error: Cannot use postcopyTimeoutMs: ${postcopyTimeoutMs} \\(a whole number from 1000 to 4294967295, or Infinity\\)$`,
      ),
    );
  }
});

if (reason !== null) {
  test("postcopy: true is refused with the reason where the kernel refuses a userfaultfd", async () => {
    using folder = new TemporaryFolder();
    await assert.rejects(
      registerTarget({
        transport: "vhost-user",
        address: folder.file("socket"),
        device: () => ({}),
        postcopy: true,
      }),
      (error) =>
        error instanceof Vhost2Error && error.code === "SYSTEM" &&
        /Cannot offer postcopy/.test(error.message),
    );
  });
}
