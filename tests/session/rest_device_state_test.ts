// SET_DEVICE_STATE_FD and CHECK_DEVICE_STATE (vhost-user-spec.md sections 1.2
// and 1.5, "Device state").

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { closeSync, constants, openSync, readSync, writeSync } from "node:fs";
import { open } from "node:fs/promises";
import {
  FrontendRequest as Request,
  ProtocolFeature,
  supportedProtocolFeatures,
  type VhostUserDevice,
} from "../../frontend/mod.ts";
import { featureMask, type StateTransfer, type TargetOps } from "../../mod.ts";
import { test } from "../harness.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { Events, eventually, within } from "../support/wait.ts";
import { deferred } from "./deferred.ts";
import { assertWorks, echo, type Served, withGuest } from "./served.ts";

const guest = {
  protocolFeatures: supportedProtocolFeatures |
    featureMask(ProtocolFeature.DEVICE_STATE),
};
const begun = 0x100n;
const save = { direction: 0, phase: 0 };
const load = { direction: 1, phase: 0 };
const state = new TextEncoder().encode("all that the device knows ".repeat(99));

/** A pipe with a name, so that both of its ends can be opened here. */
async function withPipe(
  body: (readFd: number, writeFd: number) => Promise<void>,
): Promise<void> {
  const folder = new TemporaryFolder();
  const path = folder.file("pipe");
  execFileSync("mkfifo", [path]);
  const { O_NONBLOCK, O_RDONLY, O_WRONLY } = constants;
  const readFd = openSync(path, O_RDONLY | O_NONBLOCK);
  const writeFd = openSync(path, O_WRONLY);
  try {
    await body(readFd, writeFd);
  } finally {
    for (const fd of [readFd, writeFd]) {
      try {
        closeSync(fd);
      } catch {
        // The test has closed it.
      }
    }
    folder.remove();
  }
}

/** What can be read of a pipe now. */
function drain(fd: number): Uint8Array {
  const bytes = new Uint8Array(1 << 16);
  return bytes.slice(0, readSync(fd, bytes));
}

function withState(
  transferState: NonNullable<TargetOps["transferState"]>,
  body: (
    guest: VhostUserDevice,
    served: Served,
    /** The back-end has taken a message whose line has `name`. */
    taken: (name: string) => Promise<unknown>,
  ) => Promise<void>,
): Promise<void> {
  const lines = new Events<string>();
  const taken = (name: string) =>
    lines.find((line) => line.startsWith("<-") && line.includes(name));
  return withGuest({
    device: () => ({ ...echo(), transferState }),
    guest,
    errorsExpected: true,
    trace: lines.push,
  }, (guest, served) => body(guest, served, taken));
}

function begin(
  { connection }: VhostUserDevice,
  payload: { direction: number; phase: number },
  fd: number,
): Promise<bigint> {
  const fds = [fd];
  const id = Request.SET_DEVICE_STATE_FD;
  return within(connection.exchange(id, payload, { fds }), "the begin");
}

function check({ connection }: VhostUserDevice): Promise<bigint> {
  const result = connection.exchange(Request.CHECK_DEVICE_STATE, null);
  return within(result, "the check");
}

test("device state, save: the device writes, the descriptor's close is the end", async () => {
  const seen: string[] = [];
  await withState(async (_, { direction, fd }) => {
    seen.push(direction);
    await using file = await open(`/proc/self/fd/${fd}`, "w");
    await file.write(state);
  }, async (guest, { errors }) => {
    await guest.activate();
    await guest.startQueue(0);
    await assertWorks(guest);
    await guest.stop();
    await withPipe(async (readFd, writeFd) => {
      assert.equal(await begin(guest, save, writeFd), begun);
      closeSync(writeFd);
      assert.equal(await check(guest), 0n);
      assert.deepEqual(drain(readFd), state);
      // The end of the stream: no writer is left.
      assert.equal(drain(readFd).length, 0);
    });
    assert.deepEqual(seen, ["save"]);
    // The guest goes on where it was, as after a migration that was given up.
    await guest.startQueue(0);
    await assertWorks(guest);
    assert.deepEqual(errors.pending, []);
  });
});

test("device state, load: the check waits until the device has read to the end", async () => {
  const opened = new Events<void>();
  const hold = deferred<void>();
  let loaded: Uint8Array | undefined;
  await withState(async (_, { direction, fd }) => {
    assert.equal(direction, "load");
    await using file = await open(`/proc/self/fd/${fd}`, "r");
    opened.push();
    await hold.promise;
    loaded = await file.readFile();
  }, async (guest, _, taken) => {
    await withPipe(async (readFd, writeFd) => {
      assert.equal(await begin(guest, load, readFd), begun);
      closeSync(readFd);
      await opened.next();
      // Messages are answered in the meantime.
      await guest.connection.barrier();
      writeSync(writeFd, state);
      closeSync(writeFd);
      let isChecked = false;
      const result = check(guest).then((value) => {
        isChecked = true;
        return value;
      });
      await taken("CHECK_DEVICE_STATE");
      assert.equal(isChecked, false);
      hold.resolve();
      assert.equal(await result, 0n);
      assert.deepEqual(new Uint8Array(loaded!), state);
    });
  });
});

