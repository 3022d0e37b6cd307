// Rings behind an IOMMU: what misses waits, what is mapped goes on, what was
// taken back is not touched ("IOMMU support"; hostile-inputs.md row 15).

import assert from "node:assert/strict";
import {
  type GuestBuffer,
  IotlbPermission,
  IotlbType,
} from "../../frontend/mod.ts";
import { type RequestHandler, requestOps } from "../../mod.ts";
import { test } from "../harness.ts";
import { Events, eventually, within } from "../support/wait.ts";
import { deferred } from "./deferred.ts";
import { echo, formats, type Guest, pageOf, withIommu } from "./iommu_guest.ts";

const pageSize = 4096;
/** Where tests map things by hand. */
const base = 0x5_0000_0000n;

/** A chain of one readable and one writable buffer. */
function chain(
  readable: readonly [bigint, number],
  writable: readonly [bigint, number],
): GuestBuffer[] {
  return [
    { address: readable[0], length: readable[1], isWritable: false },
    { address: writable[0], length: writable[1], isWritable: true },
  ];
}

/** The other queue gets its turn, several times. */
async function others(guest: Guest): Promise<void> {
  for (let i = 0; i < 3; i++) {
    await within(echo(guest, 1), "a request of the other queue");
  }
}

/** The bytes of one queue's three areas, as they are now. */
function ringBytes({ queues, ram }: Guest, index: number): Uint8Array[] {
  const { addresses } = queues[index].ring;
  const sizes = { descriptor: 256, available: 4, used: 4 };
  return (["descriptor", "available", "used"] as const).map((part) =>
    ram.read(addresses[part], sizes[part])
  );
}

/** Works through requests that the test completes. */
function held(): {
  readonly handler: RequestHandler;
  readonly requests: Events<{ text: string; complete(): void }>;
} {
  const requests = new Events<{ text: string; complete(): void }>();
  const handler: RequestHandler = (request) => {
    const gate = deferred<number>();
    const bytes = request.read();
    requests.push({
      text: new TextDecoder().decode(bytes),
      complete: () => gate.resolve(request.write(bytes)),
    });
    return gate.promise;
  };
  return { handler, requests };
}

