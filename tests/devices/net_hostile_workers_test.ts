// Guests that lie to a card while its queues are served by Workers: another
// thread than the one in which the guest writes.
import assert from "node:assert/strict";
import { netDevice } from "../../mod.ts";
import {
  encodeNetHeader,
  NetClient,
  NetGso,
  NetHeaderFlag,
  type SplitDriver,
} from "../../frontend/mod.ts";
import { withBystander, type World } from "../hostile/world.ts";
import { test } from "../harness.ts";
// The runtime keeps descriptors from its first Worker on.
import "../session/worker_world.ts";
import { eventually, within } from "../support/wait.ts";
import { endModule, Inspected } from "./net_end_modules.ts";
import { NetFlood } from "./net_flood.ts";
import { frameOf } from "./net_guest.ts";
import { allOffloads, lies, offloading } from "./net_lies.ts";

/** An inspector in a Worker: what it has seen, and the errors that count. */
function inspect(
  attack: (
    world: World,
    words: Int32Array,
    errors: () => number,
  ) => Promise<void>,
): Promise<void> {
  const shared = new SharedArrayBuffer(Inspected.byteSize);
  const end = endModule("inspector", shared, allOffloads);
  const nic = netDevice({ end });
  return withBystander(
    (world) =>
      attack(
        world,
        new Int32Array(shared),
        () => nic.statistics.snapshot().fromGuest.errors,
      ),
    () => ({ ...nic, workers: 1 }),
  );
}

test("rows 27, 35: a header that lies is counted, and its frame reaches nobody, in a Worker", () =>
  inspect(async (world, words, errors) => {
    const card = await NetClient.open({
      path: world.path,
      features: offloading,
    });
    for (const [i, [name, header]] of lies.entries()) {
      await within(
        card.send(frameOf(60), {
          header: { flags: NetHeaderFlag.NEEDS_CSUM, ...header },
        }),
        name,
      );
      assert.equal(errors(), i + 1, name);
    }
    assert.equal(words[Inspected.frames], 0);
    await card.send(frameOf(60), {
      header: {
        flags: NetHeaderFlag.NEEDS_CSUM,
        csumStart: 34,
        csumOffset: 24,
        gsoType: NetGso.TCPV4 | NetGso.ECN,
        gsoSize: 500,
        hdrLen: 54,
      },
    });
    await eventually(() => words[Inspected.frames] === 1);
    assert.equal(words[Inspected.lies], 0);
    await card.close();
  }));

test("row 28: a header that changes while a Worker looks is one that was checked, or an error", () =>
  inspect(async (world, words, errors) => {
    const card = await NetClient.open({
      path: world.path,
      features: offloading,
    });
    const { ram } = card.device;
    const driver = card.transmitQueue() as SplitDriver;
    const address = ram.allocate(72);
    const good = encodeNetHeader({
      flags: NetHeaderFlag.NEEDS_CSUM,
      csumStart: 34,
      csumOffset: 16,
      gsoType: NetGso.TCPV4,
      gsoSize: 500,
    });
    const bad = new Uint8Array(12).fill(0xff);
    ram.write(address + 12n, frameOf(60));
    const header = ram.bytes(address, 12);
    const chain = [{ address, length: 72, isWritable: false }];
    let sent = 0;
    // Both outcomes, many times each: the Worker met both headers.
    const seen = () => Math.min(words[Inspected.frames], errors());
    while (seen() < 50 && sent < 20_000) {
      // What the Worker finds first is what it mostly takes.
      header.set(sent % 2 === 0 ? good : bad);
      const done = driver.submitChain(chain);
      const before = driver.usedIndex;
      for (let i = 0; i < 2000 && driver.usedIndex === before; i++) {
        header.set((i + sent) % 2 === 0 ? bad : good);
      }
      await within(done, "the frame is done with");
      sent++;
    }
    await eventually(() => words[Inspected.frames] + errors() === sent);
    assert.ok(seen() >= 50, `${words[Inspected.frames]} and ${errors()}`);
    assert.equal(words[Inspected.lies], 0);
    await card.close();
  }));

test("row 48: a ring that is always full keeps a Worker neither from other guests nor from a stop", () =>
  inspect(async (world, words) => {
    const flood = await NetFlood.open(world.path);
    let isFlooding = true;
    const refill = () => {
      if (!isFlooding) return;
      flood.refill();
      flood.kick();
      setImmediate(refill);
    };
    refill();
    await eventually(() => words[Inspected.frames] > 10_000, "the flood runs");
    // Of the same Worker.
    const card = await NetClient.open({ path: world.path });
    for (let i = 0; i < 20; i++) {
      await within(card.send(frameOf(60)), "another guest's frame");
      await world.other.serve();
    }
    await card.close();
    const before = words[Inspected.frames];
    await eventually(() => words[Inspected.frames] > before + 10_000);
    await within(flood.device.stopQueue(1), "the queue stops");
    isFlooding = false;
    await flood.device.close();
    assert.deepEqual(world.errors, []);
  }));
