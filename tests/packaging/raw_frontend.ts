/**
 * A front-end of a few bytes that shares no code with the library: what it
 * understands is what the vhost-user specification says.
 *
 * @module
 */

import { createConnection, type Socket } from "node:net";

/** Numbers of the specification's "Front-end message types". */
export const GET_FEATURES = 1;
const SET_OWNER = 3;
const GET_PROTOCOL_FEATURES = 15;
const SET_PROTOCOL_FEATURES = 16;
const GET_CONFIG = 24;

const headerSize = 12;
const version = 1;
const replyFlag = 4;
/** VIRTIO_F_VERSION_1, VHOST_USER_F_PROTOCOL_FEATURES. */
export const libraryFeatures: bigint = 1n << 32n | 1n << 30n;
/** VHOST_USER_PROTOCOL_F_CONFIG. */
const configFeature = 1n << 9n;
/** The protocol is silent where it waits; a test is not. */
const timeoutMs = 20_000;

/** One connection to a back-end. */
export class RawFrontend {
  readonly #socket: Socket;
  readonly #chunks: AsyncIterator<Uint8Array>;
  #received: Uint8Array = new Uint8Array(0);

  private constructor(socket: Socket) {
    this.#socket = socket;
    this.#chunks = socket[Symbol.asyncIterator]();
  }

  static async connect(path: string): Promise<RawFrontend> {
    const socket = createConnection(path);
    socket.setTimeout(timeoutMs, () => {
      socket.destroy(new Error(`Cannot go on: ${path} does not answer`));
    });
    await new Promise<void>((resolve, reject) => {
      socket.once("connect", resolve);
      socket.once("error", reject);
    });
    return new RawFrontend(socket);
  }

  /** Sends one message without a reply. */
  send(request: number, payload: Uint8Array = new Uint8Array(0)): void {
    const message = new Uint8Array(headerSize + payload.length);
    const view = new DataView(message.buffer);
    view.setUint32(0, request, true);
    view.setUint32(4, version, true);
    view.setUint32(8, payload.length, true);
    message.set(payload, headerSize);
    this.#socket.write(message);
  }

  /** Sends one message and returns the payload of its reply. */
  async exchange(request: number, payload?: Uint8Array): Promise<Uint8Array> {
    this.send(request, payload);
    const header = await this.#read(headerSize);
    const view = new DataView(header.buffer, header.byteOffset, headerSize);
    const flags = view.getUint32(4, true);
    if (view.getUint32(0, true) !== request) {
      throw new Error(`The reply to ${request} is ${view.getUint32(0, true)}`);
    }
    if (flags !== (version | replyFlag)) {
      throw new Error(`The reply to ${request} has flags 0x${flags}`);
    }
    return await this.#read(view.getUint32(8, true));
  }

  async getFeatures(): Promise<bigint> {
    return readU64(await this.exchange(GET_FEATURES));
  }

  /** The first `size` bytes of configuration space. */
  async getConfig(size: number): Promise<Uint8Array> {
    this.send(SET_OWNER);
    const offered = readU64(await this.exchange(GET_PROTOCOL_FEATURES));
    if ((offered & configFeature) === 0n) {
      throw new Error("The back-end has no configuration space");
    }
    const chosen = new Uint8Array(8);
    new DataView(chosen.buffer).setBigUint64(0, configFeature, true);
    this.send(SET_PROTOCOL_FEATURES, chosen);
    // u32 offset, u32 size, u32 flags, then the bytes.
    const payload = new Uint8Array(12 + size);
    new DataView(payload.buffer).setUint32(4, size, true);
    return (await this.exchange(GET_CONFIG, payload)).subarray(12);
  }

  async #read(length: number): Promise<Uint8Array> {
    while (this.#received.length < length) {
      const { value, done } = await this.#chunks.next();
      if (done) throw new Error("The back-end closed the connection");
      const joined = new Uint8Array(this.#received.length + value.length);
      joined.set(this.#received);
      joined.set(value, this.#received.length);
      this.#received = joined;
    }
    const bytes = this.#received.slice(0, length);
    this.#received = this.#received.slice(length);
    return bytes;
  }

  /** Resolves when the socket is closed. */
  async close(): Promise<void> {
    await new Promise<void>((resolve) => {
      this.#socket.once("close", () => resolve());
      this.#socket.destroy();
    });
  }
}

function readU64(bytes: Uint8Array): bigint {
  if (bytes.length !== 8) throw new Error(`A u64 of ${bytes.length} bytes`);
  return new DataView(bytes.buffer, bytes.byteOffset, 8)
    .getBigUint64(0, true);
}

/** What a back-end at `path` offers. */
export async function getFeatures(path: string): Promise<bigint> {
  const frontend = await RawFrontend.connect(path);
  try {
    return await frontend.getFeatures();
  } finally {
    await frontend.close();
  }
}
