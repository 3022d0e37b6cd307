// A network card of several queue pairs through PCI-vDPA: the guest knows its
// data queues only, and the card is told by us how many of them are in use.
import assert from "node:assert/strict";
import { NetFeature } from "../../protocol/net.ts";
import { featureMask } from "../../protocol/features.ts";
import { test } from "../harness.ts";
import type { VirtioPciModel } from "../support/virtio_pci_model.ts";
import { eventually } from "../support/wait.ts";
import {
  allFeatures,
  answer,
  Bit,
  exercise,
  exerciseQueue,
  openVdpaGuest,
  servingVdpa,
  type VdpaOptions,
} from "./vdpa_served.ts";

const MQ = featureMask(NetFeature.MQ);
const CTRL_VQ = featureMask(NetFeature.CTRL_VQ);
/** A command for queue pairs, as bytes (VIRTIO 1.3 section 5.1.6.5.6). */
const pairs = (count: number) => `4,0 ${count},0`;

/** struct virtio_net_config up to max_virtqueue_pairs. */
function configOf(maxPairs: number): Uint8Array {
  const bytes = new Uint8Array(12);
  new DataView(bytes.buffer).setUint16(8, maxPairs, true);
  return bytes;
}

/** Two pairs, and the control queue behind them. */
const card: VdpaOptions & { features: bigint } = {
  deviceId: 0x1041,
  queueCount: 5,
  deviceConfig: configOf(2),
  features: allFeatures | MQ | CTRL_VQ,
};
const control = 4;

/** Answers each command; what they were. */
function commandsOf(model: VirtioPciModel, reply = 0): string[] {
  const commands: string[] = [];
  model.onRequest = (queue, request) => {
    if (queue !== control) return answer(queue, request);
    const bytes = request.read();
    commands.push(`${bytes.subarray(0, 2)} ${bytes.subarray(2)}`);
    request.complete(request.write(Uint8Array.of(reply)));
  };
  return commands;
}

const kinds: Record<string, VdpaOptions & { packed?: boolean }> = {
  "with RING_RESET": card,
  "whose pairs come with MQ": { ...card, hidesPairs: true },
  "without RING_RESET": { ...card, features: card.features & ~Bit.RING_RESET },
  "with packed rings": {
    ...card,
    target: { features: (1n << 64n) - 1n },
    packed: true,
  },
  "without vectors": { ...card, vectorCount: 0 },
};

for (const [name, options] of Object.entries(kinds)) {
  test(`a card is told how many pairs are in use, ${name}`, () =>
    servingVdpa(options, async (served) => {
      const commands = commandsOf(served.model);
      const guest = await openVdpaGuest(served, {
        queueCount: 4,
        packed: options.packed,
      });
      assert.equal(guest.maxQueueCount, 4, "its control queue stays");
      assert.ok((guest.features & MQ) !== 0n);
      assert.equal(guest.features & CTRL_VQ, 0n);
      await exercise(guest, 5);
      assert.ok((served.model.acked & CTRL_VQ) !== 0n);
      await eventually(() => commands.at(-1) === pairs(2), "two pairs");
      // As a monitor does it that is told of one pair by its guest.
      for (const index of [2, 3]) await guest.stopQueue(index);
      for (const index of [0, 1]) await exerciseQueue(guest, index, 5);
      await eventually(
        () => !served.model.queues[2].isEnabled,
        "the card has lost the second pair",
      );
      // A card that was reset has one pair, unless it is told.
      const isReset = (served.model.acked & Bit.RING_RESET) === 0n;
      if (!isReset) assert.equal(commands.at(-1), pairs(1));
      const before = commands.length;
      for (const index of [2, 3]) await guest.startQueue(index);
      await exercise(guest, 5);
      await eventually(() => commands.length > before, "told again");
      assert.equal(commands.at(-1), pairs(2));
      await guest.close();
    }));
}

test("what a card's features are by number means something else of a disk", () =>
  servingVdpa({ features: card.features }, async (served) => {
    const guest = await openVdpaGuest(served);
    await exercise(guest, 5);
    assert.equal(served.model.acked & (MQ | CTRL_VQ), MQ | CTRL_VQ);
    await guest.close();
  }));

