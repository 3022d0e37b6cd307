/**
 * The control queue (virtio 1.3, 5.1.6.5), for front-ends that do not answer
 * it themselves, as QEMU does.
 *
 *   readable: class u8, command u8, then the command's data
 *   writable: ack u8
 *
 * @module
 */

import {
  ControlAnswer,
  ControlClass,
  ControlCommand,
} from "../../protocol/net.ts";
import {
  RequestWord,
  type StartedQueue,
  Virtqueue,
} from "../../virtqueue/mod.ts";

const headerBytes = 2;
/** Data of the longest command that is known. */
const dataBytes = 2;

/** What the commands do. */
export interface ControlClient {
  /** The guest has announced itself. False: it was not asked to. */
  announced(): boolean;
  /** The guest uses queue pairs 0 to `count`. False: there are not so many. */
  usePairs(count: number): boolean;
}

/** The control queue of a front-end. */
export class ControlQueue {
  readonly #virtqueue: Virtqueue;
  readonly #client: ControlClient;

  constructor(queue: StartedQueue, client: ControlClient) {
    this.#client = client;
    this.#virtqueue = new Virtqueue(queue, {
      // The data of known commands come along in the same copy.
      headerBytes: headerBytes + dataBytes,
      trailerBytes: 1,
      maxBatch: 16,
      pollMicroseconds: 0,
      process: (count) => this.#process(count),
    });
  }

  kick(): void {
    this.#virtqueue.kick();
  }

  stop(): Promise<void> {
    return this.#virtqueue.stop();
  }

  #process(count: number): void {
    const { batch, queue } = this.#virtqueue;
    const { words, stride } = batch;
    for (let i = 0; i < count; i++) {
      const at = i * stride;
      const head = words[at + RequestWord.head];
      // Without a byte for the answer it goes back as it came.
      if (words[at + RequestWord.trailerLength] === 0) {
        this.#virtqueue.complete(head, 0);
        continue;
      }
      const answer = this.#command(
        batch.header(i),
        words[at + RequestWord.readableBytes],
      );
      const view = queue.memory.views[words[at + RequestWord.trailerView]];
      if (view !== undefined) {
        view[words[at + RequestWord.trailerOffset]] = answer
          ? ControlAnswer.OK
          : ControlAnswer.ERR;
      }
      this.#virtqueue.complete(head, 1);
    }
  }

  /** `rest`: bytes beyond the longest command. */
  #command(bytes: Uint8Array, rest: number): boolean {
    if (bytes.length < headerBytes || rest > 0) return false;
    const size = bytes.length - headerBytes;
    const [group, command] = bytes;
    switch (group) {
      case ControlClass.ANNOUNCE:
        return command === ControlCommand.ANNOUNCE_ACK && size === 0 &&
          this.#client.announced();
      case ControlClass.MQ:
        return command === ControlCommand.MQ_VQ_PAIRS_SET && size === 2 &&
          this.#client.usePairs(bytes[2] | bytes[3] << 8);
      default:
        return false;
    }
  }
}