test("device state: a failed transfer is told by the check, again if asked again, until the next", async () => {
  let isFailing = true;
  await withState(() => {
    if (isFailing) throw new Error("of another version");
  }, async (guest, { errors }) => {
    assert.notEqual(await check(guest), 0n);
    await withPipe(async (readFd) => {
      assert.equal(await begin(guest, load, readFd), begun);
      assert.notEqual(await check(guest), 0n);
      assert.notEqual(await check(guest), 0n);
      const { message, code } = await errors.next();
      assert.match(message, /Op transferState .* failed: of another version/);
      assert.equal(code, "OP");
      isFailing = false;
      assert.equal(await begin(guest, load, readFd), begun);
      assert.equal(await check(guest), 0n);
    });
  });
});

test("device state: refused in another phase, in no direction, while a queue runs or a transfer does", async () => {
  const hold = deferred<void>();
  await withState(() => hold.promise, async (guest, { errors }) => {
    await withPipe(async (readFd) => {
      const assertRefused = async (
        payload: { direction: number; phase: number },
        reason: RegExp,
      ) => {
        const reply = await begin(guest, payload, readFd);
        assert.notEqual(reply & 0xffn, 0n);
        assert.equal(reply & begun, begun);
        assert.match((await errors.next()).message, reason);
      };
      await assertRefused({ direction: 0, phase: 1 }, /phase 1/);
      await assertRefused({ direction: 2, phase: 0 }, /direction 2/);
      await guest.activate();
      await guest.startQueue(0);
      await assertRefused(save, /not all queues are stopped/);
      await guest.stop();
      assert.equal(await begin(guest, save, readFd), begun);
      await assertRefused(load, /another transfer is under way/);
      hold.resolve();
      assert.equal(await check(guest), 0n);
    });
  });
});

test("device state: no queue starts before the transfer has ended", async () => {
  const hold = deferred<void>();
  await withState(() => hold.promise, async (guest, { recording }) => {
    await withPipe(async (readFd) => {
      await guest.activate();
      assert.equal(await begin(guest, load, readFd), begun);
      await guest.startQueue(0);
      await guest.connection.barrier();
      assert.equal(recording.count("queueStart 0"), 0);
      hold.resolve();
      assert.equal(await check(guest), 0n);
      await recording.completed("queueStart 0");
      await assertWorks(guest);
    });
  });
});

for (const by of ["the front-end goes", "the target is unregistered"]) {
  test(`device state: a transfer that never ends holds nobody up when ${by}`, async () => {
    const hold = deferred<void>();
    const transfers = new Events<StateTransfer>();
    await withState((_, transfer) => {
      transfers.push(transfer);
      return hold.promise;
    }, async (guest, { recording, errors, target }, taken) => {
      await withPipe(async (readFd) => {
        assert.equal(await begin(guest, load, readFd), begun);
        await transfers.next();
        const [device] = recording.devices;
        const result = guest.connection.exchange(
          Request.CHECK_DEVICE_STATE,
          null,
        );
        const failed = assert.rejects(result, { code: "CLOSED" });
        await taken("CHECK_DEVICE_STATE");
        if (by === "the front-end goes") guest.connection.close();
        else await within(target.unregister(), "unregister");
        await within(recording.completed("deviceDestroy"), "the end");
        await failed;
        assert.equal(device.signal.aborted, true);
        // Its failure is of no interest any more.
        hold.reject(new Error("gave up"));
        await eventually(() => target.devices.length === 0);
        assert.deepEqual(errors.pending, []);
      });
    });
  });
}

test("device state: messages behind a waiting check are kept", async () => {
  const hold = deferred<void>();
  await withState(() => hold.promise, async (guest, _, taken) => {
    await withPipe(async (readFd) => {
      assert.equal(await begin(guest, load, readFd), begun);
      const { connection } = guest;
      const checked = check(guest);
      await taken("CHECK_DEVICE_STATE");
      const features = connection.getFeatures();
      const again = begin(guest, load, readFd);
      hold.resolve();
      assert.equal(await checked, 0n);
      assert.equal(typeof await features, "bigint");
      assert.equal(await again, begun);
      assert.equal(await check(guest), 0n);
    });
  });
});

test("DEVICE_STATE is offered only with the op, and refused without it", async () => {
  await withGuest(
    { guest, errorsExpected: true },
    async ({ connection, protocolFeatures }, { errors }) => {
      assert.equal(
        protocolFeatures & featureMask(ProtocolFeature.DEVICE_STATE),
        0n,
      );
      const id = Request.CHECK_DEVICE_STATE;
      await assert.rejects(connection.exchange(id, null));
      assert.match((await errors.next()).message, /needs DEVICE_STATE/);
    },
  );
});
