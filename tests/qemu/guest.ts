// A Linux guest in QEMU (TCG: it must run everywhere), with its memory in a
// shareable memfd, any number of vhost-user-blk disks, its console line by
// line, and QEMU's control socket.
//
// The guest is a kernel and an initramfs that runs one shell script. The script
// prints lines for the host to wait for, may `read` lines that the host types,
// and its exit status ends the guest. See initramfs.ts for its functions.
import {
  type ChildProcessWithoutNullStreams,
  execFileSync,
  spawn,
} from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { guestCache, type KernelName } from "./cache.ts";
import { buildInitramfs, type GuestExtras } from "./initramfs.ts";
import { QmpConnection, type QmpEvent } from "./qmp.ts";

/** A vhost-user-blk disk of a guest. */
export interface GuestDisk {
  /** QEMU's id of the device; also that of its chardev, with `-socket` added. */
  id: string;
  /** Where the back-end listens. */
  socketPath: string;
  /** Virtqueues; 1 unless given. */
  numQueues?: number;
  /** Seconds after which QEMU connects again when the back-end goes away. */
  reconnectSeconds?: number;
  /** Offers the guest packed rings. */
  packed?: boolean;
  /** Its addresses go through the machine's IOMMU (`GuestOptions.iommu`). */
  iommuPlatform?: boolean;
  /** The place in the firmware's boot order. */
  bootIndex?: number;
}

/** A vhost-user-net card of a guest. */
export interface GuestNic {
  /** QEMU's id of the device; also that of its chardev, with `-socket` added. */
  id: string;
  /** Where the back-end listens. */
  socketPath: string;
  /** `52:54:00:12:34:56` */
  mac: string;
  /** Queue pairs; 1 unless given. */
  queues?: number;
  /** Its addresses go through the machine's IOMMU (`GuestOptions.iommu`). */
  iommuPlatform?: boolean;
  /** Properties of virtio-net-pci, such as `packed` or `csum`. */
  properties?: Record<string, boolean | number>;
}

export interface GuestOptions {
  /** Present from the start, as vda, vdb and so on in this order. */
  disks?: GuestDisk[];
  /** The same as eth0, eth1 and so on. */
  nics?: GuestNic[];
  /** Who serves the disks: when one crashes, the guest fails with it. */
  backends?: { crashed: Promise<Error> }[];
  /**
   * QEMU's own devices, each as `-device` takes it, behind an IOMMU that
   * isolates them: for drivers in the guest's user space.
   */
  isolated?: string[];
  /** Back-ends of those devices, as `-drive` takes them. */
  drives?: string[];
  /** The same of network cards, as `-netdev` takes them. */
  netdevs?: string[];
  /** What the guest has beside busybox and the disk verifier. */
  extras?: GuestExtras;
  /** Its kernel; that of the release unless given. */
  kernel?: KernelName;
  /** Run by the guest; without it the firmware boots from a disk. */
  script?: string;
  /** Waits to take over a running guest with the same options: migration.ts. */
  incoming?: boolean;
  /**
   * An Intel IOMMU, which the guest's kernel programs: strictly, each buffer
   * mapped for one request, or with everything mapped for good.
   */
  iommu?: "strict" | "passthrough";
  memoryMb?: number;
  /** Up to where memory can be added while the guest runs (`addMemory`). */
  maxMemoryMb?: number;
  cpus?: number;
  /** A guest that has not ended after this is ended; 280 s unless given. */
  lifetimeMs?: number;
  /** Called with each line of the console as it comes. */
  onLine?: (line: string) => void;
}

export interface WaitOptions {
  /** After this the wait fails: a guest that hangs. 200 s unless given. */
  timeoutMs?: number;
}

