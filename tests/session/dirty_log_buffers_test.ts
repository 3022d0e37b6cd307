// What is logged of the buffers, and when (vhost-user-spec.md section 1.5
// "Log"): with LOG_ALL, all that a request gives the device to write.

import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { DirtyLog } from "../../frontend/mod.ts";
import {
  blkDevice,
  type BlkOptions,
  fileBacking,
  memoryBacking,
  type Request,
  requestOps,
} from "../../mod.ts";
import { pattern } from "../devices/disk_guest.ts";
import { test } from "../harness.ts";
import { blkHeader } from "../hostile/world.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { Events, within } from "../support/wait.ts";
import {
  allocatePages,
  ask,
  assertPages,
  formats,
  type Guest,
  pagesOf,
  ramSize,
  withLogged,
} from "./logged.ts";

const page = 0x1000n;
const end = BigInt(ramSize);

/** A device that holds its requests until the test answers them. */
function holding(options?: Parameters<typeof requestOps>[1]) {
  const held = new Events<{ request: Request; answer: () => void }>();
  const device = () =>
    requestOps(
      (request) =>
        new Promise<number>((resolve) => {
          held.push({ request, answer: () => resolve(0) });
        }),
      options,
    );
  return { held, device };
}

for (const { name, packed } of formats) {
  test(`${name}: LOG_ALL off, nothing is marked; on, each page of a request; off again, nothing`, async () => {
    await withLogged({ packed }, async (guest) => {
      const pages = allocatePages(guest, 3);
      using log = new DirtyLog({ end });
      await guest.connection.setLogBase(log);
      await ask(guest, pages, 3);
      assertPages(log, []);
      const second = await guest.startLog({ rings: false });
      await ask(guest, pages, 3);
      assertPages(second, pagesOf(pages, 3 * 4096));
      await guest.connection.setLogBase(log);
      await ask(guest, pages + page);
      assertPages(log, [pages + page]);
      await guest.stopLog();
      await ask(guest, pages, 3);
      assertPages(log, []);
    });
  });

  test(`${name}: readable parts are not marked, a header and a part of a page are`, async () => {
    await withLogged({ packed }, async (guest) => {
      const log = await guest.startLog({ rings: false });
      const pages = allocatePages(guest, 4);
      await guest.queues[0].submitChain([
        { address: pages, length: 4096, isWritable: false },
        { address: pages + 2n * page - 1n, length: 1, isWritable: true },
        { address: pages + 3n * page + 7n, length: 1, isWritable: true },
      ]);
      assertPages(log, [pages + page, pages + 3n * page]);
    });
  });

  test(`${name}: a request taken before logging began is marked when it completes, in any order`, async () => {
    const { held, device } = holding();
    await withLogged({ packed, device }, async (guest) => {
      const pages = allocatePages(guest, 8);
      const asked = [0n, 1n, 2n, 3n].map((i) =>
        ask(guest, pages + 2n * i * page, 2)
      );
      const open = [];
      for (let i = 0; i < 4; i++) open.push(await held.next());
      const log = await guest.startLog({ rings: false });
      assertPages(log, []);
      for (const i of [2, 0, 3, 1]) {
        open[i].answer();
        await within(asked[i], `request ${i}`);
        assertPages(log, pagesOf(pages + BigInt(2 * i) * page, 2 * 4096));
      }
    });
  });

  test(`${name}: indirect tables of one to many pages are marked`, async () => {
    await withLogged({ packed }, async (guest) => {
      const log = await guest.startLog({ rings: false });
      for (const count of [1, 2, 3, 4, 12, 50]) {
        const pages = allocatePages(guest, count);
        await ask(guest, pages, count, { indirect: true });
        assertPages(log, pagesOf(pages, count * 4096), `${count} pages`);
      }
    });
  });

  test(`${name}: the trailer is marked, in a page of its own too`, async () => {
    const { held, device } = holding({ headerBytes: 16, trailerBytes: 1 });
    await withLogged({ packed, device }, async (guest) => {
      const log = await guest.startLog({ rings: false });
      const pages = allocatePages(guest, 3);
      const asked = guest.queues[0].submitChain([
        { address: pages, length: 16, isWritable: false },
        { address: pages + page, length: 4097, isWritable: true },
      ]);
      const { request, answer } = await held.next();
      assert.equal(request.writableBytes, 4096);
      answer();
      await asked;
      assertPages(log, [pages + page, pages + 2n * page]);
    });
  });

  test(`${name}: after the reply to SET_LOG_BASE the log before does not change, and no page is lost`, async () => {
    const { held, device } = holding();
    await withLogged({ packed, device }, async (guest) => {
      const pages = allocatePages(guest, 8);
      const logs: DirtyLog[] = [];
      await guest.startLog({ rings: false });
      try {
        for (let round = 0; round < 20; round++) {
          const asked = Array.from(
            { length: 8 },
            (_, i) => ask(guest, pages + BigInt(i) * page),
          );
          const open = [];
          for (let i = 0; i < 8; i++) open.push(await held.next());
          const log = new DirtyLog({ end, offset: 4096 * (round % 3) });
          logs.push(log);
          const replied = guest.connection.setLogBase(log);
          // Some before it, some while it is under way.
          for (const { answer } of open.slice(0, 4)) answer();
          await replied;
          const before = logs.at(-2);
          before?.take();
          for (const { answer } of open.slice(4)) answer();
          await within(Promise.all(asked), `round ${round}`);
          for (let i = 4; i < 8; i++) {
            assert.ok(log.isDirty(pages + BigInt(i) * page));
          }
          for (const old of logs.slice(0, -1)) assertPages(old, []);
        }
      } finally {
        for (const log of logs) log.close();
      }
    });
  });

  test(`${name}: several queues mark in one log, and regions at any address`, async () => {
    const regions = [
      { size: 1 << 20 },
      { size: 1 << 20, gpa: 0x4000_0000n },
    ];
    const guest = { regions, ramSize: undefined, queueCount: 3 };
    await withLogged({ packed, queueCount: 3, guest }, async (guest) => {
      const log = await guest.startLog({ rings: false });
      const [low, high] = guest.ram.regions;
      const pages = [low, high].map((region) =>
        guest.ram.allocate(3 * 4096, 4096, region)
      );
      await Promise.all(
        [0, 1, 2].flatMap((queue) =>
          pages.map((first) =>
            ask(guest, first + BigInt(queue) * page, 1, { queue })
          )
        ),
      );
      assertPages(log, pages.flatMap((first) => pagesOf(first, 3 * 4096)));
    });
  });
}

