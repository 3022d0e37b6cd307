/**
 * File I/O straight between files and guest memory: the core's engine
 * (io_uring, or threads where that is refused), submitted and reaped in
 * batches from TypeScript.
 *
 * One engine serves an isolate, from the first `acquire` to the last
 * `release`. What does not fit into it waits here, in order.
 *
 * @module
 */

import { constants, layouts } from "./abi.gen.ts";
import { blocking } from "./blocking.ts";
import { core } from "./core.ts";
import { check } from "./errors.ts";
import { eventLoop, type Watch } from "./event_loop.ts";
import { Held, noteHeld, noteReleased } from "./held.ts";

/** What to do with the file. */
export const FileOperation = {
  read: constants.ioRead,
  write: constants.ioWrite,
  flush: constants.ioFlush,
  discard: constants.ioDiscard,
  writeZeroes: constants.ioWriteZeroes,
} as const;

/** How to do it. */
export const FileFlag = {
  /** Write zeroes: a hole will do. */
  unmap: constants.flagIoUnmap,
  /** Not finished before it would survive a loss of power. */
  dsync: constants.flagIoDsync,
  /** By a native thread that may block. */
  threaded: constants.flagIoThreaded,
  /** At once, in this thread, which may block: for Workers. */
  inline: constants.flagIoInline,
  /**
   * A write: at once, in this thread, as long as the file's writes do not wait
   * for anything; otherwise by a native thread. For event loops.
   */
  prompt: constants.flagIoPrompt,
} as const;

/** Who is told how a request ended. */
export interface FileClient {
  /**
   * What offset and length, and of the transfers addresses too, must be
   * multiples of in the file (O_DIRECT): guest memory that is not is copied.
   * 1 for no such rule.
   */
  readonly alignment: number;
  /** `result` is 0 or a negative errno. */
  finished(cookie: number, result: number): void;
}

/** Requests with the kernel at once. */
const entries = 512;
const stageCapacity = 256;
const requestWords = layouts.IoRequest.byteSize / 4;
const segmentWords = layouts.Segment.byteSize / 4;
const completionWords = layouts.IoCompletion.byteSize / 4;
const reapCapacity = 128;
const twoTo32 = 2 ** 32;

const word = {
  operation: layouts.IoRequest.operation / 4,
  file: layouts.IoRequest.file / 4,
  offset: layouts.IoRequest.offset / 4,
  length: layouts.IoRequest.length / 4,
  segmentFirst: layouts.IoRequest.segmentFirst / 4,
  segmentCount: layouts.IoRequest.segmentCount / 4,
  tag: layouts.IoRequest.tag / 4,
  flags: layouts.IoRequest.flags / 4,
  memory: layouts.IoRequest.memory / 4,
  alignment: layouts.IoRequest.alignment / 4,
} as const;

/** Rounds of reaping before the event loop gets its turn. */
const roundsPerTurn = 8;
const noSegments = new Uint32Array(0);

/** A request that found the engine full, with segments of its own. */
interface Waiting {
  readonly request: Uint32Array<ArrayBuffer>;
  readonly segments: Uint32Array<ArrayBuffer>;
}

let shared: FileEngine | undefined;

/** The engine of this isolate. */
export class FileEngine {
  readonly #io: number;
  readonly #watch: Watch;
  #users = 0;
  readonly #requests = new Uint32Array(stageCapacity * requestWords);
  #staged = 0;
  /** Of which batch the staged requests' segments are. */
  #segments: Uint32Array<ArrayBuffer> = noSegments;
  readonly #waiting: Waiting[] = [];
  readonly #completions = new Int32Array(reapCapacity * completionWords);
  #isReaping = false;
  /** A client has submitted while it was told of an end. */
  #isReapDue = false;
  // By tag; a tag is in use from `stage` to `finished`.
  readonly #clients: (FileClient | undefined)[] = [];
  readonly #cookies: number[] = [];
  readonly #freeTags: number[] = [];

