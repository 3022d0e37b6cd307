/**
 * A disk in a file or on a block device: data goes straight between guest
 * memory and the file, by the core's engine.
 *
 * @module
 */

import { constants, layouts } from "../../../ffi/abi.gen.ts";
import { core } from "../../../ffi/core.ts";
import { check, Errno, errnoName, Vhost2Error } from "../../../ffi/errors.ts";
import {
  type FileClient,
  FileEngine,
  FileFlag,
  FileOperation,
} from "../../../ffi/file_engine.ts";
import { Held, noteHeld, noteReleased } from "../../../ffi/held.ts";
import type {
  Backing,
  BackingClient,
  BackingQueue,
  FileUse,
} from "./backing.ts";
import { Status } from "./backing.ts";

/** Flags of `file_open`. */
const openForWriting = 1;
const openDirect = 4;

const operationNames: Record<number, string> = {
  [FileOperation.read]: "read",
  [FileOperation.write]: "write",
  [FileOperation.flush]: "flush",
  [FileOperation.discard]: "discard from",
  [FileOperation.writeZeroes]: "write zeroes to",
};

/** What the queues share. */
interface OpenFile extends FileUse {
  readonly path: string;
  readonly fd: number;
  /** Requests with the engine, of all queues. */
  inFlight: number;
  /** Called when there are none any more. */
  drained: (() => void) | undefined;
}

class FileQueue implements BackingQueue, FileClient {
  // What the page cache has is copied while the engine submits.
  readonly movesData = true;
  readonly alignment: number;
  readonly endsByEvents = true;
  readonly #client: BackingClient;
  readonly #file: OpenFile;
  readonly #engine = FileEngine.acquire();
  readonly #memory: number;
  readonly #segments: Uint32Array<ArrayBuffer>;
  /** By head: what was asked, for the message should it fail. */
  readonly #operations: Uint8Array<ArrayBuffer>;
  /** Failures told already: a guest must not fill the user's log. */
  readonly #reported = new Set<string>();
  #inFlight = 0;
  #isClosed = false;

  constructor(client: BackingClient, file: OpenFile) {
    this.#client = client;
    this.#file = file;
    this.alignment = file.alignment;
    this.#memory = client.queue.memory.handle;
    this.#segments = client.batch.segmentArea;
    this.#operations = new Uint8Array(client.queue.size);
  }

