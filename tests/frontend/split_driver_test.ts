import assert from "node:assert/strict";
import { core } from "../../ffi/core.ts";
import { eventLoop } from "../../ffi/event_loop.ts";
import {
  DescriptorFlag,
  type DriverCompletion,
  featureMask,
  GuestRam,
  SplitDriver,
  type SplitDriverOptions,
  VirtioFeature,
} from "../../frontend/mod.ts";
import { test } from "../harness.ts";
import { withoutDescriptorLeak } from "../support/descriptors.ts";

const eventIndex = featureMask(VirtioFeature.RING_EVENT_IDX);

interface SeenDescriptor {
  address: bigint;
  length: number;
  flags: number;
}

/** The device's side, by hand: plain reads of what the driver wrote. */
class Device {
  readonly driver: SplitDriver;
  readonly ram: GuestRam;
  lastAvailable = 0;
  usedIndex = 0;

  constructor(driver: SplitDriver) {
    this.driver = driver;
    this.ram = driver.ram;
  }

  #part(name: "descriptor" | "available" | "used"): DataView {
    const size = name === "descriptor"
      ? 16 * this.driver.queueSize
      : name === "available"
      ? 6 + 2 * this.driver.queueSize
      : 6 + 8 * this.driver.queueSize;
    const bytes = this.ram.bytes(this.driver.ring.addresses[name], size);
    return new DataView(bytes.buffer, bytes.byteOffset, size);
  }

  get availableIndex(): number {
    return this.#part("available").getUint16(2, true);
  }

  get usedEvent(): number {
    const offset = 4 + 2 * this.driver.queueSize;
    return this.#part("available").getUint16(offset, true);
  }

  set availableEvent(value: number) {
    const offset = 4 + 8 * this.driver.queueSize;
    this.#part("used").setUint16(offset, value, true);
  }

  set usedFlags(value: number) {
    this.#part("used").setUint16(0, value, true);
  }

  /** The next head and its chain, indirect tables followed. */
  take(): { head: number; chain: SeenDescriptor[] } {
    assert.notEqual(this.lastAvailable, this.availableIndex, "ring is empty");
    const slot = this.lastAvailable % this.driver.queueSize;
    const head = this.#part("available").getUint16(4 + 2 * slot, true);
    this.lastAvailable = (this.lastAvailable + 1) & 0xffff;
    return { head, chain: this.#walk(this.#part("descriptor"), head) };
  }

  #walk(table: DataView, first: number): SeenDescriptor[] {
    const chain: SeenDescriptor[] = [];
    for (let index = first;;) {
      const address = table.getBigUint64(16 * index, true);
      const length = table.getUint32(16 * index + 8, true);
      const flags = table.getUint16(16 * index + 12, true);
      if ((flags & DescriptorFlag.INDIRECT) !== 0) {
        const bytes = this.ram.bytes(address, length);
        const inner = new DataView(bytes.buffer, bytes.byteOffset, length);
        return this.#walk(inner, 0);
      }
      chain.push({ address, length, flags });
      if ((flags & DescriptorFlag.NEXT) === 0) return chain;
      index = table.getUint16(16 * index + 14, true);
    }
  }

  use(head: number, written: number): void {
    const used = this.#part("used");
    const slot = this.usedIndex % this.driver.queueSize;
    used.setUint32(4 + 8 * slot, head, true);
    used.setUint32(8 + 8 * slot, written, true);
    this.setUsedIndex(this.usedIndex + 1);
  }

  setUsedIndex(index: number): void {
    this.usedIndex = index & 0xffff;
    this.#part("used").setUint16(2, this.usedIndex, true);
  }

  call(): void {
    core.eventfdSignal(this.driver.callFd);
  }

  get kicks(): number {
    return core.eventfdTake(this.driver.kickFd);
  }
}

async function withDriver(
  options: Partial<SplitDriverOptions>,
  body: (driver: SplitDriver, device: Device) => Promise<void> | void,
): Promise<void> {
  const ram = new GuestRam([{ size: 1 << 20 }]);
  eventLoop.ref();
  const driver = new SplitDriver(ram, {
    queueSize: 8,
    features: 0n,
    ...options,
  });
  try {
    await body(driver, new Device(driver));
  } finally {
    driver.close();
    eventLoop.unref();
    ram.close();
  }
}