test("a guest that does not know of pairs has the first one", () =>
  servingVdpa(card, async (served) => {
    const commands = commandsOf(served.model);
    const guest = await openVdpaGuest(served, { features: ~MQ });
    await exercise(guest, 5);
    assert.equal(served.model.acked & (MQ | CTRL_VQ), 0n);
    assert.ok(!served.model.queues[control].isEnabled);
    assert.deepEqual(commands, []);
    await guest.close();
  }));

const senseless: Record<string, VdpaOptions> = {
  "has no control queue": { ...card, features: card.features & ~CTRL_VQ },
  "says that it has no pair": { ...card, deviceConfig: configOf(0) },
  "does not say how many it has": {
    ...card,
    deviceConfig: new Uint8Array(8),
  },
  "says that it has 65535 pairs": { ...card, deviceConfig: configOf(0xffff) },
};
for (const [name, options] of Object.entries(senseless)) {
  test(`a card with MQ that ${name} has one pair for a guest`, () =>
    servingVdpa(options, async (served) => {
      const guest = await openVdpaGuest(served);
      assert.equal(guest.maxQueueCount, 2);
      assert.equal(guest.features & MQ, 0n);
      await exercise(guest, 5);
      await guest.close();
    }));
}

test("a card that says that it has more pairs than queues works with the first one", () =>
  servingVdpa(
    { ...card, deviceConfig: configOf(9), errorsExpected: true },
    async (served) => {
      const guest = await openVdpaGuest(served, { queueCount: 2 });
      const error = await served.errors.next();
      assert.match(
        error.message,
        /Cannot use queue 18 of PCI device .*: it has none of that number/,
      );
      await guest.close();
      const other = await openVdpaGuest(served, { features: ~MQ });
      await exercise(other, 5);
      await other.close();
    },
  ));

const failing: Record<
  string,
  { serve(model: VirtioPciModel): void; told: RegExp }
> = {
  refuses: {
    serve: (model) => void commandsOf(model, 1),
    told: /^Cannot use 2 queue pairs of PCI device .*: it answers 1$/,
  },
  "does not answer": {
    serve: (model) => {
      model.onRequest = (queue, request) => {
        if (queue !== control) answer(queue, request);
      };
    },
    told: /^Cannot use 2 queue pairs of PCI device .*not answered in 1000 ms$/,
  },
  "answers without a word": {
    serve: (model) => {
      model.onRequest = (queue, request) => {
        if (queue === control) request.complete(0);
        else answer(queue, request);
      };
    },
    told: /^Cannot use 2 queue pairs of PCI device .*: it answers 255$/,
  },
};
for (const [name, { serve, told }] of Object.entries(failing)) {
  test(`a card that ${name} when it is told of its pairs is reported, and goes on`, () =>
    servingVdpa({
      ...card,
      features: card.features & ~Bit.RING_RESET,
      errorsExpected: true,
    }, async (served) => {
      serve(served.model);
      const guest = await openVdpaGuest(served, { queueCount: 4 });
      const error = await served.errors.next();
      assert.match(error.message, told);
      await exercise(guest, 5);
      await guest.close();
      await served.nobody();
      assert.deepEqual(served.errors.pending, []);
    }));
}

test("a card that does not answer is not told again before it is reset", () =>
  servingVdpa({ ...card, errorsExpected: true }, async (served) => {
    failing["does not answer"].serve(served.model);
    const guest = await openVdpaGuest(served, { queueCount: 4 });
    assert.match((await served.errors.next()).message, /has not answered/);
    for (const index of [2, 3]) await guest.stopQueue(index);
    for (const index of [2, 3]) await guest.startQueue(index);
    await exercise(guest, 5);
    await guest.reset();
    const commands = commandsOf(served.model);
    await guest.start();
    await exercise(guest, 5);
    await eventually(() => commands.length > 0, "the command");
    assert.deepEqual(commands, [pairs(2)]);
    await guest.close();
    await served.nobody();
    assert.deepEqual(served.errors.pending, []);
  }));
