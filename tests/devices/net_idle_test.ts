// A card without traffic costs no processor: neither the event loop nor a
// Worker goes on polling, however long it polls after work.
import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { echoEnd, tapEnd } from "../../mod.ts";
import { test } from "../harness.ts";
import { tapMissing } from "../qemu/host_network.ts";
import { within } from "../support/wait.ts";
import { frameOf, type NetServing, ServedNet, swapped } from "./net_guest.ts";

const ticksPerSecond = 100;
const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

/** Seconds of processor time that each thread has used (proc(5), stat). */
function threadTimes(): Map<string, number> {
  const times = new Map<string, number>();
  for (const thread of readdirSync("/proc/self/task")) {
    try {
      const text = readFileSync(`/proc/self/task/${thread}/stat`, "utf8");
      // Behind the name, which may have blanks: utime is the 14th field.
      const fields = text.slice(text.lastIndexOf(")") + 2).split(" ");
      const ticks = Number(fields[11]) + Number(fields[12]);
      times.set(thread, ticks / ticksPerSecond);
    } catch {
      // It has ended.
    }
  }
  return times;
}

/** The largest part of the time that one thread was at work. */
async function busiestThread(body: () => Promise<void>): Promise<number> {
  const before = threadTimes();
  const began = performance.now();
  await body();
  const seconds = (performance.now() - began) / 1000;
  let most = 0;
  for (const [thread, time] of threadTimes()) {
    most = Math.max(most, time - (before.get(thread) ?? 0));
  }
  return most / seconds;
}

async function idles(served: ServedNet): Promise<void> {
  const card = await served.card();
  for (let round = 0; round < 2; round++) {
    await within(card.send(frameOf(60)), "a frame is sent");
    // What follows work: polling, then native waits, then sleep.
    await pause(1300);
    const part = await busiestThread(async () => {
      for (let tick = 0; tick < 15; tick++) await pause(100);
    });
    assert.ok(part < 0.25, `a thread was busy for ${part * 100} %`);
  }
}

const ways: [string, NetServing][] = [
  ["the event loop", {}],
  ["the event loop, polling for 20 ms after work", {
    pollMicroseconds: 20_000,
  }],
  ["a Worker", { workers: 1 }],
  ["a Worker, polling for 20 ms after work", {
    workers: 1,
    pollMicroseconds: 20_000,
  }],
];
for (const [name, serving] of ways) {
  test(`a card without traffic costs no processor: ${name}`, async () => {
    await using served = await ServedNet.start({ end: echoEnd() }, serving);
    await idles(served);
    // And wakes up.
    const card = await served.card();
    await card.send(frameOf(99));
    const { bytes } = await within(card.receive(), "a frame after all");
    assert.deepEqual(bytes, swapped(frameOf(99)));
  });

  const title = `a TAP interface without traffic costs no processor: ${name}`;
  const missing = tapMissing();
  if (missing !== null) test.skip(title, missing);
  else {
    test(title, async () => {
      const end = tapEnd({ name: "vhost2t%d" });
      await using served = await ServedNet.start({ end }, serving);
      await idles(served);
    });
  }
}