for (const { name, packed } of formats) {
  test(`${name}: requests go on behind a strict IOMMU, with indirect tables too`, async () => {
    await withIommu({ packed }, async (guest) => {
      await guest.start();
      for (let i = 0; i < 50; i++) await echo(guest, i % 2);
      await Promise.all(
        Array.from({ length: 40 }, (_, i) => echo(guest, i % 2)),
      );
      const bytes = Uint8Array.from({ length: 10_000 }, (_, i) => i % 251);
      for (const indirect of [false, true]) {
        const { written, data } = await guest.queues[0].submit({
          readable: [bytes.subarray(0, 3000), bytes.subarray(3000)],
          writable: [5000, 5000],
          indirect,
        });
        assert.equal(written, bytes.length);
        assert.deepEqual([...data[0], ...data[1]], [...bytes]);
      }
      // Each request has its own pages.
      assert.ok(guest.iommu.misses > 180, `${guest.iommu.misses} misses`);
    });
  });

  test(`${name}: a passthrough IOMMU is asked once for each page`, async () => {
    await withIommu(
      { packed, guest: { iommu: { mode: "passthrough" } } },
      async (guest) => {
        await guest.start();
        for (let i = 0; i < 50; i++) await echo(guest, i % 2);
        assert.ok(guest.iommu.misses < 10, `${guest.iommu.misses} misses`);
      },
    );
  });

  test(`${name}: a buffer crosses entries, whose pages are anywhere, in two regions`, async () => {
    const regions = [{ size: 1 << 20 }, { size: 1 << 20 }];
    await withIommu({ packed, guest: { regions } }, async (guest) => {
      await guest.start();
      const { ram, iommu } = guest;
      const pages = [0, 1, 0, 1].map((region) =>
        ram.allocate(pageSize, pageSize, ram.regions[region])
      );
      pages.forEach((page, i) => {
        iommu.mapAt(base + BigInt(i * pageSize), page, pageSize);
        ram.bytes(page, pageSize).fill(i + 1);
      });
      const written = await guest.queues[0].submitChain(
        chain([base + 4000n, 200], [base + 8100n, 200]),
      );
      assert.equal(written, 200);
      const second = ram.read(pages[2], pageSize);
      assert.deepEqual([...ram.read(pages[1] + 4004n, 92)], [
        ...new Array(92).fill(1),
      ]);
      assert.deepEqual([...second.subarray(0, 4)], [1, 1, 1, 1]);
      assert.deepEqual([...second.subarray(4, 108)], new Array(104).fill(2));
      assert.equal(second[108], 3);
    });
  });

  test(`${name}: a missing page of one queue does not stop another; what came before it is done`, async () => {
    await withIommu({ packed }, async (guest) => {
      await guest.start();
      for (let i = 0; i < 2; i++) await echo(guest, i);
      const { ram, iommu } = guest;
      const missed = new Events<bigint>();
      iommu.onMiss = ({ iova }) => {
        if (pageOf(iova) !== base) return;
        missed.push(iova);
        return 0n;
      };
      const page = ram.allocate(pageSize, pageSize);
      const output = iommu.map(ram.allocate(64), 64, "write");
      ram.bytes(page, 4).set([1, 2, 3, 4]);
      const before = echo(guest);
      const waiting = guest.queues[0].submitChain(
        chain([base + 8n, 4], [output, 64]),
      );
      const behind = echo(guest);
      assert.equal(await missed.next(), base + 8n);
      await within(before, "the request before it");
      await others(guest);
      assert.ok(guest.queues[0].inFlight >= 2);
      // The guest maps it, and the front-end says so unasked.
      iommu.mapAt(base, page, pageSize, "read");
      assert.ok(await iommu.update(base));
      assert.equal(await within(waiting, "the request"), 4);
      await within(behind, "the request behind it");
    });
  });

  test(`${name}: readable descriptors need R and writable ones W; access-fail says so, and other queues go on`, async () => {
    await withIommu(
      { packed, errorsExpected: true },
      async (guest, { errors }) => {
        await guest.start();
        for (let i = 0; i < 2; i++) await echo(guest, i);
        const { ram, iommu } = guest;
        const page = ram.allocate(pageSize, pageSize);
        // A front-end whose answer to a miss is an update that permits too little.
        iommu.onMiss = async ({ iova }) => await iommu.update(iova) ? 0n : 1n;
        for (
          const [given, needed] of [["read", "write"], [
            "write",
            "read",
          ]] as const
        ) {
          iommu.mapAt(base, page, pageSize, given);
          const failureCount = iommu.failures.length;
          const waiting = guest.queues[0].submitChain(
            chain([base, 4], [base, 4]),
          );
          const error = await errors.next();
          assert.match(error.message, new RegExp(`permits no ${needed}$`));
          await others(guest);
          await eventually(
            () => iommu.failures.length > failureCount,
            "access-fail",
          );
          const failure = iommu.failures[failureCount];
          assert.equal(failure.type, IotlbType.ACCESS_FAIL);
          assert.equal(failure.iova, base);
          assert.equal(
            failure.permission,
            needed === "read" ? IotlbPermission.READ : IotlbPermission.WRITE,
          );
          // The guest thinks better of it.
          iommu.mapAt(base, page, pageSize, "readWrite");
          await iommu.update(base);
          assert.equal(await within(waiting, "the request"), 4);
          await iommu.unmapAt(base, pageSize);
        }
      },
    );
  });

  test(`${name}: row 15: a ring page invalidated while the queue runs is not touched; it goes on after the update`, async () => {
    const { handler, requests } = held();
    await withIommu(
      { packed, device: () => requestOps(handler) },
      async (guest) => {
        const { iommu } = guest;
        await guest.start();
        const send = (index: number) => {
          const done = echo(guest, index);
          done.catch(() => {});
          return done;
        };
        for (const part of ["descriptor", "available", "used"] as const) {
          const first = send(0);
          const request = await requests.next();
          const area = pageOf(guest.queues[0].deviceAddresses[part]);
          const page = iommu.lookUp(area)!;
          await iommu.unmapAt(area, pageSize);
          const second = send(0);
          const before = ringBytes(guest, 0);
          request.complete();
          guest.queues[0].kick();
          // Other queues have their turns, this one none.
          for (let i = 0; i < 3; i++) {
            const done = send(1);
            (await requests.next()).complete();
            await within(done, "a request of the other queue");
          }
          assert.deepEqual(ringBytes(guest, 0), before);
          assert.deepEqual(requests.pending, []);
          iommu.mapAt(area, page.gpa, pageSize);
          await iommu.update(area);
          await within(first, "what was completed meanwhile");
          (await requests.next()).complete();
          await within(second, "what was sent meanwhile");
        }
      },
    );
  });

  test(`${name}: a stop waits for no translation: not a missing page's, not the ring's own`, async () => {
    const { handler, requests } = held();
    await withIommu(
      { packed, device: () => requestOps(handler) },
      async (guest, { recording }) => {
        const { iommu } = guest;
        await guest.start();
        const first = echo(guest);
        (await requests.next()).complete();
        await first;
        iommu.onMiss = () => 0n;
        const missing = guest.queues[0].submitChain(
          chain([base, 4], [base, 4]),
        );
        missing.catch(() => {});
        await guest.connection.barrier();
        const position = await within(guest.stopQueue(0), "the stop");
        // The chain that missed is still the driver's.
        iommu.onMiss = undefined;
        const page = guest.ram.allocate(pageSize, pageSize);
        iommu.mapAt(base, page, pageSize);
        await guest.startQueue(0, { base: position });
        (await requests.next()).complete();
        assert.equal(await within(missing, "the request"), 4);
        // The other queue has lost its ring with a request completed.
        const lost = echo(guest, 1);
        lost.catch(() => {});
        const request = await requests.next();
        const area = pageOf(guest.queues[1].deviceAddresses.descriptor);
        await iommu.unmapAt(area, pageSize);
        const used = pageOf(guest.queues[1].deviceAddresses.used);
        await iommu.unmapAt(used, pageSize);
        iommu.onMiss = () => 0n;
        const stopped = guest.stopQueue(1);
        request.complete();
        await within(stopped, "the stop of a ring that is not mapped");
        assert.equal(recording.count("queueStop 1"), 1);
      },
    );
  });

  test(`${name}: a connection that closes with misses out leaves nothing behind`, async () => {
    await withIommu({ packed }, async (guest, { recording }) => {
      await guest.start();
      await echo(guest);
      const missed = new Events<bigint>();
      guest.iommu.onMiss = ({ iova }) => {
        missed.push(iova);
        return new Promise(() => {});
      };
      guest.queues[0].submitChain(chain([base, 4], [base, 4])).catch(() => {});
      await missed.next();
      guest.connection.close();
      await recording.completed("deviceDestroy");
    });
  });

  test(`${name}: while its page is missing the ring of a queue is not started, and others are`, async () => {
    await withIommu({ packed }, async (guest, { recording }) => {
      const area = pageOf(guest.queues[0].deviceAddresses.used);
      const missed = new Events<bigint>();
      guest.iommu.onMiss = ({ iova }) => {
        if (pageOf(iova) !== area) return;
        missed.push(iova);
        return 0n;
      };
      await guest.start();
      await missed.next();
      await others(guest);
      assert.equal(recording.count("queueStart 0"), 0);
      await guest.iommu.update(area);
      await within(echo(guest), "a request");
    });
  });
}

