// A device for tests of Workers: each request is a command in words, answered
// in words. The same module serves on the event loop.
import process from "node:process";
import { threadId } from "node:worker_threads";
import type { Access } from "../../ffi/iotlb.ts";
import {
  type Device,
  type Queue,
  type Request,
  type TargetOps,
  Vhost2Error,
  Virtqueue,
} from "../../mod.ts";

/** What the tests set. */
export interface CommandOptions {
  /** Words (i32): what the tests watch and steer. */
  readonly words: SharedArrayBuffer;
  readonly stopTimeoutMs?: number;
  /** Completions count as ending by events: the Worker may block. */
  readonly isNative?: boolean;
}

/** Indices of the words. */
export const Word = {
  /** Requests that are being held. */
  held: 0,
  /** Set by a test: so many starts, or stops, fail. */
  failStarts: 1,
  failStops: 2,
  /** While not 0, starts are not done. */
  holdStarts: 3,
  starts: 4,
  stops: 5,
  aborted: 6,
  /** While not 0, "busy" lets nothing else happen. */
  busy: 7,
  /** Translations that were refused because something stops. */
  refused: 8,
  byteSize: 64,
} as const;

const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

function takeFailure(words: Int32Array, word: number, op: string): void {
  if (Atomics.load(words, word) === 0) return;
  Atomics.sub(words, word, 1);
  throw new Error(`${op} was told to fail`);
}

/** The device. */
export function commandDevice(device: Device, options: unknown): TargetOps {
  const { words: shared, stopTimeoutMs, isNative } = options as CommandOptions;
  const words = new Int32Array(shared);
  const running = new Map<Queue, Virtqueue>();
  let kept: Uint8Array | null = null;
  device.signal.addEventListener("abort", () => {
    Atomics.add(words, Word.aborted, 1);
  });

  const answer = async (queue: Queue, request: Request): Promise<void> => {
    const end = (text: string) => {
      request.complete(request.write(new TextEncoder().encode(text)));
    };
    const text = new TextDecoder().decode(request.read());
    const [command] = text.split(" ", 1);
    const rest = text.slice(command.length + 1);
    switch (command) {
      case "echo":
        return end(rest);
      case "thread":
        return end(String(threadId));
      case "later":
        await pause(5);
        return end(rest);
      case "hold":
        Atomics.add(words, Word.held, 1);
        return;
      case "keep":
        kept = device.memory.at(-1)!.view;
        kept.fill(0x66, 0, 16);
        return end(String(kept.length));
      case "kept":
        // 0: emptied; where a runtime cannot, what is seen is zeros.
        return end(String(kept!.length === 0 || kept![0] === 0 ? 0 : 1));
      case "translate": {
        // "translate 0x5000 read": the first bytes there, or why not.
        const [iova, access, isOfDevice] = rest.split(" ");
        Atomics.add(words, Word.held, 1);
        const translated = await device.translateAsync(
          BigInt(iova),
          8,
          access as Access,
          isOfDevice ? undefined : queue,
        ).catch((error) => error);
        Atomics.sub(words, Word.held, 1);
        if (!(translated instanceof Uint8Array)) {
          if (translated.code === "CLOSED") Atomics.add(words, Word.refused, 1);
          return end(translated.code);
        }
        if (access !== "read") translated.fill(0x77);
        return end(translated.join());
      }
      case "configChanged":
        device.configChanged();
        return end("told");
      case "report":
        device.report(new Vhost2Error("RING", `reported ${rest}`));
        return end("reported");
      case "shared":
        return end(String(Atomics.add(new Int32Array(device.shared), 0, 1)));
      case "features":
        return end(String(device.features));
      case "queues":
        return end(device.queues.map(({ index }) => index).sort().join());
      case "fail":
        return queue.fail(rest);
      case "crash":
        setTimeout(() => {
          throw new RangeError("nobody catches this");
        });
        return;
      case "exit":
        process.exit(7);
        break;
      case "busy":
        Atomics.add(words, Word.held, 1);
        while (Atomics.load(words, Word.busy) !== 0);
        return;
    }
  };

  return {
    async queueStart(queue) {
      takeFailure(words, Word.failStarts, "queueStart");
      while (Atomics.load(words, Word.holdStarts) !== 0) await pause(1);
      const virtqueue: Virtqueue = new Virtqueue(queue, {
        stopTimeoutMs,
        endsByEvents: isNative ? () => true : undefined,
        process(count) {
          for (const request of virtqueue.requests(count)) {
            const text = new TextDecoder().decode(request.read());
            if (text === "throw") throw new TypeError("thrown on purpose");
            answer(queue, request);
          }
        },
      });
      running.set(queue, virtqueue);
      Atomics.add(words, Word.starts, 1);
    },
    async queueStop(queue) {
      takeFailure(words, Word.failStops, "queueStop");
      await running.get(queue)?.stop();
      running.delete(queue);
      Atomics.add(words, Word.stops, 1);
    },
    queueKick(queue) {
      running.get(queue)?.kick();
    },
    getConfig: () => new Uint8Array(8),
  };
}

/** No factory. */
export const notAFactory = 42;