/** Reads a disk's first bytes into pages of their own. */
async function readDisk(
  guest: Guest,
  options: { indirect: boolean },
): Promise<{ data: bigint; status: bigint }> {
  const [header, data, status] = [1, 4, 1].map((n) => allocatePages(guest, n));
  guest.ram.write(header, blkHeader(0));
  const buffers = [
    { address: header, length: 16, isWritable: false },
    { address: data, length: 4 * 4096, isWritable: true },
    { address: status + 5n, length: 1, isWritable: true },
  ];
  const written = await guest.queues[0].submitChain(buffers, options);
  assert.equal(written, 4 * 4096 + 1);
  return { data, status };
}

const content = pattern(64 << 10);

for (
  const [what, backing] of [
    ["memory", () => memoryBacking(content.length)],
    ["a file, whose data the kernel writes", (folder) => {
      const path = join(folder, "disk.img");
      writeFileSync(path, content);
      return fileBacking(path);
    }],
    ["an object", () => ({
      size: content.length,
      read: (offset, into) =>
        void into.set(content.subarray(offset, offset + into.length)),
      write: () => {},
    })],
  ] satisfies [string, (folder: string) => BlkOptions["backing"]][]
) {
  test(`a disk in ${what}: data and status are marked`, async () => {
    using folder = new TemporaryFolder();
    await using disk = blkDevice({ backing: backing(folder.path) });
    for (const { packed } of formats) {
      for (const indirect of [false, true]) {
        await withLogged({ ...disk, packed }, async (guest) => {
          const log = await guest.startLog({ rings: false });
          const { data, status } = await readDisk(guest, { indirect });
          assertPages(log, [...pagesOf(data, 4 * 4096), status]);
          const expected = what === "memory"
            ? new Uint8Array(4 * 4096)
            : content.slice(0, 4 * 4096);
          assert.deepEqual(guest.ram.read(data, 4 * 4096), expected);
        });
      }
    }
  });
}

test("what a queue that stops completes is marked before the reply", async () => {
  const { held, device } = holding();
  await withLogged({ device }, async (guest) => {
    const log = await guest.startLog({ rings: false });
    const pages = allocatePages(guest, 1);
    const asked = ask(guest, pages);
    const { answer } = await held.next();
    const stopped = guest.stopQueue(0);
    answer();
    await stopped;
    assertPages(log, [pages]);
    await asked;
  });
});
