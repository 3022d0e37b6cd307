// `vhost2 blk` as a user and as a management program see it.
import assert from "node:assert/strict";
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { version } from "../../cli/version.ts";
import { core } from "../../ffi/core.ts";
import { FrontendConnection } from "../../frontend/connection.ts";
import {
  assertBytes,
  DiskGuest,
  OK,
  pattern,
  TemporaryFolder,
} from "../devices/disk_guest.ts";
import { test } from "../harness.ts";
import { Command, run } from "./command.ts";
import { type Mistake, testMistakes } from "./mistakes.ts";

test("--print-capabilities prints what the specification asks for, and nothing else", async () => {
  const { code, stdout, stderr } = await run("blk", "--print-capabilities");
  assert.deepEqual([code, stderr], [0, ""]);
  assert.deepEqual(JSON.parse(stdout), {
    type: "block",
    features: ["read-only", "blk-file"],
  });
});

test("--version is that of deno.json, --help names every option", async () => {
  const config = new URL("../../deno.json", import.meta.url);
  assert.equal(JSON.parse(readFileSync(config, "utf8")).version, version);
  assert.equal((await run("--version")).stdout, `vhost2 ${version}\n`);
  const { code, stdout } = await run("blk", "--help");
  assert.equal(code, 0);
  for (
    const option of [
      ...["socket-path", "fd", "print-capabilities", "blk-file", "memory"],
      ...["null", "read-only", "num-queues", "serial", "logical-block-size"],
      ...["direct", "workers", "poll-us"],
      ...[
        "verbose",
        "help",
        "version",
        "connect",
        "vduse",
        "no-attach",
        "stay",
      ],
    ]
  ) assert.match(stdout, new RegExp(`--${option}\\b`));
});

const mistakes: readonly Mistake[] = [
  ["an unknown option", ["blk", "--bogus"], 2, /Unknown option '--bogus'/],
  ["an unknown command", ["disk"], 2, /there is no command "disk"/],
  ["bind without an address", ["bind"], 2, /address of one PCI device/],
  ["bind of no address", ["bind", "x"], 1, /Cannot use PCI address: x/],
  ["bind of no device", ["bind", "ffff:ff:1f.7"], 1, /no such device/],
  ["no disk", ["blk", "--socket-path", "FOLDER/s"], 2, /needs --blk-file/],
  ["no socket", ["blk", "--memory", "1M"], 2, /a socket is needed/],
  [
    "a socket and the kernel",
    ["blk", "--memory", "1M", "--vduse", "a", "--socket-path", "s"],
    2,
    /--vduse excludes --socket-path, --fd and --connect/,
  ],
  [
    "an attachment of nothing",
    ["blk", "--memory", "1M", "--socket-path", "s", "--no-attach"],
    2,
    /--no-attach and --stay need --vduse/,
  ],
  [
    "postcopy without a virtual machine",
    ["blk", "--memory", "1M", "--vduse", "a", "--postcopy"],
    2,
    /--postcopy is of virtual machines on a socket/,
  ],
  [
    "a device name that is none",
    ["blk", "--memory", "1M", "--vduse", "../a"],
    1,
    /Cannot use as the name of a VDUSE device: \.\.\/a/,
  ],
  [
    "no file to use directly",
    ["blk", "--socket-path", "FOLDER/s", "--memory", "1M", "--direct"],
    2,
    /--direct needs --blk-file/,
  ],
  [
    "two disks",
    ["blk", "--socket-path", "FOLDER/s", "--memory", "1M", "--null", "1M"],
    2,
    /--memory and --null exclude each other/,
  ],
  [
    "no size",
    ["blk", "--socket-path", "FOLDER/s", "--memory", "big"],
    2,
    /--memory takes a size such as 512M or 2G, not "big"/,
  ],
  [
    "too many queues",
    ["blk", "--socket-path", "FOLDER/s", "--null", "1M", "--num-queues", "257"],
    2,
    /--num-queues takes a number from 1 to 256, not "257"/,
  ],
  [
    "a strange block size",
    [
      "blk",
      "--socket-path",
      "FOLDER/s",
      "--null",
      "1M",
      "--logical-block-size",
      "1024",
    ],
    2,
    /--logical-block-size is 512 or 4096, not "1024"/,
  ],
  [
    "a missing file",
    ["blk", "--socket-path", "FOLDER/s", "--blk-file", "FOLDER/none"],
    1,
    /Cannot open .*\/none: there is no such file/,
  ],
  [
    "a folder for a file",
    ["blk", "--socket-path", "FOLDER/s", "--blk-file", "FOLDER"],
    1,
    /Cannot open .*: it is a directory/,
  ],
  [
    "a size of no whole blocks",
    ["blk", "--socket-path", "FOLDER/s", "--memory", "1000"],
    1,
    /a disk of 1000 bytes: the size must be a multiple of the logical block of 512/,
  ],
  [
    "a long serial",
    [
      "blk",
      "--socket-path",
      "FOLDER/s",
      "--null",
      "1M",
      "--serial",
      "x".repeat(21),
    ],
    1,
    /Cannot use serial: "x+" \(21 bytes, at most 20\)/,
  ],
  [
    "a socket in a folder that is not there",
    ["blk", "--socket-path", "FOLDER/none/s", "--null", "1M"],
    1,
    /Cannot listen on .*\/none\/s/,
  ],
  [
    "a descriptor that is no socket",
    ["blk", "--fd", "0", "--null", "1M"],
    1,
    /Cannot use --fd 0: it is not a socket/,
  ],
];

testMistakes(mistakes);