test("a request reaches the device as a chain and comes back with data", async () => {
  await withoutDescriptorLeak(() =>
    withDriver({}, async (driver, device) => {
      const answer = driver.submit({
        readable: [Uint8Array.of(1, 2, 3), Uint8Array.of(4)],
        writable: [4, 1],
        initial: 0xee,
      });
      assert.equal(device.kicks, 1);
      const { head, chain } = device.take();
      assert.deepEqual(chain.map(({ length }) => length), [3, 1, 4, 1]);
      assert.deepEqual(chain.map(({ flags }) => flags), [1, 1, 3, 2]);
      assert.deepEqual([...device.ram.read(chain[0].address, 3)], [1, 2, 3]);
      device.ram.write(chain[2].address, Uint8Array.of(9, 8));
      device.use(head, 2);
      device.call();
      const { written, data } = await answer;
      assert.equal(written, 2);
      assert.deepEqual(data.map((bytes) => [...bytes]), [
        [9, 8, 0xee, 0xee],
        [0xee],
      ]);
      assert.equal(driver.freeDescriptors, 8);
      assert.equal(driver.inFlight, 0);
      assert.deepEqual([driver.kicks, driver.calls, driver.usedCount], [
        1,
        1,
        1,
      ]);
    })
  );
});

test("an indirect chain takes one descriptor of the ring", async () => {
  await withDriver({ queueSize: 1 }, async (driver, device) => {
    const answer = driver.submit({
      readable: [Uint8Array.of(5), Uint8Array.of(6)],
      writable: [2],
      indirect: true,
    });
    assert.equal(driver.freeDescriptors, 0);
    const { head, chain } = device.take();
    assert.deepEqual(chain.map(({ flags }) => flags), [1, 1, 2]);
    assert.equal(device.ram.read(chain[1].address, 1)[0], 6);
    device.use(head, 0);
    device.call();
    assert.equal((await answer).written, 0);
  });
});

test("requests complete out of order", async () => {
  await withDriver({}, async (driver, device) => {
    const order: number[] = [];
    const answers = [1, 2, 3].map((length) =>
      driver.submit({ writable: [length] }).then(({ written }) =>
        order.push(written)
      )
    );
    const heads = [device.take(), device.take(), device.take()];
    for (const { head, chain } of heads.reverse()) {
      device.use(head, chain[0].length);
    }
    device.call();
    await Promise.all(answers);
    assert.deepEqual(order, [3, 2, 1]);
  });
});

test("requests wait in turn for free descriptors", async () => {
  await withDriver({ queueSize: 4 }, async (driver, device) => {
    const answers: Promise<DriverCompletion>[] = [];
    for (const writable of [[1, 1, 1], [2, 2], [3]]) {
      answers.push(driver.submit({ writable, kick: false }));
    }
    // The third would fit, but it came after the second.
    assert.equal(device.availableIndex, 1);
    assert.equal(device.kicks, 0);
    device.use(device.take().head, 3);
    device.call();
    await answers[0];
    assert.equal(device.kicks, 2, "who waited kicks by itself");
    assert.equal(device.availableIndex, 3);
    device.use(device.take().head, 4);
    device.use(device.take().head, 3);
    device.call();
    assert.deepEqual(
      (await Promise.all(answers)).map(({ written }) => written),
      [3, 4, 3],
    );
    await assert.rejects(driver.submit({ writable: [1, 1, 1, 1, 1] }), {
      code: "OPTION",
    });
  });
});

test("no kick while the device's flag says so", async () => {
  await withDriver({}, async (driver, device) => {
    device.usedFlags = 1;
    const first = driver.submit({ writable: [1] });
    assert.equal(device.kicks, 0);
    device.usedFlags = 0;
    const second = driver.submit({ writable: [1] });
    assert.equal(device.kicks, 1);
    for (let i = 0; i < 2; i++) device.use(device.take().head, 1);
    device.call();
    await Promise.all([first, second]);
  });
});

test("EVENT_IDX: a kick only when the available index passes the device's event", async () => {
  await withDriver({ features: eventIndex }, async (driver, device) => {
    // The flag counts for nothing once EVENT_IDX is negotiated.
    device.usedFlags = 1;
    device.availableEvent = 2;
    const answers: Promise<unknown>[] = [];
    const kicks: number[] = [];
    for (let i = 0; i < 4; i++) {
      answers.push(driver.submit({ writable: [1] }));
      kicks.push(device.kicks);
    }
    assert.deepEqual(kicks, [0, 0, 1, 0]);
    device.availableEvent = 5;
    for (let i = 0; i < 3; i++) {
      answers.push(driver.submit({ writable: [1], kick: false }));
    }
    assert.equal(driver.notify(), true, "5 lies in the batch of 4 to 7");
    assert.equal(driver.notify(), false);
    for (let i = 0; i < 7; i++) device.use(device.take().head, 1);
    device.call();
    await Promise.all(answers);
    assert.equal(device.usedEvent, 7, "the driver asks for the next call");
  });
});

