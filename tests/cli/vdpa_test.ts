// `vhost2 vdpa` as a user sees it; tests/qemu/vdpa_test.ts has a device for it.
import assert from "node:assert/strict";
import { parseCommand } from "../../cli/arguments.ts";
import { test } from "../harness.ts";
import { run } from "./command.ts";
import { type Mistake, testMistakes } from "./mistakes.ts";

test("vdpa --help names every option", async () => {
  const { code, stdout } = await run("vdpa", "--help");
  assert.equal(code, 0);
  for (
    const option of [
      ...["socket-path", "fd", "connect", "num-queues", "packed"],
      ...["verbose", "help", "version"],
    ]
  ) assert.match(stdout, new RegExp(`--${option}\\b`));
});

test("vdpa: what is typed is understood", () => {
  const words = [
    ...["vdpa", "00:06.0", "--socket-path", "/tmp/s", "--connect"],
    ...["--packed", "--num-queues", "3", "-v"],
  ];
  assert.deepEqual(parseCommand(words), {
    name: "vdpa",
    arguments: {
      device: "00:06.0",
      place: { kind: "socket", address: "/tmp/s", isConnecting: true },
      hasPacked: true,
      numQueues: 3,
      isVerbose: true,
    },
  });
  assert.deepEqual(parseCommand(["vdpa", "00:06.0", "--fd", "7"]), {
    name: "vdpa",
    arguments: {
      device: "00:06.0",
      place: { kind: "socket", address: { fd: 7 }, isConnecting: false },
      hasPacked: false,
      numQueues: undefined,
      isVerbose: false,
    },
  });
});

const socket = ["--socket-path", "FOLDER/s"];
const mistakes: readonly Mistake[] = [
  ["no device", socket, 2, /vdpa takes the address of one PCI device/],
  ["two devices", ["a", "b", ...socket], 2, /the address of one PCI device/],
  ["no socket", ["00:06.0"], 2, /a socket is needed/],
  [
    "too many queues",
    ["00:06.0", ...socket, "--num-queues", "257"],
    2,
    /--num-queues takes a number from 1 to 256, not "257"/,
  ],
  ["no address", ["x", ...socket], 1, /Cannot use PCI address: x /],
  [
    "a device that is not there",
    ["ffff:ff:1f.7", ...socket],
    1,
    /Cannot open PCI device ffff:ff:1f\.7: there is no such device/,
  ],
];

testMistakes(mistakes, "vdpa");
