// `vhost2 blk --workers`: how it ends, and what it costs while nothing happens.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { DiskGuest, OK, TemporaryFolder } from "../devices/disk_guest.ts";
import { test } from "../harness.ts";
import { eventually } from "../support/wait.ts";
import { Command, run } from "./command.ts";

function start(folder: TemporaryFolder, ...more: string[]): Command {
  return new Command([
    "blk",
    ...["--socket-path", folder.file("disk.sock"), "--memory", "8M"],
    ...["--num-queues", "4", ...more],
  ]);
}

/** Ends it and requires that this took no longer than a second. */
async function endsInTime(
  command: Command,
  signal: "SIGINT" | "SIGTERM",
): Promise<void> {
  const begin = performance.now();
  command.signal(signal);
  assert.equal(await command.ended, 0, command.stderr);
  const took = performance.now() - begin;
  // With room for a machine that has other things to do.
  assert.ok(took < 5000, `${took.toFixed(0)} ms`);
  assert.equal(command.stderr, "");
}

for (const signal of ["SIGINT", "SIGTERM"] as const) {
  test(`${signal} ends idle Workers, that no queue was ever in`, async () => {
    using folder = new TemporaryFolder();
    await using command = start(folder, "--workers", "2");
    await command.printed(/listening/);
    await endsInTime(command, signal);
  });

  test(`${signal} ends Workers that sleep in the core`, async () => {
    using folder = new TemporaryFolder();
    await using command = start(folder, "--workers", "2", "--poll-us", "0");
    await command.printed(/listening/);
    const guest = await DiskGuest.connect(folder.file("disk.sock"), {
      queueCount: 4,
    });
    for (let queue = 0; queue < 4; queue++) {
      const answer = await guest.request(0, 0, { size: 512, queue });
      assert.equal(answer.status, OK);
    }
    await endsInTime(command, signal);
    await guest.close();
  });

  test(`${signal} ends Workers that are busy`, async () => {
    using folder = new TemporaryFolder();
    await using command = start(folder, "--workers", "2", "--poll-us", "1000");
    await command.printed(/listening/);
    const guest = await DiskGuest.connect(folder.file("disk.sock"), {
      queueCount: 4,
    });
    // The next request as soon as one is answered, until there is nobody.
    let answered = 0;
    const pumps = Array.from({ length: 32 }, async (_, i) => {
      for (;;) {
        await guest.request(0, 0, { size: 4096, queue: i % 4 });
        answered++;
      }
    });
    for (const pump of pumps) pump.catch(() => {});
    await eventually(() => answered > 1000, "a thousand answers");
    await endsInTime(command, signal);
    await guest.close();
  });
}

/** Clock ticks (10 ms) that a process has used. */
function ticks(pid: number): number {
  const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
  const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  return Number(fields[11]) + Number(fields[12]);
}

test("Workers with nothing to do use no processor", async () => {
  using folder = new TemporaryFolder();
  await using command = start(folder, "--workers", "2", "--poll-us", "1000");
  await command.printed(/listening/);
  const guest = await DiskGuest.connect(folder.file("disk.sock"), {
    queueCount: 4,
  });
  for (let queue = 0; queue < 4; queue++) {
    await guest.request(0, 0, { size: 512, queue });
  }
  // What V8 compiles in the background comes to its end.
  await new Promise((resolve) => setTimeout(resolve, 1500));
  const before = ticks(command.child.pid!);
  await new Promise((resolve) => setTimeout(resolve, 2000));
  const used = ticks(command.child.pid!) - before;
  assert.ok(used <= 10, `${used * 10} ms of 2 s`);
  await guest.request(0, 0, { size: 512 });
  await guest.close();
});

test("--workers and --poll-us take numbers", async () => {
  for (const option of ["--workers", "--poll-us"]) {
    const { code, stderr } = await run(
      ...["blk", "--null", "1M", "--socket-path", "/nowhere", option, "some"],
    );
    assert.equal(code, 2);
    assert.match(stderr, new RegExp(`${option} takes a number`));
  }
});