test("a socket in use is one sentence, and its user keeps it", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("disk.sock");
  const words = ["blk", "--socket-path", path, "--null", "1M"];
  await using first = new Command(words);
  await first.printed(/listening/);
  const { code, stderr } = await run(...words);
  assert.equal(code, 1);
  assert.match(stderr, /^vhost2: Cannot listen on .*another process[^\n]*\n$/);
  (await FrontendConnection.connect(path)).close();
});

for (const signal of ["SIGTERM", "SIGINT"] as const) {
  test(`${signal} stops it cleanly, with a guest at work: exit code 0, no socket file`, async () => {
    using folder = new TemporaryFolder();
    const path = folder.file("disk.sock");
    await using command = new Command([
      ...["blk", "--socket-path", path, "--memory", "64M", "--serial", "abc"],
    ]);
    await command.printed(/\n/);
    assert.equal(
      command.stdout,
      `vhost2: listening on ${path} (64 MiB, memory, 1 queue)\n`,
    );
    await using guest = await DiskGuest.connect(path);
    assert.equal((await guest.write(0, pattern(4096))).status, OK);
    assertBytes((await guest.read(0, 4096)).data, pattern(4096));
    command.signal(signal);
    assert.equal(await command.ended, 0);
    assert.equal(command.stderr, "");
    assert.ok(!existsSync(path));
  });
}

test("a file disk with all options serves, read-only, and shows each message", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("disk.sock");
  const image = folder.file("image");
  writeFileSync(image, pattern(64 << 10));
  await using command = new Command([
    ...["blk", "--socket-path", path, "--blk-file", image, "--read-only"],
    ...["--num-queues", "2", "--logical-block-size", "4096", "--verbose"],
  ]);
  await command.printed(/listening on .* \(64 KiB, .*image, 2 queues\)\n/);
  await using guest = await DiskGuest.connect(path, { queueCount: 2 });
  const config = await guest.config();
  assert.equal(config.getUint32(20, true), 4096);
  assert.equal(config.getUint16(34, true), 2);
  const data = pattern(64 << 10);
  assertBytes((await guest.read(8, 4096)).data, data.slice(4096, 8192));
  assert.notEqual((await guest.write(0, pattern(4096))).status, OK);
  await command.printed(/SET_MEM_TABLE[^\n]*\n/);
  command.signal("SIGTERM");
  assert.equal(await command.ended, 0);
  assertBytes(new Uint8Array(readFileSync(image)), data);
});

test("an inherited connection is served, and its end ends the command", async () => {
  const ends = new Int32Array(2);
  assert.equal(core.socketPair(ends), 0);
  const connection = FrontendConnection.fromFd(ends[0]);
  await using command = new Command(
    ["blk", "--fd", "3", "--null", "1G"],
    [ends[1]],
  );
  core.descriptorClose(ends[1]);
  await command.printed(/serving fd 3 \(1 GiB, null, 1 queue\)/);
  assert.ok(await connection.getFeatures() > 0n);
  connection.close();
  assert.equal(await command.ended, 0);
  await connection.closed;
});

test("an inherited listening socket is served until a signal", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("disk.sock");
  const bytes = new TextEncoder().encode(path);
  const listener = core.socketListen(bytes, bytes.length, 0);
  assert.ok(listener >= 0);
  await using command = new Command(
    ["blk", "--fd", "3", "--null", "1M"],
    [listener],
  );
  core.descriptorClose(listener);
  await command.printed(/listening on fd 3/);
  {
    await using guest = await DiskGuest.connect(path);
    assert.equal((await guest.read(0, 512)).status, OK);
  }
  await using guest = await DiskGuest.connect(path);
  assert.equal((await guest.read(0, 512)).status, OK);
  command.signal("SIGTERM");
  assert.equal(await command.ended, 0);
});

test("--connect finds a front-end that listens", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("frontend.sock");
  const server = createServer();
  const connected = new Promise<void>((resolve) => {
    server.on("connection", (socket) => {
      // GET_FEATURES.
      socket.write(new Uint8Array([1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]));
      socket.once("data", () => {
        socket.destroy();
        resolve();
      });
    });
  });
  await new Promise<void>((resolve) => server.listen(path, resolve));
  await using command = new Command([
    ...["blk", "--connect", "--socket-path", path, "--null", "1M"],
  ]);
  await command.printed(/connecting to /);
  await connected;
  const closed = new Promise((resolve) => server.close(resolve));
  command.signal("SIGTERM");
  assert.equal(await command.ended, 0);
  await closed;
});

test("a folder cannot be removed by a command that only listens there", async () => {
  using folder = new TemporaryFolder();
  mkdirSync(folder.file("sub"));
  const path = folder.file("sub");
  const { code, stderr } = await run(
    ...["blk", "--socket-path", path, "--null", "1M"],
  );
  assert.equal(code, 1);
  assert.match(stderr, /a file that is not a socket is there/);
  assert.ok(existsSync(path));
});

const noVduse = "blk --vduse says in one sentence what the kernel lacks";
if (existsSync("/dev/vduse/control")) {
  test.skip(noVduse, "this kernel has VDUSE; one without it would run it");
} else {
  test(noVduse, async () => {
    const words = ["blk", "--memory", "1M", "--vduse", "vhost2-test"];
    const { code, stdout, stderr } = await run(...words);
    assert.deepEqual([code, stdout], [1, ""]);
    assert.match(
      stderr,
      /^vhost2: Cannot create VDUSE device vhost2-test: .*run "modprobe vduse" .*\n$/,
    );
  });
}
