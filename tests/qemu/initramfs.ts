// The guest's whole system: an initramfs with a busybox, the disk verifier, a
// few kernel modules, and a script. Written as a newc cpio archive
// (Documentation/driver-api/early-userspace/buffer-format.rst).
import { execFileSync } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import type { GuestCache, GuestProgram } from "./cache.ts";
import { Buffer } from "node:buffer";

/** What the guest needs beyond what its kernel has built in. */
const MODULES = ["virtio_pci", "virtio_blk"];
/** And with a network card. */
const NETWORK_MODULES = ["virtio_net"];

/** Runs the guest's script and tells the host how it ended. */
const INIT = `#!/bin/sh
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in $(cat /lib/modules.order); do insmod $module || exit 1; done
echo "guest-up"
sh -e -o pipefail -c '. /lib/steps.sh; . /script.sh' </dev/console
echo "guest-exit $?"
poweroff -f
`;

/** Shell functions for scripts: each prints one line or fails the script. */
const STEPS = `
# wait_disk vda: until the device node is there, as after a hot plug.
wait_disk() {
  for n in $(seq 1200); do [ -b /dev/$1 ] && return 0; usleep 50000; done
  echo "no disk $1"; return 1
}
# wait_gone vda
wait_gone() {
  for n in $(seq 1200); do [ -b /dev/$1 ] || return 0; usleep 50000; done
  echo "disk $1 is still there"; return 1
}
# make_fs vda: an ext2 file system, mounted at /mnt/vda by the ext4 driver.
make_fs() {
  mke2fs -F -b 4096 /dev/$1 >/dev/null
  echo "$1: file system made"
  mount_fs $1
}
mount_fs() { mkdir -p /mnt/$1; mount -t ext2 /dev/$1 /mnt/$1; }
umount_fs() { umount /mnt/$1; }
# write_files vda COUNT KIB: random files and their checksums.
write_files() {
  mkdir -p /mnt/$1/files
  for n in $(seq $2); do
    dd if=/dev/urandom of=/mnt/$1/files/$n bs=1k count=$3 2>/dev/null
  done
  (cd /mnt/$1; sha256sum files/* >/tmp/$1.sha256; cp /tmp/$1.sha256 sums)
  echo "$1: $2 files of $3 KiB written"
}
# check_files vda: after a remount, so that the data come from the disk.
check_files() {
  (cd /mnt/$1; [ ! -e /tmp/$1.sha256 ] || cmp sums /tmp/$1.sha256
   sha256sum -c -s sums)
  echo "$1: $(wc -l </mnt/$1/sums) checksums OK"
}
# remount_fs vda: with the page cache emptied.
remount_fs() {
  umount_fs $1; echo 3 >/proc/sys/vm/drop_caches; mount_fs $1
  echo "$1: mounted again"
}
queue_count() { ls /sys/block/$1/mq | wc -l; }
# verify_mix 4 32 1500 vda vdb: on each of 4 processors, and so on the queues
# of each, \`verify mix\` in 8 MiB of each disk, --depth=32 --count=1500.
verify_mix() {
  cpus=$1 depth=$2 count=$3 jobs=""
  shift 3
  for cpu in $(seq 0 $((cpus - 1))); do
    for disk in "$@"; do
      taskset -c $cpu verify mix /dev/$disk --offset=$((cpu << 23)) \\
        --size=$((1 << 23)) --depth=$depth --count=$count --seed=$((cpu + 1)) &
      jobs="$jobs $!"
    done
  done
  for job in $jobs; do wait $job; done
}
`;

/** What else a guest has. */
export interface GuestExtras {
  /** Kernel modules, loaded with all that they need. */
  readonly modules?: readonly string[];
  /** Beside `verify`. */
  readonly programs?: readonly GuestProgram[];
  /** Files by their path in the guest. */
  readonly files?: ReadonlyMap<string, { bytes: Uint8Array; mode?: number }>;
}

/** Folders that the archive has in any case. */
const FOLDERS = [
  ...["bin", "dev", "proc", "sys", "lib", "lib/modules", "tmp", "mnt"],
];

/**
 * The archive of a guest that runs `script` (a shell script, run with
 * `sh -e -o pipefail` and the functions of STEPS) and powers off.
 */
export function buildInitramfs(
  cache: GuestCache,
  script: string,
  hasNetwork = false,
  extras: GuestExtras = {},
): Uint8Array {
  const archive = new CpioArchive();
  for (const folder of FOLDERS) archive.folder(folder);
  for (const folder of foldersOf(extras)) archive.folder(folder);
  for (const [path, { bytes, mode }] of extras.files ?? []) {
    archive.file(path, bytes, mode);
  }
  // The kernel gives it to /init as standard input, output and error.
  archive.characterDevice("dev/console", 5, 1);
  archive.file("bin/busybox", readFileSync(cache.busybox), 0o755);
  for (const name of appletsOf(cache.busybox)) {
    archive.link(`bin/${name}`, "busybox");
  }
  for (const name of ["verify", ...extras.programs ?? []] as const) {
    archive.file(`bin/${name}`, readFileSync(cache.program(name)), 0o755);
  }
  const order: string[] = [];
  const wanted = [
    ...MODULES,
    ...hasNetwork ? NETWORK_MODULES : [],
    ...extras.modules ?? [],
  ];
  for (const { name, bytes } of modulesWithNeeded(cache, wanted)) {
    archive.file(`lib/modules/${name}.ko`, bytes);
    order.push(`/lib/modules/${name}.ko`);
  }
  archive.text("lib/modules.order", order.join("\n") + "\n");
  archive.text("lib/steps.sh", STEPS);
  archive.text("script.sh", script + "\n");
  archive.text("init", INIT, 0o755);
  return archive.end();
}

