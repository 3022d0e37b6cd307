// The engine for file I/O under its clients, without a device.
import assert from "node:assert/strict";
import {
  closeSync,
  openSync,
  readFileSync,
  readSync,
  writeFileSync,
} from "node:fs";
import { core } from "../../ffi/core.ts";
import {
  type FileClient,
  FileEngine,
  FileFlag,
  FileOperation,
} from "../../ffi/file_engine.ts";
import { GuestMemory } from "../../ffi/guest_memory.ts";
import { GuestRam } from "../../driver/guest_ram.ts";
import { constants } from "../../ffi/abi.gen.ts";
import { eventLoop } from "../../ffi/event_loop.ts";
import { test } from "../harness.ts";
import { assertBytes, pattern, TemporaryFolder } from "./disk_guest.ts";

/** Collects results and tells when a number of them is there. */
class Results implements FileClient {
  readonly alignment = 1;
  readonly byCookie = new Map<number, number>();
  #tell = () => {};

  finished(cookie: number, result: number): void {
    assert.ok(!this.byCookie.has(cookie), `${cookie} finished twice`);
    this.byCookie.set(cookie, result);
    this.#tell();
  }

  async wait(count: number): Promise<void> {
    while (this.byCookie.size < count) {
      await new Promise<void>((resolve) => this.#tell = resolve);
    }
  }
}

function openFile(path: string): number {
  const bytes = new TextEncoder().encode(path);
  const fd = core.fileOpen(bytes, bytes.length, 1);
  assert.ok(fd >= 0);
  return fd;
}

const ways = [
  { kind: "its first choice", useThreads: false, flags: 0 },
  { kind: "threads", useThreads: true, flags: 0 },
  { kind: "prompt writes", useThreads: false, flags: FileFlag.prompt },
];
for (const { kind, useThreads, flags } of ways) {
  test(`with ${kind}, 2000 requests at once are more than fit and all are done`, async () => {
    using folder = new TemporaryFolder();
    const path = folder.file("disk");
    const count = 2000;
    const content = pattern(count * 512);
    writeFileSync(path, new Uint8Array(content.length));
    const file = openFile(path);
    using ram = new GuestRam([{ size: content.length }]);
    const memory = new GuestMemory();
    eventLoop.ref();
    const engine = FileEngine.acquire(useThreads);
    try {
      if (useThreads) assert.equal(engine.kind, "threads");
      const [region] = ram.regions;
      const { gpa, uva, size } = region;
      memory.prepare("replace", [
        {
          gpa,
          uva,
          size: BigInt(size),
          mmapOffset: 0n,
          source: { fd: region.fd },
        },
      ]);
      memory.commit();
      ram.write(gpa, content);
      const { view } = memory.translate("gpa", gpa, 1)!;
      // The same words for each batch, as a device has them.
      const batch = 64;
      const segments = new Uint32Array(batch * 4);
      const results = new Results();
      for (let first = 0; first < count; first += batch) {
        const end = Math.min(count, first + batch);
        for (let i = first; i < end; i++) {
          const access = constants.accessRead;
          segments.set([view, i * 512, 512, access], (i - first) * 4);
          engine.stage(
            results,
            i,
            FileOperation.write,
            file,
            i * 512,
            0,
            flags,
            memory.handle,
            segments,
            i - first,
            1,
          );
        }
        engine.submit();
        segments.fill(0xffffffff);
      }
      await results.wait(count);
      for (const [cookie, result] of results.byCookie) {
        assert.equal(result, 0, `${cookie}`);
      }
      assert.equal(engine.inFlight, 0);
      assertBytes(new Uint8Array(readFileSync(path)), content);
    } finally {
      engine.release();
      memory.close();
      core.descriptorClose(file);
      eventLoop.unref();
    }
  });
}

test("an offset above 4 GiB reaches the file as it is", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("disk");
  // Here it would arrive without its upper half.
  writeFileSync(path, pattern(8192));
  const file = openFile(path);
  const size = 2 ** 33;
  assert.equal(core.memfdResize(file, size), 0);
  const openedForReading = openSync(path, "r");
  eventLoop.ref();
  const engine = FileEngine.acquire();
  try {
    const results = new Results();
    const { discard, writeZeroes } = FileOperation;
    const none = new Uint32Array(0);
    const at = 2 ** 32 + 4096;
    engine.stage(
      results,
      1,
      discard,
      file,
      at,
      2 ** 32 - 4096,
      0,
      0,
      none,
      0,
      0,
    );
    const flags = FileFlag.unmap | FileFlag.dsync;
    engine.stage(results, 2, writeZeroes, file, at, 4096, flags, 0, none, 0, 0);
    engine.submit();
    await results.wait(2);
    assert.deepEqual([...results.byCookie.values()], [0, 0]);
    assert.equal(core.fileSize(file), size);
    const start = new Uint8Array(8192);
    assert.equal(readSync(openedForReading, start), start.length);
    assertBytes(start, pattern(8192));
  } finally {
    engine.release();
    closeSync(openedForReading);
    core.descriptorClose(file);
    eventLoop.unref();
  }
});

test("a client that submits while it is told of an end is told of that one's too", () => {
  eventLoop.ref();
  const engine = FileEngine.acquire();
  try {
    const told: number[] = [];
    // Nothing to discard: such a request ends in its submission, unsignalled.
    const client: FileClient = {
      alignment: 1,
      finished(cookie) {
        told.push(cookie);
        if (cookie < 3) discardNothing(cookie + 1);
      },
    };
    const none = new Uint32Array(0);
    const discardNothing = (cookie: number): void => {
      const { discard } = FileOperation;
      engine.stage(client, cookie, discard, 0, 0, 0, 0, 0, none, 0, 0);
      engine.submit();
    };
    discardNothing(1);
    assert.deepEqual(told, [1, 2, 3]);
  } finally {
    engine.release();
    eventLoop.unref();
  }
});