const DEFAULT_TIMEOUT_MS = 200_000;
const DEFAULT_LIFETIME_MS = 280_000;
/** QEMU gets this long to end by itself when a guest is disposed of. */
const QUIT_TIMEOUT_MS = 3_000;
const QEMU = "qemu-system-x86_64";
/** The last line of a panic, after its trace; the guest hangs from then on. */
const PANIC = /---\[ end Kernel panic/;

const COMMAND_LINE = [
  "console=ttyS0",
  "quiet",
  // A panic hangs, and its last line makes us end QEMU.
  "panic=0",
  // TCG is slow enough without calibration, mitigations and self-tests.
  "tsc=reliable",
  "no_timer_check",
  "mitigations=off",
  "cryptomgr.notests",
  "8250.nr_uarts=1",
  "i8042.noaux",
  "i8042.nopnp",
  "audit=0",
  "random.trust_cpu=on",
].join(" ");

/**
 * Starts a guest; resolves when QEMU runs and has connected its disks.
 *
 * @throws {Error} with QEMU's own words when it does not start
 * @example
 * await using guest = await startGuest({
 *   disks: [{ id: "disk0", socketPath }],
 *   script: "make_fs vda; write_files vda 10 64; remount_fs vda; check_files vda",
 * });
 * await guest.waitFor(/vda: 10 checksums OK/);
 * assert.equal(await guest.exited, 0);
 */
export async function startGuest(options: GuestOptions): Promise<Guest> {
  const folder = mkdtempSync(join(tmpdir(), "vhost2-guest-"));
  try {
    return await start(folder, options);
  } catch (error) {
    rmSync(folder, { recursive: true, force: true });
    throw error;
  }
}

async function start(folder: string, options: GuestOptions): Promise<Guest> {
  const { disks = [], nics = [], script, memoryMb = 256, cpus = 1 } = options;
  const isIsolating = options.isolated !== undefined;
  const iommu = options.iommu ?? (isIsolating ? "strict" : undefined);
  const qmpPath = join(folder, "qmp");
  const args = [
    "-nodefaults",
    "-no-user-config",
    ...["-display", "none", "-vga", "none"],
    ...[
      "-machine",
      `${iommu ? "q35" : "pc"},accel=tcg,memory-backend=mem,hpet=off${
        // Interrupts can be remapped only where QEMU has their controller.
        isIsolating ? ",kernel-irqchip=split" : ""}`,
    ],
    // Before the devices behind it.
    ...(iommu
      ? ["-device", `intel-iommu,intremap=${isIsolating ? "on" : "off"}`]
      : []),
    // The disk verifier uses the crc32 instruction; rdrand saves the kernel
    // the second in which it collects randomness otherwise. QEMU 7.2's TCG
    // spoils the flags of cmpxchg16b, on which newer kernels' allocators rely.
    ...[
      "-cpu",
      `qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand${
        options.kernel === "vdpa" ? ",-cx16" : ""
      }`,
    ],
    ...["-smp", String(cpus), "-m", memoryArgument(options)],
    "-object",
    `memory-backend-memfd,id=mem,size=${memoryMb}M,share=on`,
    ...["-chardev", "stdio,id=console,signal=off"],
    ...["-serial", "chardev:console"],
    // QEMU connects to us, so that there is nothing to wait and retry for.
    ...["-qmp", `unix:${qmpPath}`],
  ];
  if (script !== undefined) {
    const cache = guestCache(options.kernel);
    const initramfs = join(folder, "initramfs");
    writeFileSync(
      initramfs,
      buildInitramfs(cache, script, nics.length > 0, options.extras),
    );
    args.push("-kernel", cache.kernel, "-initrd", initramfs);
    args.push("-append", [COMMAND_LINE, ...iommuArguments(iommu)].join(" "));
  }
  for (const drive of options.drives ?? []) args.push("-drive", drive);
  for (const netdev of options.netdevs ?? []) args.push("-netdev", netdev);
  for (const device of options.isolated ?? []) args.push("-device", device);
  if (options.incoming) args.push("-incoming", "defer");
  for (const disk of disks) {
    args.push("-chardev", chardevArgument(disk));
    args.push("-device", JSON.stringify(deviceProperties(disk)));
  }
  for (const nic of nics) args.push(...nicArguments(nic));

  const server = createServer();
  const connected = new Promise<void>((resolve, reject) => {
    server.once("error", reject);
    server.once("listening", resolve);
    server.listen(qmpPath);
  });
  await connected;
  const accepted = new Promise<QmpConnection>((resolve, reject) => {
    server.once("connection", (socket) => {
      QmpConnection.over(socket).then(resolve, reject);
    });
  });
  const child = spawn(QEMU, args, { stdio: "pipe" });
  const guest = new Guest(child, folder, options);
  try {
    const ended = guest.exited.then(() => {
      throw new Error("QEMU ended");
    });
    guest.connected(await Promise.race([accepted, ended]));
  } catch (error) {
    await guest[Symbol.asyncDispose]();
    const why = error instanceof Error ? error.message.split(";")[0] : error;
    throw guest.failure(`Cannot start the guest: ${why}`);
  } finally {
    server.close();
  }
  return guest;
}

/** A running guest; dispose of it to end it and to remove its files. */
export class Guest {
  /** All lines of the console so far, and what QEMU itself said. */
  readonly lines: string[] = [];
  /**
   * The exit status of the script once the guest has powered off. Rejects with
   * the last lines of the console when the guest panics or QEMU ends otherwise.
   */
  readonly exited: Promise<number>;

  #child: ChildProcessWithoutNullStreams;
  #folder: string;
  #qmp: QmpConnection | undefined;
  #onLine: ((line: string) => void) | undefined;
  #closed: Promise<void>;
  /** Console lines before this index were matched by an earlier waitFor. */
  #seen = 0;
  #waiters = new Set<() => void>();
  #status: number | undefined;
  #failed: Error | undefined;
  #ended = false;
  #endWithProcess: () => void;

  constructor(
    child: ChildProcessWithoutNullStreams,
    folder: string,
    options: GuestOptions,
  ) {
    this.#child = child;
    this.#folder = folder;
    this.#onLine = options.onLine;
    this.#endWithProcess = () => child.kill("SIGKILL");
    process.once("exit", this.#endWithProcess);
    eachLine(child.stdout, (line) => this.#take(line));
    eachLine(child.stderr, (line) => this.#take(`qemu: ${line}`));
    // A guest that is gone takes no input; the close below says why.
    child.stdin.on("error", () => {});
    const lifetimeMs = options.lifetimeMs ?? DEFAULT_LIFETIME_MS;
    const lifetime = setTimeout(() => {
      this.#failed ??= this.failure(`The guest ran on after ${lifetimeMs} ms`);
      child.kill("SIGKILL");
    }, lifetimeMs);
    for (const { crashed } of options.backends ?? []) {
      crashed.then((error) => {
        if (this.#ended) return;
        this.#failed ??= this.failure(error.message);
        child.kill("SIGKILL");
      });
    }
    const closed = new Promise<string>((resolve) => {
      child.once("error", (error) => resolve(error.message));
      child.once("close", (code, signal) => {
        resolve(signal ? `signal ${signal}` : `exit code ${code}`);
      });
    });
    this.exited = closed.then((how) => {
      this.#ended = true;
      clearTimeout(lifetime);
      process.removeListener("exit", this.#endWithProcess);
      const clean = how === "exit code 0";
      if (clean && options.script === undefined) this.#status ??= 0;
      if (!clean || this.#status === undefined) {
        this.#failed ??= this.failure(`The guest ended unexpectedly (${how})`);
      }
      this.#wake();
      if (this.#failed) throw this.#failed;
      return this.#status as number;
    });
    this.#closed = closed.then(() => {});
    // Nobody has to look at it.
    this.exited.catch(() => {});
  }

  /** QEMU's process id. */
  get pid(): number {
    return this.#child.pid!;
  }

  /** Called once, by startGuest. */
  connected(qmp: QmpConnection): void {
    this.#qmp = qmp;
  }

  /**
   * Resolves with the match of the first line that `pattern` matches, after
   * those that earlier calls matched.
   *
   * @throws {Error} with the last lines of the console when the guest ends,
   *   panics or says nothing like it in time
   */
  waitFor(
    pattern: RegExp,
    options: WaitOptions = {},
  ): Promise<RegExpExecArray> {
    const { timeoutMs = DEFAULT_TIMEOUT_MS } = options;
    return new Promise((resolve, reject) => {
      const done = () => {
        clearTimeout(timer);
        this.#waiters.delete(look);
      };
      const look = () => {
        for (let index = this.#seen; index < this.lines.length; index++) {
          const match = pattern.exec(this.lines[index]);
          if (match === null) continue;
          this.#seen = index + 1;
          done();
          return resolve(match);
        }
        if (this.#failed) {
          done();
          reject(this.#failed);
        } else if (this.#ended) {
          done();
          reject(this.failure(`The guest ended and never said ${pattern}`));
        }
      };
      const timer = setTimeout(() => {
        done();
        reject(
          this.failure(`The guest did not say ${pattern} in ${timeoutMs} ms`),
        );
      }, timeoutMs);
      this.#waiters.add(look);
      look();
    });
  }

  /** Types a line on the guest's console: its script gets it from `read`. */
  type(line: string): void {
    this.#child.stdin.write(line + "\n");
  }

  /** Runs a command of QEMU's control protocol. */
  qmp(command: string, args?: Record<string, unknown>): Promise<unknown> {
    return this.#control().execute(command, args);
  }

  /** Resolves with QEMU's next event that `matches`, given out once. */
  qmpEvent(matches: (event: QmpEvent) => boolean): Promise<QmpEvent> {
    return this.#control().event(matches);
  }

  /** Resets the machine: it starts anew with the same disks and script. */
  async reset(): Promise<void> {
    await this.qmp("system_reset");
  }

  /** Hot-plugs a disk; the guest finds it some time after this resolves. */
  async addDisk(disk: GuestDisk): Promise<void> {
    const address = { type: "unix", data: { path: disk.socketPath } };
    await this.qmp("chardev-add", {
      id: `${disk.id}-socket`,
      backend: {
        type: "socket",
        data: { addr: address, server: false, ...reconnectProperty(disk) },
      },
    });
    await this.qmp("device_add", deviceProperties(disk));
  }

  /** Hot-unplugs a disk; resolves when the guest has let it go. */
  async removeDisk(id: string): Promise<void> {
    await this.qmp("device_del", { id });
    await this.#control().event(({ event, data }) =>
      event === "DEVICE_DELETED" && data?.device === id
    );
    await this.qmp("chardev-remove", { id: `${id}-socket` });
  }

  /**
   * Hot-plugs memory (`maxMemoryMb`); the guest brings it online some time
   * after this resolves.
   */
  async addMemory(id: string, memoryMb: number): Promise<void> {
    await this.qmp("object-add", {
      "qom-type": "memory-backend-memfd",
      id: `${id}-memory`,
      size: memoryMb * (1 << 20),
      share: true,
    });
    await this.qmp("device_add", {
      driver: "pc-dimm",
      id,
      memdev: `${id}-memory`,
    });
  }

  /**
   * Hot-unplugs memory; resolves with whether the guest could let it go.
   */
  async removeMemory(id: string): Promise<boolean> {
    await this.qmp("device_del", { id });
    const { event } = await this.#control().event(({ event, data }) =>
      data?.device === id &&
      (event === "DEVICE_DELETED" || event.endsWith("UNPLUG_GUEST_ERROR"))
    );
    if (event !== "DEVICE_DELETED") return false;
    await this.qmp("object-del", { id: `${id}-memory` });
    return true;
  }

  /** An error that says `what`, followed by the last lines of the console. */
  failure(what: string): Error {
    const last = this.lines.slice(-40).map((line) => `  | ${line}`);
    return new Error(`${what}; its last lines:\n${last.join("\n")}`);
  }

  /** Ends the guest if it still runs, and removes its files. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (!this.#ended) {
      // QEMU's own way out, which leaves the back-ends in peace; not when it
      // is stuck in a message to one of them.
      this.#child.kill("SIGTERM");
      const kill = () => this.#child.kill("SIGKILL");
      const timer = setTimeout(kill, QUIT_TIMEOUT_MS);
      await this.#closed;
      clearTimeout(timer);
    }
    this.#qmp?.close();
    rmSync(this.#folder, { recursive: true, force: true });
  }

  #control(): QmpConnection {
    if (!this.#qmp) throw this.failure("The guest has no control socket");
    return this.#qmp;
  }

  #take(line: string): void {
    this.lines.push(line);
    const exit = /^guest-exit (\d+)/.exec(line);
    if (exit) this.#status = Number(exit[1]);
    else if (line !== "guest-up") this.#onLine?.(line);
    if (PANIC.test(line)) {
      this.#failed ??= this.failure("The guest panicked");
      this.#child.kill("SIGKILL");
    }
    this.#wake();
  }

  #wake(): void {
    for (const look of [...this.#waiters]) look();
  }
}

function eachLine(
  stream: NodeJS.ReadableStream,
  take: (line: string) => void,
): void {
  stream.setEncoding("utf8");
  let rest = "";
  stream.on("data", (chunk: string) => {
    const lines = (rest + chunk).split("\n");
    rest = lines.pop() ?? "";
    for (const line of lines) take(line.replace(/\r+$/, ""));
  });
  stream.on("end", () => {
    if (rest !== "") take(rest);
  });
}

function memoryArgument({ memoryMb = 256, maxMemoryMb }: GuestOptions): string {
  return maxMemoryMb === undefined
    ? `${memoryMb}M`
    : `${memoryMb}M,slots=4,maxmem=${maxMemoryMb}M`;
}

function chardevArgument(disk: GuestDisk): string {
  // A comma in an option's value is written twice.
  const path = disk.socketPath.replaceAll(",", ",,");
  const reconnect = Object.entries(reconnectProperty(disk))
    .map(([name, value]) => `,${name}=${value}`).join("");
  return `socket,id=${disk.id}-socket,path=${path}${reconnect}`;
}

function deviceProperties(disk: GuestDisk): Record<string, unknown> {
  return {
    driver: "vhost-user-blk-pci",
    id: disk.id,
    chardev: `${disk.id}-socket`,
    "num-queues": disk.numQueues ?? 1,
    ...(disk.packed ? { packed: true } : {}),
    ...(disk.iommuPlatform
      ? { iommu_platform: true, "disable-legacy": "on" }
      : {}),
    ...(disk.bootIndex === undefined ? {} : { bootindex: disk.bootIndex }),
  };
}

function nicArguments(nic: GuestNic): string[] {
  const { id, mac, queues = 1 } = nic;
  const path = nic.socketPath.replaceAll(",", ",,");
  const device = {
    driver: "virtio-net-pci",
    id,
    netdev: `${id}-net`,
    mac,
    // No firmware boots from it.
    romfile: "",
    // QEMU 7.2 without KVM crashes in KVM's code when it sets up the MSI-X
    // vectors of a vhost-user netdev.
    vectors: 0,
    ...(queues === 1 ? {} : { mq: true }),
    ...(nic.iommuPlatform
      ? { iommu_platform: true, "disable-legacy": "on" }
      : {}),
    ...nic.properties,
  };
  return [
    ...["-chardev", `socket,id=${id}-socket,path=${path}`],
    "-netdev",
    `vhost-user,id=${id}-net,chardev=${id}-socket,queues=${queues}`,
    ...["-device", JSON.stringify(device)],
  ];
}

function iommuArguments(iommu: GuestOptions["iommu"]): string[] {
  if (iommu === undefined) return [];
  return [
    "intel_iommu=on",
    ...(iommu === "strict" ? ["iommu.strict=1"] : ["iommu=pt"]),
  ];
}

let qemuVersion: number | undefined;

/** QEMU 9.2 renamed the option and its unit. */
function reconnectProperty(disk: GuestDisk): Record<string, number> {
  if (disk.reconnectSeconds === undefined) return {};
  if (qemuVersion === undefined) {
    const text = execFileSync(QEMU, ["--version"], { encoding: "utf8" });
    const [, major, minor] = /version (\d+)\.(\d+)/.exec(text) ?? [, 0, 0];
    qemuVersion = Number(major) * 100 + Number(minor);
  }
  return qemuVersion >= 902
    ? { "reconnect-ms": disk.reconnectSeconds * 1000 }
    : { reconnect: disk.reconnectSeconds };
}
