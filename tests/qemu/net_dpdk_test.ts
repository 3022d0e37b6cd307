// DPDK's virtio_user, a front-end and driver that is not ours, on our network
// card. What its testpmd sends comes back and goes round.
import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { tmpdir } from "node:os";
import { type Net, netDevice, registerTarget } from "../../mod.ts";
import { test } from "../harness.ts";
import { testpmdMissing, testpmdProgram } from "../support/testpmd.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { eventually, within } from "../support/wait.ts";
import { checkedEchoEnd, frameBytes } from "./checked_echo.ts";

const missing = testpmdProgram === null ? testpmdMissing : null;
/** Frames that must come round. */
const enough = 5000;

/** testpmd with one virtio_user port, driven by its prompt. */
class Testpmd {
  readonly #child: ChildProcess;
  readonly #ended: Promise<number | string | null>;
  output = "";

  constructor(vdev: string, queues: number) {
    // It does not flush what it prints into a pipe.
    this.#child = spawn("stdbuf", [
      ...["-oL", testpmdProgram!],
      // No huge pages, no cards; two lcores that share a processor.
      ...["--no-huge", "--no-pci", "-m", "256", "--single-file-segments"],
      ...["--lcores", "0@0,1@0", "--file-prefix", crypto.randomUUID()],
      ...["--vdev", vdev, "--", "-i", "--total-num-mbufs=4096"],
      ...[`--rxq=${queues}`, `--txq=${queues}`],
    ], { stdio: "pipe", cwd: tmpdir() });
    for (const stream of [this.#child.stdout!, this.#child.stderr!]) {
      stream.setEncoding("utf8").on("data", (text) => this.output += text);
    }
    this.#child.stdin!.on("error", () => {});
    this.#ended = new Promise((resolve) => {
      this.#child.on("close", (code, signal) => resolve(code ?? signal));
    });
  }

  /**
   * It need not have asked: what is typed waits for it. (Its prompt is not to
   * be waited for: other messages of its cut it in two.)
   */
  type(line: string): void {
    this.#child.stdin!.write(`${line}\n`);
  }

  async printed(pattern: RegExp): Promise<void> {
    await eventually(
      () => pattern.test(this.output),
      () => `testpmd prints ${pattern}: ${this.output.slice(-2000)}`,
    );
  }

  /** Fulfilled with its exit code, or the signal that ended it. */
  async quit(): Promise<number | string | null> {
    this.type("quit");
    return await within(this.#ended, "testpmd ends");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#child.kill("SIGKILL");
    await this.#ended;
  }
}

/** Starts the frames, awaits that enough have come round, and stops them. */
async function circulate(testpmd: Testpmd, nic: Net): Promise<void> {
  const done = nic.statistics.snapshot().toGuest.packets + enough;
  testpmd.type(`set txpkts ${frameBytes}`);
  testpmd.type("start tx_first 2");
  await eventually(
    () => nic.statistics.snapshot().toGuest.packets >= done,
    () =>
      `enough frames came round: ${JSON.stringify(nic.statistics.snapshot())} ${
        testpmd.output.slice(-1000)
      }`,
  );
  testpmd.output = "";
  testpmd.type("stop");
  await testpmd.printed(/Done\./);
}

interface FrontendCase {
  readonly name: string;
  /** Arguments of virtio_user's. */
  readonly options: string;
  /** Queue pairs; 1 unless given. */
  readonly queues?: number;
}

