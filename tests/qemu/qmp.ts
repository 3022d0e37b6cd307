// QEMU's control socket (docs/interop/qmp-spec.txt): one JSON object per line.
import type { Socket } from "node:net";

/** An event that QEMU sent, such as DEVICE_DELETED. */
export interface QmpEvent {
  event: string;
  data?: Record<string, unknown>;
}

interface Pending {
  command: string;
  resolve: (value: unknown) => void;
  reject: (error: Error) => void;
}

/** A connection to QEMU's control socket, after its handshake. */
export class QmpConnection {
  #socket: Socket;
  #pending: Pending[] = [];
  #events: QmpEvent[] = [];
  #eventWaiters = new Set<() => void>();
  #closed: Error | undefined;

  private constructor(socket: Socket) {
    this.#socket = socket;
    socket.setEncoding("utf8");
    let rest = "";
    socket.on("data", (chunk: string) => {
      const lines = (rest + chunk).split("\n");
      rest = lines.pop() ?? "";
      for (const line of lines) if (line.trim() !== "") this.#receive(line);
    });
    socket.on("error", (error) => this.#fail(error));
    socket.on("close", () => this.#fail(new Error("QMP connection closed")));
  }

  /** Speaks with the QEMU at the other end of a connected socket. */
  static async over(socket: Socket): Promise<QmpConnection> {
    const connection = new QmpConnection(socket);
    await connection.execute("qmp_capabilities");
    return connection;
  }

  /**
   * Runs a command; resolves with what it returns.
   *
   * @throws {Error} with QEMU's description when it refuses
   */
  execute(
    command: string,
    args: Record<string, unknown> = {},
  ): Promise<unknown> {
    return new Promise((resolve, reject) => {
      if (this.#closed) return reject(this.#closed);
      this.#pending.push({ command, resolve, reject });
      const line = { execute: command, arguments: args };
      this.#socket.write(JSON.stringify(line) + "\n");
    });
  }

  /**
   * Resolves with the first event that `matches`, one that came before
   * included; each event is given out once.
   */
  event(matches: (event: QmpEvent) => boolean): Promise<QmpEvent> {
    return new Promise((resolve, reject) => {
      const look = () => {
        const index = this.#events.findIndex(matches);
        if (index >= 0) {
          this.#eventWaiters.delete(look);
          resolve(this.#events.splice(index, 1)[0]);
        } else if (this.#closed) {
          this.#eventWaiters.delete(look);
          reject(this.#closed);
        }
      };
      this.#eventWaiters.add(look);
      look();
    });
  }

  close(): void {
    this.#socket.destroy();
  }

  #receive(line: string): void {
    const message = JSON.parse(line);
    if (message.event !== undefined) {
      this.#events.push(message);
      for (const look of [...this.#eventWaiters]) look();
      return;
    }
    // The greeting is neither an event nor an answer.
    if (message.QMP !== undefined) return;
    const pending = this.#pending.shift();
    if (message.error !== undefined) {
      const why = `QMP ${pending?.command}: ${message.error.desc}`;
      pending?.reject(new Error(why));
    } else pending?.resolve(message.return);
  }

  #fail(error: Error): void {
    this.#closed ??= error;
    for (const pending of this.#pending.splice(0)) pending.reject(error);
    for (const look of [...this.#eventWaiters]) look();
  }
}
