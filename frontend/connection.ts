/**
 * A vhost-user front-end's connection: a method for each message of normal
 * operation, over a socket that takes any message.
 *
 * @module
 */

import { core } from "../ffi/core.ts";
import { check, errnoName, Vhost2Error } from "../ffi/errors.ts";
import {
  findFrontendRow,
  FrontendRequest as Request,
  type FrontendRequestId,
  type PayloadOf,
  type ReplyOf,
} from "../protocol/frontend_request.ts";
import { type Codec, plainWire } from "../protocol/layout.ts";
import {
  type MemoryRegionDescription,
  memoryTable,
} from "../protocol/memory_payloads.ts";
import {
  type InflightDescription,
  inflightDescription,
  type LogDescription,
  u64Payload,
  type VringAddress,
} from "../protocol/payloads.ts";
import { payloadCodecs } from "../protocol/request_row.ts";
import {
  type BackendRequestHandler,
  type BackendRequests,
  serveBackendRequests,
} from "./backend_requests.ts";
import { MessageSocket } from "./message_socket.ts";
import { RefusedError } from "./refused_error.ts";

const encoder = new TextEncoder();

/** How a request of normal operation is sent. */
export interface RequestOptions {
  /**
   * Asks for an ack (NEED_REPLY; REPLY_ACK must be negotiated) and awaits it;
   * a non-zero one rejects with {@linkcode RefusedError}. Without it the
   * promise is fulfilled once the message is queued.
   */
  readonly ack?: boolean;
}

/** One connection to a back-end. */
export class FrontendConnection extends MessageSocket {
  /** Answers the back-end's own requests; all are acknowledged without it. */
  onBackendRequest: BackendRequestHandler | undefined;

  /** Connects to a back-end that listens at `path`. */
  static connect(path: string): Promise<FrontendConnection> {
    const bytes = encoder.encode(path);
    const fd = core.socketConnect(bytes, bytes.length);
    if (fd >= 0) {
      return Promise.resolve(new FrontendConnection(fd, `vhost-user:${path}`));
    }
    return Promise.reject(
      new Vhost2Error(
        "SYSTEM",
        `Cannot connect to ${path}: ${errnoName(-fd)}`,
        { errno: -fd },
      ),
    );
  }

  /** Takes a connected stream socket over. */
  static fromFd(fd: number): FrontendConnection {
    return new FrontendConnection(fd, `vhost-user:fd ${fd}`);
  }

  /**
   * Sends a request of the protocol's table and returns the decoded reply;
   * null where an ack, or nothing, is what comes back. Descriptors of the
   * reply are closed: use `request` where they matter.
   */
  async exchange<Id extends FrontendRequestId>(
    id: Id,
    payload: PayloadOf<Id>,
    options: RequestOptions & { readonly fds?: readonly number[] } = {},
  ): Promise<ReplyOf<Id>> {
    const row = findFrontendRow(id)!;
    const codec: Codec<unknown> = payloadCodecs[row.payload];
    const bytes = codec.encode(payload, plainWire);
    const { fds } = options;
    if (row.reply.kind !== "reply") {
      if (options.ack) {
        const ack = await this.acknowledged(id, bytes, { fds });
        if (ack !== 0n) throw new RefusedError(row.name, ack);
      } else {
        if (!this.isOpen) throw this.goneError();
        this.send(id, bytes, { fds });
      }
      return null as ReplyOf<Id>;
    }
    const reply = await this.request(id, bytes, { fds });
    reply.descriptors.close();
    const answer: Codec<unknown> = payloadCodecs[row.reply.payload];
    if (reply.payload.length === 0 && answer.minSize > 0) {
      throw new RefusedError(row.name);
    }
    return this.#decode(id, answer, reply.payload) as ReplyOf<Id>;
  }

  /** Awaits that all that was sent has been handled, by GET_FEATURES. */
  async barrier(): Promise<void> {
    await this.getFeatures();
  }

  getFeatures(): Promise<bigint> {
    return this.exchange(Request.GET_FEATURES, null);
  }

  async setFeatures(features: bigint, options?: RequestOptions): Promise<void> {
    await this.exchange(Request.SET_FEATURES, features, options);
  }

  getProtocolFeatures(): Promise<bigint> {
    return this.exchange(Request.GET_PROTOCOL_FEATURES, null);
  }

  async setProtocolFeatures(
    features: bigint,
    options?: RequestOptions,
  ): Promise<void> {
    await this.exchange(Request.SET_PROTOCOL_FEATURES, features, options);
  }

  async getQueueNum(): Promise<number> {
    return Number(await this.exchange(Request.GET_QUEUE_NUM, null));
  }

  async getMaxMemSlots(): Promise<number> {
    return Number(await this.exchange(Request.GET_MAX_MEM_SLOTS, null));
  }