const frontends: FrontendCase[] = [
  { name: "split rings, mergeable", options: ",in_order=0" },
  { name: "split rings, not mergeable", options: ",in_order=0,mrg_rxbuf=0" },
  { name: "split rings, in order", options: ",in_order=1" },
  {
    name: "split rings, in order, not mergeable",
    options: ",in_order=1,mrg_rxbuf=0",
  },
  {
    name: "split rings, vectorised",
    options: ",in_order=1,mrg_rxbuf=0,vectorized=1",
  },
  {
    name: "split rings, vectorised, out of order",
    options: ",in_order=0,mrg_rxbuf=0,vectorized=1",
  },
  { name: "split rings, two queue pairs", options: "", queues: 2 },
  { name: "packed rings, mergeable", options: ",packed_vq=1,in_order=0" },
  {
    name: "packed rings, not mergeable",
    options: ",packed_vq=1,in_order=0,mrg_rxbuf=0",
  },
  { name: "packed rings, in order", options: ",packed_vq=1,in_order=1" },
  {
    name: "packed rings, in order, not mergeable",
    options: ",packed_vq=1,in_order=1,mrg_rxbuf=0",
  },
  {
    name: "packed rings, vectorised",
    options: ",packed_vq=1,in_order=1,mrg_rxbuf=0,vectorized=1",
  },
  {
    name: "packed rings, two queue pairs",
    options: ",packed_vq=1",
    queues: 2,
  },
];

/** As many Workers as pairs, or none. */
function served(workers: number): string {
  return workers === 0
    ? ""
    : workers === 1
    ? " in a Worker"
    : " in two Workers";
}

for (const one of frontends) {
  const { name, queues = 1 } = one;
  for (const workers of [0, queues]) {
    const title = `virtio_user goes round with ${name}${served(workers)}`;
    if (missing !== null) test.skip(title, missing);
    else test(title, () => goRound(one, workers));
  }
}

async function goRound(
  { options, queues = 1 }: FrontendCase,
  workers: number,
): Promise<void> {
  using folder = new TemporaryFolder();
  const address = folder.file("socket");
  const errors: string[] = [];
  const onError = (error: Error) => void errors.push(error.message);
  const { end, wrong } = checkedEchoEnd();
  const nic = netDevice({ end, numQueues: queues, onError });
  await using _target = await registerTarget({
    transport: "vhost-user",
    address,
    ...nic,
    workers,
    onError,
  });
  const vdev = `net_virtio_user0,path=${address},queues=${queues}${options}`;
  await using testpmd = new Testpmd(vdev, queues);
  await circulate(testpmd, nic);
  // The queues stop, and go on.
  await circulate(testpmd, nic);
  assert.equal(await testpmd.quit(), 0);
  const { fromGuest, toGuest } = nic.statistics.snapshot();
  assert.equal(fromGuest.errors, 0);
  assert.equal(fromGuest.bytes, fromGuest.packets * frameBytes);
  assert.ok(toGuest.packets >= 2 * enough);
  for (let pair = 0; pair < queues; pair++) {
    assert.ok(nic.statistics.snapshot(pair).toGuest.packets > 0, `${pair}`);
  }
  assert.equal(wrong[0], 0);
  assert.deepEqual(errors, []);
}

for (const rings of ["split", "packed"]) {
  for (const workers of [0, 1]) {
    const title =
      `virtio_user that listens finds its back-end again, with ${rings} rings${
        served(workers)
      }`;
    if (missing !== null) test.skip(title, missing);
    else test(title, () => reconnects(rings, workers));
  }
}

async function reconnects(rings: string, workers: number): Promise<void> {
  using folder = new TemporaryFolder();
  const address = folder.file("socket");
  const { end, wrong } = checkedEchoEnd();
  const vdev = `net_virtio_user0,path=${address},queues=1,server=1,packed_vq=${
    rings === "packed" ? 1 : 0
  }`;
  await using testpmd = new Testpmd(vdev, 1);
  for (let round = 0; round < 3; round++) {
    const nic = netDevice({ end });
    await using _target = await registerTarget({
      transport: "vhost-user",
      address,
      connect: true,
      ...nic,
      workers,
    });
    if (round > 0) await testpmd.printed(/reconnection succeeds/);
    await circulate(testpmd, nic);
    // While its back-end is there: what it sends to one that has gone may end
    // it by SIGPIPE.
    if (round === 2) assert.equal(await testpmd.quit(), 0);
  }
  assert.equal(wrong[0], 0);
}