  #stage(
    head: number,
    operation: number,
    offset: number,
    length: number,
    flags: number,
    segmentFirst: number,
    segmentCount: number,
  ): void {
    this.#inFlight++;
    this.#file.inFlight++;
    this.#operations[head] = operation;
    this.#engine.stage(
      this,
      head,
      operation,
      this.#file.fd,
      offset,
      length,
      flags,
      this.#memory,
      this.#segments,
      segmentFirst,
      segmentCount,
    );
  }

  read(
    head: number,
    offset: number,
    length: number,
    segmentFirst: number,
    segmentCount: number,
  ): void {
    const operation = FileOperation.read;
    this.#stage(head, operation, offset, length, 0, segmentFirst, segmentCount);
  }

  write(
    head: number,
    offset: number,
    length: number,
    segmentFirst: number,
    segmentCount: number,
    isDurable: boolean,
  ): void {
    this.#stage(
      head,
      FileOperation.write,
      offset,
      length,
      isDurable ? this.#file.durableWriteFlags : this.#file.writeFlags,
      segmentFirst,
      segmentCount,
    );
  }

  flush(head: number): void {
    this.#stage(head, FileOperation.flush, 0, 0, 0, 0, 0);
  }

  discard(head: number, offset: number, length: number): void {
    this.#stage(head, FileOperation.discard, offset, length, 0, 0, 0);
  }

  writeZeroes(
    head: number,
    offset: number,
    length: number,
    mayUnmap: boolean,
    isDurable: boolean,
  ): void {
    const flags = (mayUnmap ? FileFlag.unmap : 0) |
      (isDurable ? FileFlag.dsync : 0);
    this.#stage(head, FileOperation.writeZeroes, offset, length, flags, 0, 0);
  }

  get isCongested(): boolean {
    return this.#engine.isFull;
  }

  submit(): void {
    this.#engine.submit();
  }

  finished(head: number, result: number): void {
    // Guest memory that went away is the session's to report.
    if (result < 0 && result !== -Errno.EFAULT) this.#report(head, -result);
    this.#client.finish(head, result < 0 ? Status.IOERR : Status.OK);
    this.#inFlight--;
    if (this.#isClosed && this.#inFlight === 0) this.#engine.release();
    if (--this.#file.inFlight === 0) this.#file.drained?.();
  }

  #report(head: number, errno: number): void {
    const name = operationNames[this.#operations[head]];
    const key = `${name} ${errno}`;
    if (this.#reported.has(key)) return;
    this.#reported.add(key);
    this.#client.report(
      new Vhost2Error(
        "SYSTEM",
        `Cannot ${name} ${this.#file.path}: ${errnoName(errno)}`,
        { errno },
      ),
    );
  }

  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    if (this.#inFlight === 0) this.#engine.release();
  }
}

const reasons: Record<number, string> = {
  [Errno.ENOENT]: "there is no such file",
  13: "permission denied",
  21: "it is a directory",
  30: "its file system is read-only",
  26: "it is being executed",
};

function openFile(
  path: string,
  isReadOnly: boolean,
  isDirect: boolean,
): number {
  const bytes = new TextEncoder().encode(path);
  const flags = (isReadOnly ? 0 : openForWriting) |
    (isDirect ? openDirect : 0);
  const fd = core.fileOpen(bytes, bytes.length, flags);
  if (isDirect && fd === -Errno.EINVAL) {
    throw new Vhost2Error(
      "OPTION",
      `Cannot open ${path}: its file system has no O_DIRECT`,
      { errno: Errno.EINVAL },
    );
  }
  if (fd < 0) {
    throw new Vhost2Error(
      "SYSTEM",
      `Cannot open ${path}: ${reasons[-fd] ?? errnoName(-fd)}`,
      { errno: -fd },
    );
  }
  const kind = core.descriptorKind(fd);
  if (kind !== constants.kindFile && kind !== constants.kindBlock) {
    core.descriptorClose(fd);
    throw new Vhost2Error(
      "OPTION",
      `Cannot use ${path} as a disk: it is neither a file nor a block device`,
    );
  }
  return fd;
}

function sizeOf(fd: number, path: string): number {
  const size = core.fileSize(fd);
  if (size >= 0) return size;
  throw new Vhost2Error(
    "SYSTEM",
    `Cannot find the size of ${path}: ${errnoName(-size)}`,
    { errno: -size },
  );
}

/** What the file asks of its writers: `FileTraits`. */
function traitsOf(
  fd: number,
  path: string,
): { alignment: number; hasBlockingWrites: boolean } {
  const words = new DataView(new ArrayBuffer(layouts.FileTraits.byteSize));
  check(core.fileTraits(fd, words), `Cannot find the traits of ${path}`);
  return {
    alignment: words.getUint32(layouts.FileTraits.alignment, true),
    hasBlockingWrites:
      words.getUint32(layouts.FileTraits.hasBlockingWrites, true) !== 0,
  };
}

/** How a file is to be used as a disk. */
export interface FileOptions {
  /** Opened only for reading. */
  readonly readOnly?: boolean;
  /**
   * Past the page cache of the host (O_DIRECT): for disks with caches of their
   * own, and guests that have one. The disk's logical block is then at least
   * what the file asks for.
   */
  readonly direct?: boolean;
}

/**
 * A disk in a file or on a block device, with the size that it has now. The
 * file stays open until the disk is closed. Making the disk larger makes a
 * file larger; making it smaller leaves the file as it is.
 *
 * @param path of the file
 * @throws Vhost2Error SYSTEM when it cannot be opened, OPTION when it is not
 * a file or a block device, or cannot be used as the options ask
 */
export function fileBacking(path: string, options: FileOptions = {}): Backing {
  const isReadOnly = options.readOnly ?? false;
  const isDirect = options.direct ?? false;
  const fd = openFile(path, isReadOnly, isDirect);
  let size: number;
  let traits: ReturnType<typeof traitsOf>;
  try {
    size = sizeOf(fd, path);
    traits = traitsOf(fd, path);
  } catch (error) {
    core.descriptorClose(fd);
    throw error;
  }
  // io_uring would hand such writes to a thread of the kernel's. What goes to
  // the page cache is written at once while that does not hold up the event
  // loop; what has to reach the disk always waits, so a thread does it.
  const isOurs = traits.hasBlockingWrites && !isDirect;
  return backingOver(path, fd, size, isReadOnly, {
    alignment: isDirect ? traits.alignment : 1,
    writeFlags: isOurs ? FileFlag.prompt : 0,
    durableWriteFlags: (isOurs ? FileFlag.threaded : 0) | FileFlag.dsync,
  });
}

/**
 * In a Worker: over a file that another isolate has open; under a number of
 * its own, so that neither has to wait for the other's requests to close it.
 * A write into the page cache is done at once even if it waits: nobody but the
 * Worker's own queues waits for it.
 */
export function sharedFileBacking(
  path: string,
  fd: number,
  isReadOnly: boolean,
  use: FileUse,
): Backing {
  const own = check(
    core.descriptorDuplicate(fd),
    `Cannot open ${path} in a Worker`,
  );
  noteHeld(Held.descriptor, own);
  const writeFlags = use.writeFlags === FileFlag.prompt
    ? FileFlag.inline
    : use.writeFlags;
  return backingOver(path, own, 0, isReadOnly, { ...use, writeFlags });
}

function backingOver(
  path: string,
  fd: number,
  initialSize: number,
  isReadOnly: boolean,
  use: FileUse,
): Backing {
  let size = initialSize;
  const file: OpenFile = {
    path,
    fd,
    ...use,
    inFlight: 0,
    drained: undefined,
  };
  let isClosed = false;
  return {
    name: path,
    get size() {
      return size;
    },
    blockSize: file.alignment > 512 ? 4096 : 512,
    isReadOnly,
    canDiscard: !isReadOnly,
    canWriteZeroes: !isReadOnly,
    openQueue: (client) => new FileQueue(client, file),
    toPortable: () => ({ kind: "file", path, fd, isReadOnly, use }),
    resize(wanted) {
      const held = sizeOf(fd, path);
      if (wanted > held) {
        const result = core.memfdResize(fd, wanted);
        if (result < 0) {
          throw new Vhost2Error(
            "SYSTEM",
            `Cannot make ${path} larger (${held} bytes, ${wanted} wanted): ${
              errnoName(-result)
            }`,
            { errno: -result },
          );
        }
      }
      size = wanted;
    },
    async close() {
      if (isClosed) return;
      isClosed = true;
      // A thread that still works on the number must not meet another file.
      if (file.inFlight > 0) {
        await new Promise<void>((resolve) => file.drained = resolve);
      }
      noteReleased(Held.descriptor, fd);
      core.descriptorClose(fd);
    },
  };
}