  async setOwner(options?: RequestOptions): Promise<void> {
    await this.exchange(Request.SET_OWNER, null, options);
  }

  async resetOwner(options?: RequestOptions): Promise<void> {
    await this.exchange(Request.RESET_OWNER, null, options);
  }

  async resetDevice(options?: RequestOptions): Promise<void> {
    await this.exchange(Request.RESET_DEVICE, null, options);
  }

  /**
   * Has writes logged into a part of a file, instead of the log before, which
   * nobody uses any more when the reply has come.
   */
  async setLogBase(
    { description, fd }: { description: LogDescription; fd: number },
  ): Promise<void> {
    const payload = payloadCodecs.logBase.encode(
      { kind: "log", ...description },
      plainWire,
    );
    const options = { fds: [fd] };
    const reply = await this.request(Request.SET_LOG_BASE, payload, options);
    reply.descriptors.close();
    const id = Request.SET_LOG_BASE;
    const value = this.#decode(id, payloadCodecs.u64, reply.payload);
    if (value !== 0n) throw new RefusedError("SET_LOG_BASE", value);
  }

  /** An eventfd for the back-end to signal when the log has changed. */
  async setLogFd(fd: number, options?: RequestOptions): Promise<void> {
    await this.exchange(Request.SET_LOG_FD, null, { ...options, fds: [fd] });
  }

  /** The n-th region is in the file of the n-th descriptor. */
  async setMemTable(
    regions: readonly RegionWithFile[],
    options?: RequestOptions,
  ): Promise<void> {
    const table = regions.map(({ description }) => description);
    const fds = regions.map(({ fd }) => fd);
    await this.exchange(Request.SET_MEM_TABLE, table, { ...options, fds });
  }

  async addMemRegion(
    { description, fd }: RegionWithFile,
    options?: RequestOptions,
  ): Promise<void> {
    const fds = [fd];
    await this.exchange(Request.ADD_MEM_REG, description, { ...options, fds });
  }

  async removeMemRegion(
    { description }: Pick<RegionWithFile, "description">,
    options?: RequestOptions,
  ): Promise<void> {
    await this.exchange(Request.REM_MEM_REG, description, options);
  }

  async setVringNum(
    index: number,
    num: number,
    options?: RequestOptions,
  ): Promise<void> {
    await this.exchange(Request.SET_VRING_NUM, { index, num }, options);
  }

  async setVringAddr(
    address: VringAddress,
    options?: RequestOptions,
  ): Promise<void> {
    await this.exchange(Request.SET_VRING_ADDR, address, options);
  }

  async setVringBase(
    index: number,
    base: number,
    options?: RequestOptions,
  ): Promise<void> {
    const state = { index, num: base };
    await this.exchange(Request.SET_VRING_BASE, state, options);
  }

  /** Stops the vring; returns its base. */
  async getVringBase(index: number): Promise<number> {
    const state = { index, num: 0 };
    return (await this.exchange(Request.GET_VRING_BASE, state)).num;
  }

  /** Starts the vring; `fd` null means that the back-end is to poll. */
  async setVringKick(
    index: number,
    fd: number | null,
    options?: RequestOptions,
  ): Promise<void> {
    await this.#notification(Request.SET_VRING_KICK, index, fd, options);
  }

  /**
   * The same at once: what is in flight stays recorded in the inflight region.
   */
  async skipDrain(index: number): Promise<number> {
    const state = { index, num: 0 };
    const id = Request.GET_VRING_BASE_SKIP_DRAIN;
    return (await this.exchange(id, state)).num;
  }

  /** `fd` null means that the driver polls. */
  async setVringCall(
    index: number,
    fd: number | null,
    options?: RequestOptions,
  ): Promise<void> {
    await this.#notification(Request.SET_VRING_CALL, index, fd, options);
  }

  async setVringErr(
    index: number,
    fd: number | null,
    options?: RequestOptions,
  ): Promise<void> {
    await this.#notification(Request.SET_VRING_ERR, index, fd, options);
  }

  async setVringEnable(
    index: number,
    isEnabled: boolean,
    options?: RequestOptions,
  ): Promise<void> {
    const state = { index, num: isEnabled ? 1 : 0 };
    await this.exchange(Request.SET_VRING_ENABLE, state, options);
  }

  /**
   * Gives the back-end a socket for requests of its own, which
   * `onBackendRequest` answers. Returns the channel, which closes with the
   * connection.
   */
  async setBackendChannel(options?: RequestOptions): Promise<BackendRequests> {
    const ends = new Int32Array(2);
    check(core.socketPair(ends), "Cannot make the back-end channel");
    const requests = serveBackendRequests(
      ends[0],
      (message, descriptors) => this.onBackendRequest?.(message, descriptors),
    );
    this.closed.then(() => requests.close());
    try {
      const fds = [ends[1]];
      await this.exchange(Request.SET_BACKEND_REQ_FD, null, {
        ...options,
        fds,
      });
      return requests;
    } catch (error) {
      requests.close();
      throw error;
    } finally {
      core.descriptorClose(ends[1]);
    }
  }