  private constructor(useThreads: boolean) {
    this.#io = check(
      core.ioCreate(entries, useThreads ? 1 : 0),
      "Cannot make the engine for file I/O",
    );
    try {
      const event = check(core.ioEvent(this.#io), "Cannot wait for file I/O");
      this.#watch = eventLoop.watch(event, () => this.reap());
    } catch (error) {
      core.ioDestroy(this.#io);
      throw error;
    }
    noteHeld(Held.engine, this.#io);
    for (let tag = entries - 1; tag >= 0; tag--) {
      this.#clients[tag] = undefined;
      this.#cookies[tag] = 0;
      this.#freeTags.push(tag);
    }
  }

  /**
   * The isolate's engine; it lives until `release` was called as often.
   *
   * @param useThreads threads even where there is io_uring; the first decides
   */
  static acquire(useThreads = false): FileEngine {
    shared ??= new FileEngine(useThreads);
    shared.#users++;
    return shared;
  }

  /** Takes one `acquire` back. Its requests have finished by then. */
  release(): void {
    if (--this.#users > 0) return;
    if (shared === this) shared = undefined;
    this.#watch.close();
    noteReleased(Held.engine, this.#io);
    core.ioDestroy(this.#io);
  }

  /** "io_uring", or "threads" where that is refused. */
  get kind(): "io_uring" | "threads" {
    return core.ioKind(this.#io) === 1 ? "io_uring" : "threads";
  }

  /** Whether requests wait because the core's engine has all it can take. */
  get isFull(): boolean {
    return this.#waiting.length > 0;
  }

  /** Requests not finished. */
  get inFlight(): number {
    return this.#clients.length - this.#freeTags.length;
  }

  /**
   * Puts a request into the batch that `submit` hands over.
   *
   * @param client told of the end, with `cookie`
   * @param operation one of `FileOperation`
   * @param file descriptor, open until the end
   * @param offset bytes
   * @param length bytes, for discard and write zeroes
   * @param flags of `FileFlag`
   * @param memory handle of the guest memory in which the segments are
   * @param segments the batch's segments; valid until `submit`
   * @param segmentFirst index of the request's first
   * @param segmentCount how many it has
   */
  stage(
    client: FileClient,
    cookie: number,
    operation: number,
    file: number,
    offset: number,
    length: number,
    flags: number,
    memory: number,
    segments: Uint32Array<ArrayBuffer>,
    segmentFirst: number,
    segmentCount: number,
  ): void {
    if (
      this.#staged === stageCapacity ||
      (this.#staged > 0 && this.#segments !== segments)
    ) this.submit();
    this.#segments = segments;
    const tag = this.#freeTags.pop() ?? this.#clients.length;
    this.#clients[tag] = client;
    this.#cookies[tag] = cookie;
    const requests = this.#requests;
    const at = this.#staged++ * requestWords;
    requests[at + word.operation] = operation;
    requests[at + word.file] = file;
    requests[at + word.offset] = offset;
    requests[at + word.offset + 1] = offset / twoTo32;
    requests[at + word.length] = length;
    requests[at + word.length + 1] = length / twoTo32;
    requests[at + word.segmentFirst] = segmentFirst;
    requests[at + word.segmentCount] = segmentCount;
    requests[at + word.tag] = tag;
    requests[at + word.flags] = flags;
    requests[at + word.memory] = memory;
    requests[at + word.alignment] = client.alignment;
  }

  /** Hands over all that was staged, and takes what has finished already. */
  submit(): void {
    const count = this.#staged;
    if (count === 0) return;
    this.#staged = 0;
    const requests = this.#requests;
    const segments = this.#segments;
    let taken = 0;
    if (this.#waiting.length === 0) {
      taken = this.#hand(requests, count, segments);
    }
    for (; taken < count; taken++) this.#keep(taken, segments);
    this.reap();
  }

  /** How many of the requests the core took. */
  #hand(
    requests: Uint32Array<ArrayBuffer>,
    count: number,
    segments: Uint32Array<ArrayBuffer>,
  ): number {
    return check(
      core.ioSubmit(
        this.#io,
        requests,
        count,
        segments,
        segments.length / segmentWords,
      ),
      "Cannot submit file I/O",
    );
  }

  /** The batch is used again; a request that has to wait takes its own along. */
  #keep(index: number, segments: Uint32Array<ArrayBuffer>): void {
    const at = index * requestWords;
    const request = this.#requests.slice(at, at + requestWords);
    const first = request[word.segmentFirst] * segmentWords;
    const count = request[word.segmentCount] * segmentWords;
    request[word.segmentFirst] = 0;
    this.#waiting.push({
      request,
      segments: count === 0 ? noSegments : segments.slice(first, first + count),
    });
  }

  #resubmit(): boolean {
    let count = 0;
    for (const { request, segments } of this.#waiting) {
      if (this.#hand(request, 1, segments) === 0) break;
      count++;
    }
    this.#waiting.splice(0, count);
    return count > 0;
  }

  /** Tells the clients of all that has finished. Never waits. */
  reap(): void {
    this.#isReapDue = true;
    if (this.#isReaping) return;
    this.#isReaping = true;
    const completions = this.#completions;
    try {
      for (let round = 0; round < roundsPerTurn; round++) {
        this.#isReapDue = false;
        const count = core.ioReap(this.#io, completions, reapCapacity);
        for (let i = 0; i < count; i++) {
          const tag = completions[i * completionWords];
          const client = this.#clients[tag];
          this.#clients[tag] = undefined;
          this.#freeTags.push(tag);
          client?.finished(
            this.#cookies[tag],
            completions[i * completionWords + 1],
          );
        }
        const isMoreDue = this.#waiting.length > 0 && this.#resubmit();
        if (count < reapCapacity && !isMoreDue && !this.#isReapDue) return;
      }
      blocking.setImmediate(() => this.reap());
    } finally {
      this.#isReaping = false;
    }
  }
}