test("a ring over several entries starts where they are one place, and fails where not", async () => {
  const guestOptions = {
    queueCount: 1,
    queueSize: 1024,
    regions: [{ size: 1 << 20 }],
  };
  await withIommu(
    { guest: guestOptions, errorsExpected: true },
    async (guest, { recording, errors }) => {
      // 16 KiB of descriptors: four pages, told one by one.
      await guest.start();
      await echo(guest);
      await guest.stopQueue(0);
      const area = pageOf(guest.queues[0].deviceAddresses.descriptor);
      const elsewhere = guest.ram.allocate(pageSize, pageSize);
      guest.iommu.mapAt(area + 4096n, elsewhere, pageSize);
      await guest.startQueue(0, { base: 1 });
      assert.match(
        (await errors.next()).message,
        /not inside one memory region/,
      );
      assert.equal(recording.count("queueStart 0"), 1);
    },
  );
});

test("an update that leads out of the memory waits for the region that brings it", async () => {
  await withIommu({ errorsExpected: true }, async (guest) => {
    await guest.start();
    for (let i = 0; i < 2; i++) await echo(guest, i);
    const region = guest.ram.addRegion({ size: 1 << 20 });
    guest.iommu.mapAt(base, region.gpa, pageSize);
    const answered = new Events<bigint>();
    guest.iommu.onMiss = async ({ iova }) => {
      if (pageOf(iova) !== base) return;
      await guest.iommu.update(iova);
      answered.push(iova);
      return 0n;
    };
    const waiting = guest.queues[0].submitChain(
      chain([base, 4], [base + 8n, 4]),
    );
    // Its two buffers are asked for, and not again: the front-end has answered.
    assert.deepEqual([await answered.next(), await answered.next()], [
      base,
      base + 8n,
    ]);
    await others(guest);
    guest.queues[0].kick();
    await others(guest);
    assert.deepEqual(answered.pending, []);
    await guest.sendMemory();
    assert.equal(await within(waiting, "the request"), 4);
  });
});