test("indices run past 65535", async () => {
  await withDriver({ features: eventIndex }, async (driver, device) => {
    for (let i = 0; i < 65540; i += 4) {
      const answers: Promise<DriverCompletion>[] = [];
      for (let j = 0; j < 4; j++) {
        answers.push(driver.submit({ writable: [1], kick: false }));
      }
      device.availableEvent = (i + 3) & 0xffff;
      assert.equal(driver.notify(), true);
      for (let j = 0; j < 4; j++) device.use(device.take().head, 1);
      assert.equal(driver.poll(), 4);
      await Promise.all(answers);
    }
    assert.equal(driver.availableIndex, 4);
    assert.equal(driver.usedIndex, 4);
    assert.equal(driver.usedCount, 65540);
  });
});

test("without calls the driver asks for none and is polled", async () => {
  await withDriver({ usesCalls: false }, async (driver, device) => {
    const available = device.ram.read(driver.ring.addresses.available, 2);
    assert.deepEqual([...available], [1, 0]);
    const answer = driver.submit({ writable: [1] });
    device.use(device.take().head, 1);
    assert.equal(driver.poll(), 1);
    assert.equal((await answer).written, 1);
  });
});

test("a device that writes more than it may breaks the ring", async () => {
  await withDriver({}, async (driver, device) => {
    const answer = driver.submit({ writable: [4] });
    const other = driver.submit({ writable: [4] });
    device.use(device.take().head, 5);
    device.call();
    await assert.rejects(answer, { code: "RING" });
    await assert.rejects(other, { code: "RING" });
    await assert.rejects(driver.submit({ writable: [1] }), { code: "RING" });
    assert.equal(driver.failure?.code, "RING");
  });
});

test("a used index that jumps breaks the ring", async () => {
  await withDriver({}, async (driver, device) => {
    const answer = driver.submit({ writable: [4] });
    device.setUsedIndex(9);
    device.call();
    await assert.rejects(answer, { code: "RING" });
  });
});

test("chains made by hand stand beside requests", async () => {
  await withDriver({}, async (driver, device) => {
    const [head, next] = driver.takeDescriptors(2);
    driver.descriptor(head, {
      address: 0xdead_0000n,
      length: 7,
      flags: DescriptorFlag.NEXT,
      next,
    });
    driver.descriptor(next, { address: 1n, length: 2, flags: 2, next: 0 });
    driver.publish(head);
    driver.kick();
    const answer = driver.submit({ writable: [1] });
    const taken = device.take();
    assert.equal(taken.head, head);
    assert.deepEqual(taken.chain.map(({ address }) => address), [
      0xdead_0000n,
      1n,
    ]);
    device.use(head, 0);
    device.use(device.take().head, 1);
    device.call();
    await driver.whenUsed(2);
    assert.deepEqual(driver.strays, [{ id: head, length: 0 }]);
    await answer;
    driver.setAvailableIndex(1000);
    assert.equal(device.availableIndex, 1000);
  });
});

test("a reset forgets everything and the ring works again", async () => {
  await withDriver({ features: eventIndex }, async (driver, device) => {
    const lost = driver.submit({ writable: [1], indirect: true });
    const waiting = driver.whenUsed(1);
    driver.reset();
    await assert.rejects(lost, { code: "CLOSED" });
    await assert.rejects(waiting, { code: "CLOSED" });
    assert.equal(device.availableIndex, 0);
    const answer = driver.submit({ writable: [1] });
    device.use(device.take().head, 1);
    device.call();
    assert.equal((await answer).written, 1);
  });
});

test("requests give their memory back", async () => {
  await withDriver({}, async (driver, device) => {
    const most = device.ram.regions[0].size - 4096;
    const address = device.ram.allocate(most);
    device.ram.free(address, most);
    // Twenty times what the memory holds.
    for (let i = 0; i < 80; i++) {
      const answer = driver.submit({
        readable: [new Uint8Array(128 << 10)],
        writable: [128 << 10],
        indirect: true,
      });
      device.use(device.take().head, 0);
      device.call();
      await answer;
    }
    assert.equal(device.ram.allocate(most), address);
  });
});

test("closing rejects what is in flight", async () => {
  await withoutDescriptorLeak(() =>
    withDriver({}, async (driver) => {
      const answer = driver.submit({ writable: [1] });
      driver.close();
      await assert.rejects(answer, { code: "CLOSED" });
      await assert.rejects(driver.submit({ writable: [1] }), {
        code: "CLOSED",
      });
      driver.kick();
      assert.equal(driver.poll(), 0);
    })
  );
});