/** The folders of the files, each after the one that it is in. */
function foldersOf({ files }: GuestExtras): string[] {
  const found = new Set<string>();
  for (const path of files?.keys() ?? []) {
    const parts = path.split("/").slice(0, -1);
    parts.forEach((_, i) => found.add(parts.slice(0, i + 1).join("/")));
  }
  return [...found].filter((folder) => !FOLDERS.includes(folder)).sort();
}

function appletsOf(busybox: string): string[] {
  return execFileSync(busybox, ["--list"], { encoding: "utf8" })
    .split("\n").filter((name) => name !== "" && name !== "busybox");
}

/** The modules in an order in which each comes after all that it needs. */
function modulesWithNeeded(
  cache: GuestCache,
  wanted: string[],
): { name: string; bytes: Uint8Array }[] {
  const files = new Map<string, string>();
  const folder = join(cache.modules, "kernel");
  for (const path of readdirSync(folder, { recursive: true })) {
    const found = /([^/]+)\.ko(\.xz)?$/.exec(String(path));
    if (found) files.set(underscored(found[1]), join(folder, String(path)));
  }
  const modules = new Map<string, Uint8Array>();
  const visit = (name: string) => {
    const file = files.get(name);
    // Not a file: built into the kernel.
    if (file === undefined || modules.has(name)) return;
    const bytes = file.endsWith(".xz")
      ? execFileSync(cache.busybox, ["unxz", "-c", file], {
        maxBuffer: 64 << 20,
      })
      : readFileSync(file);
    for (const needed of neededBy(bytes)) visit(needed);
    modules.set(name, bytes);
  };
  for (const name of wanted) visit(name);
  return [...modules].map(([name, bytes]) => ({ name, bytes }));
}

/** `depends=a,b` of the module's .modinfo section, where strings end in zero. */
function neededBy(module: Uint8Array): string[] {
  const text = Buffer.from(module.buffer, module.byteOffset, module.length);
  const key = "\0depends=";
  const start = text.indexOf(key);
  if (start < 0) return [];
  const end = text.indexOf(0, start + key.length);
  return text.toString("latin1", start + key.length, end)
    .split(",").filter((name) => name !== "").map(underscored);
}

/** The kernel takes - and _ in a module's name for the same. */
function underscored(name: string): string {
  return name.replaceAll("-", "_");
}

/** File types of mode_t. */
const FOLDER = 0o040000;
const CHARACTER_DEVICE = 0o020000;
const FILE = 0o100000;
const LINK = 0o120000;

class CpioArchive {
  #parts: Uint8Array[] = [];
  #inode = 1;

  folder(name: string): void {
    this.#entry(name, FOLDER | 0o755, new Uint8Array());
  }

  file(name: string, content: Uint8Array, mode = 0o644): void {
    this.#entry(name, FILE | mode, content);
  }

  text(name: string, content: string, mode = 0o644): void {
    this.file(name, Buffer.from(content), mode);
  }

  link(name: string, target: string): void {
    this.#entry(name, LINK | 0o777, Buffer.from(target));
  }

  characterDevice(name: string, major: number, minor: number): void {
    const mode = CHARACTER_DEVICE | 0o600;
    this.#entry(name, mode, new Uint8Array(), [major, minor]);
  }

  end(): Uint8Array {
    this.#entry("TRAILER!!!", 0, new Uint8Array());
    return Buffer.concat(this.#parts);
  }

  #entry(
    name: string,
    mode: number,
    content: Uint8Array,
    device: [number, number] = [0, 0],
  ): void {
    const nameBytes = Buffer.from(name + "\0");
    const fields = [
      this.#inode++,
      mode,
      0, // user
      0, // group
      1, // links
      0, // modified at
      content.length,
      0, // on device
      0,
      ...device,
      nameBytes.length,
      0, // checksum, unused in newc
    ].map((field) => field.toString(16).padStart(8, "0"));
    this.#aligned(Buffer.concat([
      Buffer.from("070701" + fields.join("")),
      nameBytes,
    ]));
    this.#aligned(content);
  }

  /** Name and content each end at a multiple of 4 bytes. */
  #aligned(bytes: Uint8Array): void {
    this.#parts.push(bytes, new Uint8Array(-bytes.length & 3));
  }
}