  /** POSTCOPY_ADVISE: the back-end's userfaultfd, for `PageFaults`. */
  async advisePostcopy(): Promise<number> {
    const { descriptors } = await this.request(Request.POSTCOPY_ADVISE);
    const fd = descriptors.take();
    descriptors.close();
    if (fd === undefined) throw new RefusedError("POSTCOPY_ADVISE");
    return fd;
  }

  /** POSTCOPY_LISTEN: from here on the memory comes by `mapPostcopy`. */
  async listenPostcopy(options?: RequestOptions): Promise<void> {
    await this.exchange(Request.POSTCOPY_LISTEN, null, options);
  }

  /**
   * SET_MEM_TABLE in postcopy: returns where the back-end has mapped each
   * region. Nothing runs there before `acknowledgePostcopyMap`.
   */
  async mapPostcopy(regions: readonly RegionWithFile[]): Promise<bigint[]> {
    const table = regions.map(({ description }) => description);
    const fds = regions.map(({ fd }) => fd);
    const payload = memoryTable.encode(table, plainWire);
    const reply = await this.request(Request.SET_MEM_TABLE, payload, { fds });
    reply.descriptors.close();
    return this.#decode(Request.SET_MEM_TABLE, memoryTable, reply.payload)
      .map((region) => region.uva);
  }

  /** Faults in the regions of `mapPostcopy` may come from here on. */
  acknowledgePostcopyMap(): void {
    const done = u64Payload.encode(0n, plainWire);
    this.send(Request.SET_MEM_TABLE, done);
  }

  /** POSTCOPY_END: all pages are there. */
  async endPostcopy(): Promise<void> {
    const ack = await this.exchange(Request.POSTCOPY_END, null);
    if (ack !== 0n) throw new RefusedError("POSTCOPY_END", ack);
  }

  /** Bytes of configuration space; rejects with RefusedError if refused. */
  async getConfig(offset: number, size: number): Promise<Uint8Array> {
    const data = new Uint8Array(size);
    const payload = { offset, flags: 0, data };
    return (await this.exchange(Request.GET_CONFIG, payload)).data;
  }

  async setConfig(
    offset: number,
    data: Uint8Array,
    options?: RequestOptions & { readonly flags?: number },
  ): Promise<void> {
    const payload = { offset, flags: options?.flags ?? 0, data };
    await this.exchange(Request.SET_CONFIG, payload, options);
  }

  /**
   * A region for the back-end to track requests in. The descriptor is the
   * caller's from here on.
   */
  async getInflightFd(
    numQueues: number,
    queueSize: number,
  ): Promise<InflightWithFile> {
    const id = Request.GET_INFLIGHT_FD;
    const wanted = { mmapSize: 0n, mmapOffset: 0n, numQueues, queueSize };
    const { payload, descriptors } = await this.request(
      id,
      inflightDescription.encode(wanted, plainWire),
    );
    try {
      const description = this.#decode(id, inflightDescription, payload);
      const fd = descriptors.take();
      if (fd === undefined) {
        throw this.brokenError(`reply to ${id}: no descriptor came`);
      }
      return { description, fd };
    } finally {
      descriptors.close();
    }
  }

  /** Gives a region back; the descriptor stays the caller's. */
  async setInflightFd(
    { description, fd }: InflightWithFile,
    options?: RequestOptions,
  ): Promise<void> {
    const fds = [fd];
    await this.exchange(Request.SET_INFLIGHT_FD, description, {
      ...options,
      fds,
    });
  }

  async setStatus(status: number, options?: RequestOptions): Promise<void> {
    await this.exchange(Request.SET_STATUS, BigInt(status), options);
  }

  async getStatus(): Promise<number> {
    return Number(await this.exchange(Request.GET_STATUS, null));
  }

  async #notification(
    id: 12 | 13 | 14,
    index: number,
    fd: number | null,
    options: RequestOptions = {},
  ): Promise<void> {
    const payload = { index, hasDescriptor: fd !== null, reserved: 0n };
    const fds = fd === null ? [] : [fd];
    await this.exchange(id, payload, { ...options, fds });
  }

  #decode<T>(request: number, codec: Codec<T>, payload: Uint8Array): T {
    const decoded = codec.decode(payload, plainWire);
    if (decoded.ok) return decoded.value;
    throw this.brokenError(`reply to ${request}: ${decoded.reason}`);
  }
}

/** An inflight region: what it is, and the file that holds it. */
export interface InflightWithFile {
  readonly description: InflightDescription;
  readonly fd: number;
}

/** A region's place in guest memory and the file that holds it. */
export interface RegionWithFile {
  readonly description: MemoryRegionDescription;
  readonly fd: number;
}
