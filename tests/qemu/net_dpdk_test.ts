// DPDK's virtio_user, a front-end and driver that is not ours, on our network
// card. What its testpmd sends comes back and goes round.
import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { tmpdir } from "node:os";
import {
  echoEnd,
  type Frames,
  type Net,
  netDevice,
  type NetEnd,
  registerTarget,
} from "../../mod.ts";
import { test } from "../harness.ts";
import { testpmdMissing, testpmdProgram } from "../support/testpmd.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { eventually, within } from "../support/wait.ts";

const missing = testpmdProgram === null ? testpmdMissing : null;
/** Frames that must come round. */
const enough = 5000;
const frameBytes = 100;

/** testpmd with one virtio_user port, driven by its prompt. */
class Testpmd {
  readonly #child: ChildProcess;
  readonly #ended: Promise<number | null>;
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
      this.#child.on("close", (code) => resolve(code));
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

  /** Fulfilled with its exit code. */
  async quit(): Promise<number | null> {
    this.type("quit");
    return await within(this.#ended, "testpmd ends");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#child.kill("SIGKILL");
    await this.#ended;
  }
}

/** The echo, with a look at each frame on its way. */
function checkedEcho(wrong: string[]): NetEnd {
  const echo = echoEnd();
  const check = (frames: Frames) => {
    for (let i = 0; i < frames.count; i++) {
      const frame = frames.at(i);
      let sum = 0;
      const view = new DataView(frame.buffer, frame.byteOffset, frame.length);
      for (let at = 14; at < 34; at += 2) sum += view.getUint16(at);
      sum = (sum & 0xffff) + (sum >> 16);
      const isRight = frame.length === frameBytes &&
        view.getUint16(12) === 0x0800 && sum === 0xffff;
      if (!isRight && wrong.length < 3) wrong.push(frame.toString());
    }
  };
  return {
    ...echo,
    open(link) {
      const port = echo.open(link);
      return {
        ...port,
        receive(frames, pair) {
          check(frames);
          port.receive!(frames, pair);
        },
      };
    },
  };
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

function frontend(
  name: string,
  options: string,
  queues = 1,
): void {
  const title = `virtio_user goes round with ${name}`;
  if (missing !== null) return test.skip(title, missing);
  test(title, async () => {
    using folder = new TemporaryFolder();
    const address = folder.file("socket");
    const wrong: string[] = [];
    const errors: string[] = [];
    const onError = (error: Error) => void errors.push(error.message);
    const nic = netDevice({
      end: checkedEcho(wrong),
      numQueues: queues,
      onError,
    });
    await using _target = await registerTarget({
      transport: "vhost-user",
      address,
      ...nic,
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
    assert.deepEqual(wrong, []);
    assert.deepEqual(errors, []);
  });
}

frontend("split rings, mergeable", ",in_order=0");
frontend("split rings, not mergeable", ",in_order=0,mrg_rxbuf=0");
frontend("split rings, in order", ",in_order=1");
frontend(
  "split rings, vectorised",
  ",in_order=1,mrg_rxbuf=0,vectorized=1",
);
frontend("packed rings, mergeable", ",packed_vq=1,in_order=0");
frontend("packed rings, not mergeable", ",packed_vq=1,in_order=0,mrg_rxbuf=0");
frontend("packed rings, in order", ",packed_vq=1,in_order=1");
frontend(
  "packed rings, vectorised",
  ",packed_vq=1,in_order=1,mrg_rxbuf=0,vectorized=1",
);
frontend("two queue pairs", ",packed_vq=1", 2);

const server = "virtio_user that listens finds its back-end again";
if (missing !== null) test.skip(server, missing);
else test(server, reconnects);

async function reconnects(): Promise<void> {
  using folder = new TemporaryFolder();
  const address = folder.file("socket");
  const wrong: string[] = [];
  const vdev = `net_virtio_user0,path=${address},queues=1,server=1`;
  await using testpmd = new Testpmd(vdev, 1);
  for (let round = 0; round < 3; round++) {
    const nic = netDevice({ end: checkedEcho(wrong) });
    await using _target = await registerTarget({
      transport: "vhost-user",
      address,
      connect: true,
      ...nic,
    });
    if (round > 0) await testpmd.printed(/reconnection succeeds/);
    await circulate(testpmd, nic);
  }
  assert.equal(await testpmd.quit(), 0);
  assert.deepEqual(wrong, []);
}
