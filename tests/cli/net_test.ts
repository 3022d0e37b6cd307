// `vhost2 net` as a user and as a management program see it.
import assert from "node:assert/strict";
import { existsSync, readFileSync } from "node:fs";
import { core } from "../../ffi/core.ts";
import { NetClient } from "../../frontend/mod.ts";
import { frameOf, swapped } from "../devices/net_guest.ts";
import { test } from "../harness.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { Command, run } from "./command.ts";
import { type Mistake, testMistakes } from "./mistakes.ts";

test("net --print-capabilities prints what the specification asks for", async () => {
  const { code, stdout, stderr } = await run("net", "--print-capabilities");
  assert.deepEqual([code, stderr], [0, ""]);
  assert.deepEqual(JSON.parse(stdout), { type: "net" });
});

test("net --help names every option", async () => {
  const { code, stdout } = await run("net", "--help");
  assert.equal(code, 0);
  for (
    const option of [
      ...["socket-path", "fd", "connect", "tap", "switch", "echo", "discard"],
      ...["pcap", "num-queues", "mac", "mtu", "workers", "poll-us", "verbose"],
      ...["help", "version", "print-capabilities", "vduse", "no-attach"],
      ...["stay"],
    ]
  ) assert.match(stdout, new RegExp(`--${option}\\b`));
});

const socket = ["--socket-path", "FOLDER/s"];
const mistakes: readonly Mistake[] = [
  [
    "more queues than the kernel takes",
    ["--vduse", "a", "--echo", "--num-queues", "2"],
    2,
    /--num-queues 2 is too much for --vduse/,
  ],
  ["no end", socket, 2, /a card needs --tap NAME, --switch NAME, --echo or/],
  ["no socket", ["--echo"], 2, /a socket is needed/],
  [
    "two ends",
    [...socket, "--echo", "--tap", "x"],
    2,
    /--tap and --echo exclude each other/,
  ],
  [
    "two sockets without a switch",
    [...socket, ...socket, "--echo"],
    2,
    /only a --switch takes more than one --socket-path/,
  ],
  [
    "too many queues",
    [...socket, "--echo", "--num-queues", "128"],
    2,
    /--num-queues takes a number from 1 to 127, not "128"/,
  ],
  [
    "a switch in Workers",
    [...socket, "--switch", "lan", "--workers", "1"],
    2,
    /a --switch is in one thread: it takes no --workers/,
  ],
  [
    "a small MTU",
    [...socket, "--echo", "--mtu", "67"],
    2,
    /--mtu takes a number from 68 to 65535, not "67"/,
  ],
  [
    "a group's address",
    [...socket, "--echo", "--mac", "01:00:5e:00:00:01"],
    1,
    /Cannot use mac: "01:00:5e:00:00:01"/,
  ],
  [
    "a long name",
    [...socket, "--tap", "x".repeat(16)],
    1,
    /Cannot open TAP interface "x+": /,
  ],
  [
    "a capture in a folder that is not there",
    [...socket, "--echo", "--pcap", "FOLDER/none/x"],
    1,
    /Cannot write .*none\/x: ENOENT/,
  ],
];

testMistakes(mistakes, "net");

for (const workers of [0, 2]) {
  test(
    `net --echo --pcap --workers ${workers} serves, captures, and ends cleanly by a signal`,
    () => servesEcho(workers),
  );
}

async function servesEcho(workers: number): Promise<void> {
  using folder = new TemporaryFolder();
  const path = folder.file("net.sock");
  const pcap = folder.file("x.pcap");
  await using command = new Command([
    ...["net", "--socket-path", path, "--echo", "--pcap", pcap],
    ...["--num-queues", "2", "--mac", "52:54:00:12:34:56", "--mtu", "4000"],
    ...["--poll-us", "0", "--workers", String(workers)],
  ]);
  await command.printed(/\n/);
  assert.equal(
    command.stdout,
    `vhost2: listening on ${path} (echo, 2 queue pairs)\n`,
  );
  const card = await NetClient.open({ path, pairCount: 2 });
  assert.equal(card.config.mac, "52:54:00:12:34:56");
  assert.equal(card.config.mtu, 4000);
  await card.send(frameOf(100), { pair: 1 });
  assert.deepEqual((await card.receive()).bytes, swapped(frameOf(100)));
  command.signal("SIGTERM");
  assert.equal(await command.ended, 0);
  await card.close();
  assert.equal(command.stderr, "");
  assert.ok(!existsSync(path));
  assert.equal(readFileSync(pcap).length, 24 + 2 * (16 + 100));
}

for (const workers of ["0", "1"]) {
  test(`net --workers ${workers}: an inherited connection is served, and its end ends the command`, async () => {
    const ends = new Int32Array(2);
    assert.equal(core.socketPair(ends), 0);
    await using command = new Command(
      ["net", "--fd", "3", "--echo", "--workers", workers],
      [ends[1]],
    );
    core.descriptorClose(ends[1]);
    const card = await NetClient.open({ fd: ends[0] });
    await card.send(frameOf(60));
    assert.deepEqual((await card.receive()).bytes, swapped(frameOf(60)));
    await card.close();
    assert.equal(await command.ended, 0);
    assert.deepEqual(
      [command.stdout, command.stderr],
      ["vhost2: serving fd 3 (echo, 1 queue pair)\n", ""],
    );
  });
}

test("net: an inherited connection that has ended already ends the command", async () => {
  const ends = new Int32Array(2);
  assert.equal(core.socketPair(ends), 0);
  core.descriptorClose(ends[0]);
  await using command = new Command(["net", "--fd", "3", "--echo"], [ends[1]]);
  core.descriptorClose(ends[1]);
  assert.equal(await command.ended, 0);
  assert.equal(command.stderr, "");
});

test("net --switch connects the guests of all its sockets", async () => {
  using folder = new TemporaryFolder();
  const [a, b] = [folder.file("a"), folder.file("b")];
  await using command = new Command([
    ...["net", "--switch", "lan", "--socket-path", a, "--socket-path", b],
  ]);
  await command.printed(/listening on .*a, listening on .*b \(switch lan, 1/);
  const one = await NetClient.open({ path: a });
  const two = await NetClient.open({ path: a, packed: true });
  const three = await NetClient.open({ path: b });
  await one.send(frameOf(60));
  for (const card of [two, three]) {
    assert.deepEqual((await card.receive()).bytes, frameOf(60));
  }
  for (const card of [one, two, three]) await card.close();
  command.signal("SIGINT");
  assert.equal(await command.ended, 0);
});
