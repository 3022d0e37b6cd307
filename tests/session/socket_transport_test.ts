// The transport "vhost-user": listening, connecting, inherited descriptors.

import assert from "node:assert/strict";
import {
  existsSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { spawn } from "node:child_process";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { core } from "../../ffi/core.ts";
import { Errno } from "../../ffi/errors.ts";
import {
  FrontendConnection,
  supportedFeatures,
  VhostUserDevice,
  VirtioFeature,
} from "../../frontend/mod.ts";
import {
  featureMask,
  registerTarget,
  type Target,
  Vhost2Error,
} from "../../mod.ts";
import { encodeRequest } from "../../protocol/message.ts";
import { isNode, test } from "../harness.ts";
import {
  descriptorCount,
  withoutDescriptorLeak,
} from "../support/descriptors.ts";
import { TemporaryFolder } from "../support/temporary.ts";
import { Events, eventually, within } from "../support/wait.ts";
import { FrontendListener, listenAt } from "./frontend_listener.ts";
import { Recording } from "./recording.ts";
import {
  assertWorks,
  opened,
  serving,
  type SocketTargetOptions,
  targetOptions,
} from "./served.ts";

interface Bench {
  readonly folder: TemporaryFolder;
  readonly recording: Recording;
  readonly errors: Events<Vhost2Error>;
  /** Registers the usual device; unregistered when the test ends. */
  register(
    address: SocketTargetOptions["address"],
    more?: Partial<SocketTargetOptions>,
  ): Promise<Target>;
}

/** What a test of addresses needs; nothing may be left open after `body`. */
async function bench(body: (bench: Bench) => Promise<void>): Promise<void> {
  using folder = new TemporaryFolder();
  await withoutDescriptorLeak(async () => {
    const targets: Target[] = [];
    const recording = new Recording();
    const errors = new Events<Vhost2Error>();
    try {
      await body({
        folder,
        recording,
        errors,
        register: async (address, more) => {
          const options = targetOptions(address, recording, errors);
          const target = await registerTarget({ ...options, ...more });
          targets.push(target);
          return target;
        },
      });
    } finally {
      for (const target of targets) {
        await within(target.unregister(), "unregister");
      }
    }
    recording.assertOneAtATime();
  });
}

const code = (wanted: Vhost2Error["code"]) => (error: unknown) =>
  error instanceof Vhost2Error && error.code === wanted;

const served = (guest: VhostUserDevice) =>
  guest.start().then(() => assertWorks(guest));

test("a stale socket file is replaced", async () => {
  await bench(async ({ folder, register }) => {
    const path = folder.file("socket");
    core.descriptorClose(listenAt(path));
    assert.ok(existsSync(path));
    await register(path);
    await opened({ path }, {}, served);
  });
});

test("a live socket is refused, and goes on", async () => {
  await bench(async ({ folder, register }) => {
    const path = folder.file("socket");
    const fd = listenAt(path);
    try {
      await assert.rejects(register(path), code("IN_USE"));
      assert.ok(existsSync(path));
      (await FrontendConnection.connect(path)).close();
    } finally {
      core.descriptorClose(fd);
    }
  });
});

test("a file that is no socket is refused, and left as it is", async () => {
  await bench(async ({ folder, register }) => {
    const path = folder.file("disk.img");
    writeFileSync(path, "data");
    await assert.rejects(register(path), code("IN_USE"));
    assert.equal(readFileSync(path, "utf8"), "data");
  });
});

test("an address that cannot be used is refused, and can be tried again", async () => {
  await bench(async ({ folder, register }) => {
    for (const name of ["no/such/folder", "x".repeat(108)]) {
      const path = folder.file(name);
      for (let i = 0; i < 2; i++) {
        await assert.rejects(register(path), code("SYSTEM"));
      }
    }
  });
});

test("socketMode sets the permissions of the socket file", async () => {
  await bench(async ({ folder, register }) => {
    for (const socketMode of [0o600, 0o660, 0o666]) {
      const path = folder.file(`mode-${socketMode}`);
      await register(path, { socketMode });
      assert.equal(statSync(path).mode & 0o777, socketMode);
    }
  });
});

test("unregister removes its socket file, and not one that another listener has put there", async () => {
  await bench(async ({ folder, register }) => {
    const path = folder.file("socket");
    const target = await register(path);
    await target.unregister();
    assert.equal(existsSync(path), false);

    const second = await register(path);
    rmSync(path);
    const fd = listenAt(path);
    await second.unregister();
    assert.ok(existsSync(path));
    core.descriptorClose(fd);
  });
});

test("an inherited listening socket is served", async () => {
  await bench(async ({ folder, register, recording }) => {
    const path = folder.file("socket");
    const target = await register({ fd: listenAt(path) });
    for (let i = 0; i < 2; i++) await opened({ path }, {}, served);
    assert.equal(recording.devices.length, 2);
    await target.unregister();
    // Whoever made the socket file removes it.
    assert.ok(existsSync(path));
    await assert.rejects(FrontendConnection.connect(path), {
      errno: Errno.ECONNREFUSED,
    });
  });
});

test("an inherited connected socket is served, once", async () => {
  await bench(async ({ register, recording }) => {
    const ends = new Int32Array(2);
    core.socketPair(ends);
    const target = await register({ fd: ends[1] });
    const guest = await VhostUserDevice.open({ fd: ends[0], ramSize: 1 << 20 });
    await assertWorks(guest);
    await guest.close();
    await recording.completed("deviceDestroy");
    await eventually(() => target.devices.length === 0, "the device has gone");
  });
});

test("an inherited descriptor that is no socket is refused", async () => {
  await bench(async ({ register }) => {
    const fd = core.eventfdCreate();
    await assert.rejects(register({ fd }), code("OPTION"));
    core.descriptorClose(fd);
    await assert.rejects(register({ fd: 12345 }), code("OPTION"));
  });
});

/** The front-end of the next connection, at work. */
async function accept(listener: FrontendListener): Promise<VhostUserDevice> {
  const fd = await listener.accepted.next();
  return await VhostUserDevice.open({ fd, ramSize: 1 << 20, queueCount: 4 });
}

test("connect: true connects to a front-end that listens, and again when it has gone", async () => {
  await bench(async ({ folder, register, recording }) => {
    const path = folder.file("socket");
    using listener = new FrontendListener(path);
    await register(path, { connect: true, reconnect: { minDelayMs: 1 } });
    for (let round = 1; round <= 3; round++) {
      const guest = await accept(listener);
      await assertWorks(guest);
      await guest.close();
      await recording.completed("deviceDestroy", round);
    }
  });
});

test("connect: true waits for a front-end that is not there yet, and says so once", async () => {
  await bench(async ({ folder, register, errors }) => {
    const path = folder.file("socket");
    const delays = recordDelays();
    try {
      await register(path, {
        connect: true,
        reconnect: { minDelayMs: 10, maxDelayMs: 70 },
      });
      await eventually(() => delays.seen.length >= 6, "six attempts");
    } finally {
      delays.restore();
    }
    // Each attempt waits twice as long as the last one, up to the limit.
    assert.deepEqual(delays.seen.slice(0, 6), [10, 20, 40, 70, 70, 70]);
    assert.equal((await errors.next()).errno, Errno.ENOENT);
    assert.equal(errors.pending.length, 0);
    using listener = new FrontendListener(path);
    const guest = await accept(listener);
    await assertWorks(guest);
    await guest.close();
  });
});

/** Makes timers fire at once and writes down how long they would have been. */
function recordDelays() {
  const { setTimeout: original } = globalThis;
  const seen: number[] = [];
  globalThis.setTimeout = ((body: () => void, delayMs = 0) => {
    // The tests' own: looking again, and their limits.
    if (delayMs < 10 || delayMs > 1000) return original(body, delayMs);
    seen.push(delayMs);
    return original(body, 0);
  }) as typeof setTimeout;
  return {
    seen,
    restore: () => {
      globalThis.setTimeout = original;
    },
  };
}

test("connect: true with reconnect: false fails at once when nobody listens", async () => {
  await bench(async ({ folder, register }) => {
    const path = folder.file("socket");
    await assert.rejects(
      register(path, { connect: true, reconnect: false }),
      code("SYSTEM"),
    );
  });
});

test("connect: true with reconnect: false connects once, and the target ends with its connection", async () => {
  await bench(async ({ folder, register, recording }) => {
    const path = folder.file("socket");
    using listener = new FrontendListener(path);
    const once = { connect: true, reconnect: false };
    const target = await register(path, once);
    const guest = await accept(listener);
    await assertWorks(guest);
    await guest.close();
    await within(target.closed, "the end of the target");
    assert.equal(recording.count("deviceDestroy"), 1);
    // Were there another attempt it would be a second descriptor here.
    await new Promise((resolve) => setTimeout(resolve, 1));
    assert.equal(listener.accepted.pending.length, 0);
    await target.unregister();
    // Its address is free.
    await register(path, once);
    await (await accept(listener)).close();
  });
});

test("a target that connects again, or listens, does not end with its connection", async () => {
  await bench(async ({ folder, register, recording }) => {
    const path = folder.file("socket");
    using listener = new FrontendListener(path);
    const connecting = await register(path, { connect: true });
    const listening = await register(folder.file("other"));
    let hasEnded = false;
    for (const { closed } of [connecting, listening]) {
      closed.then(() => hasEnded = true);
    }
    await (await accept(listener)).close();
    await opened({ path: folder.file("other") }, {}, served);
    await recording.completed("deviceDestroy", 2);
    await eventually(() =>
      connecting.devices.length + listening.devices.length === 0
    );
    await new Promise((resolve) => setImmediate(resolve));
    assert.equal(hasEnded, false);
    await connecting.unregister();
    await connecting.closed;
    await listening.unregister();
    await listening.closed;
  });
});

test("a target ends with the connection that it was given", async () => {
  await bench(async ({ register }) => {
    const ends = new Int32Array(2);
    assert.equal(core.socketPair(ends), 0);
    const target = await register({ fd: ends[1] });
    const guest = await VhostUserDevice.open({ fd: ends[0] });
    await guest.close();
    await within(target.closed, "the end of the target");
  });
});

test("a process whose only target has ended ends", async () => {
  using folder = new TemporaryFolder();
  const path = folder.file("socket");
  using listener = new FrontendListener(path);
  const extension = import.meta.url.slice(import.meta.url.lastIndexOf("."));
  const program = fileURLToPath(
    new URL(`single_connection${extension}`, import.meta.url),
  );
  const child = spawn(
    process.execPath,
    [...(isNode ? [] : ["run", "--allow-all"]), program, path],
    { stdio: ["ignore", "inherit", "inherit"] },
  );
  const ended = new Promise((resolve) => child.once("exit", resolve));
  const guest = await accept(listener);
  await assertWorks(guest);
  await guest.close();
  assert.equal(await within(ended, "the end of the process"), 0);
});

test("unregister ends the attempts to connect", async () => {
  await bench(async ({ folder, register }) => {
    const path = folder.file("socket");
    const target = await register(path, { connect: true });
    await target.unregister();
    using listener = new FrontendListener(path);
    await new Promise((resolve) => setImmediate(resolve));
    assert.equal(listener.accepted.pending.length, 0);
  });
});

test("two front-ends at once have each a device, with its own features, memory and queues", async () => {
  await serving({}, async ({ path, target, recording }) => {
    const bare = featureMask(
      VirtioFeature.VERSION_1,
      VirtioFeature.RING_EVENT_IDX,
    );
    await opened({ path }, { features: bare, queueCount: 1 }, async (first) => {
      await first.start();
      await opened({ path }, { ramSize: 1 << 21 }, async (second) => {
        await second.start();
        await Promise.all([assertWorks(first), assertWorks(second, 3)]);
        const [one, two] = recording.devices;
        assert.equal(one.features, bare);
        assert.equal(two.features, second.features);
        assert.notEqual(two.features & supportedFeatures, bare);
        assert.deepEqual([one.queues.length, two.queues.length], [1, 4]);
        assert.equal(one.memory[0].size, 1 << 20);
        assert.equal(two.memory[0].size, 1 << 21);
        assert.deepEqual(target.devices, [one, two]);
        assert.match(one.name, /#1$/);
        assert.match(two.name, /#2$/);
      });
      await recording.completed("deviceDestroy");
      await assertWorks(first);
    });
  });
});

test("after unregister the process has the descriptors that it had before", async () => {
  await bench(async ({ folder, register }) => {
    const before = descriptorCount();
    const path = folder.file("socket");
    const target = await register(path);
    await opened({ path }, {}, async (guest) => {
      await served(guest);
      await opened({ path }, {}, served);
    });
    await target.unregister();
    await eventually(() => descriptorCount() <= before, "as before");
  });
});

test("a front-end that says nothing does not keep a target from ending", async () => {
  await bench(async ({ folder, register, recording }) => {
    const path = folder.file("socket");
    const target = await register(path);
    const silent = await FrontendConnection.connect(path);
    const half = await FrontendConnection.connect(path);
    half.sendRaw(encodeRequest(2, new Uint8Array(8)).subarray(0, 15));
    await recording.completed("deviceCreate", 2);
    await within(target.unregister(), "unregister");
    await silent.closed;
    await half.closed;
    assert.equal(recording.count("deviceDestroy"), 2);
  });
});

test("a front-end that does not take its replies stops being read, and harms nobody", async () => {
  await serving({}, async ({ path }) => {
    const deaf = await FrontendConnection.connect(path);
    deaf.pause();
    const request = encodeRequest(1, null);
    let sent = 0;
    // Until the socket is full: then the back-end has stopped to read.
    for (let full = 0; full < 20 && sent < 20_000;) {
      if (deaf.sendRaw(request) === request.length) {
        sent++;
        full = 0;
      } else {
        full++;
        await new Promise((resolve) => setTimeout(resolve, 1));
      }
    }
    assert.ok(sent > 100 && sent < 20_000, `${sent} requests were taken`);
    await opened({ path }, {}, served);
    deaf.close();
    await deaf.closed;
  });
});

test("a front-end that goes in the middle of a message is reported, and its device destroyed", async () => {
  await serving(
    { errorsExpected: true },
    async ({ path, errors, recording }) => {
      const connection = await FrontendConnection.connect(path);
      connection.sendRaw(encodeRequest(2, new Uint8Array(8)).subarray(0, 15));
      connection.close();
      await connection.closed;
      assert.match((await errors.next()).message, /inside a message/);
      await recording.completed("deviceDestroy");
    },
  );
});

test("EMFILE in accept pauses the listener: it neither spins nor loses the front-end", async () => {
  await bench(async ({ folder, register, errors }) => {
    const path = folder.file("socket");
    await register(path);
    const accept = core.socketAccept;
    let attempts = 0;
    (core as { socketAccept: typeof accept }).socketAccept = (fd) => {
      attempts++;
      return accept(fd);
    };
    const spare = core.eventfdCreate();
    const taken: number[] = [];
    try {
      for (;;) {
        const fd = core.descriptorDuplicate(spare);
        if (fd < 0) break;
        taken.push(fd);
      }
      // Enough for the front-end, not for us.
      for (const fd of taken.splice(-2)) core.descriptorClose(fd);
      const connection = await FrontendConnection.connect(path);
      await eventually(() => attempts > 0, "the first attempt");
      for (let turn = 0; turn < 50; turn++) {
        await new Promise((resolve) => setImmediate(resolve));
      }
      assert.ok(attempts <= 2, `${attempts} attempts in a moment`);
      await eventually(() => attempts >= 3, "more attempts");
      for (const fd of taken.splice(0)) core.descriptorClose(fd);
      await within(connection.getFeatures(), "the connection");
      connection.close();
      await connection.closed;
    } finally {
      for (const fd of taken) core.descriptorClose(fd);
      core.descriptorClose(spare);
      (core as { socketAccept: typeof accept }).socketAccept = accept;
    }
    // Reported once, not at every attempt.
    assert.deepEqual(
      errors.pending.map(({ errno }) => errno),
      [Errno.EMFILE],
    );
  });
});

test("trace gives one line for each message, received and sent", async () => {
  const lines: string[] = [];
  const options = { trace: (line: string) => void lines.push(line) };
  await serving(options, async ({ path }) => {
    await opened({ path }, { queueCount: 1 }, served);
  });
  assert.ok(lines.every((line) => !line.includes("\n")));
  const names = lines.map((line) => line.match(/[A-Z][A-Z_]+[A-Z]/)?.[0]);
  assert.deepEqual(names.slice(0, 5), [
    "GET_FEATURES",
    "GET_FEATURES",
    "GET_PROTOCOL_FEATURES",
    "GET_PROTOCOL_FEATURES",
    "SET_PROTOCOL_FEATURES",
  ]);
  for (const name of ["ADD_MEM_REG", "SET_VRING_KICK", "SET_VRING_ADDR"]) {
    assert.ok(names.includes(name), name);
  }
});
