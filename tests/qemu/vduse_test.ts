/**
 * Devices of ours as devices of a guest's own kernel, with Deno and this
 * project in that guest: no virtual machine in between.
 */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { test } from "../harness.ts";
import { hasKernel } from "./cache.ts";
import { type Guest, startGuest } from "./guest.ts";
import { addProgram, projectFiles } from "./project_files.ts";

const MiB = 1 << 20;
const KILLS = 4;
/** Requests that must be in flight when a back-end is killed. */
const IN_FLIGHT = 6;

/** iproute2's, where this machine has it. */
const vdpaTool = ["/usr/sbin/vdpa", "/sbin/vdpa", "/usr/bin/vdpa"]
  .find((path) => existsSync(path));

function vduseTest(name: string, body: () => Promise<void>): void {
  if (hasKernel("vdpa")) return test(name, body, 600);
  test.skip(
    name,
    "there is no kernel with VDUSE, which Debian's backports have: node tools/setup.mjs guest",
  );
}

/** @param driver who takes what is on the vDPA bus */
function startVduseGuest(
  script: string,
  driver: "virtio_vdpa" | "vhost_vdpa" = "virtio_vdpa",
): Promise<Guest> {
  const files = projectFiles(["tests/qemu/shuffling_disk.ts"]);
  if (vdpaTool !== undefined) addProgram(files, "bin/vdpa", vdpaTool);
  return startGuest({
    kernel: "vdpa",
    memoryMb: 1536,
    extras: {
      modules: ["vduse", driver, "virtio_blk", "virtio_net", "tun"],
      programs: ["vhost_vdpa"],
      files,
    },
    lifetimeMs: 560_000,
    script: `
export HOME=/tmp DENO_DIR=/tmp/deno NO_COLOR=1
cd /project
# serve WORD PROGRAM...: in the background, until it says WORD. Its id is $pid.
serve() {
  word=$1; shift
  deno run --allow-all --no-check "$@" >/tmp/said 2>&1 & pid=$!
  for n in $(seq 1200); do
    grep -q "$word" /tmp/said && return
    [ -d /proc/$pid ] || break
    usleep 100000
  done
  cat /tmp/said; return 1
}
end() { kill -TERM $pid; wait $pid; cat /tmp/said; }
${script}
`,
  });
}

vduseTest(
  "a disk of ours is /dev/vda of the kernel itself: attached, detached, attached again",
  async () => {
    const commands = vdpaTool === undefined ? { remove: "", add: "" } : {
      remove: "vdpa dev del disk0",
      add: "vdpa dev add name disk0 mgmtdev vduse",
    };
    await using guest = await startVduseGuest(`
      truncate -s ${16 * MiB} /tmp/disk
      blk() { serve serving cli/main.ts blk --vduse disk0 --blk-file /tmp/disk "$@"; }
      blk --serial first
      wait_disk vda
      cat /sys/block/vda/serial; echo
      make_fs vda; write_files vda 10 64; remount_fs vda; check_files vda
      umount_fs vda
      if [ -n "${commands.remove}" ]; then
        ${commands.remove || ":"}
        wait_gone vda
        echo detached
        ${commands.add || ":"}
        wait_disk vda
        mount_fs vda; check_files vda; umount_fs vda
      fi
      end
      wait_gone vda
      echo left: $(ls /dev/vduse) $(ls /run/vhost2)
      # One that stays is there for the next.
      blk --stay --num-queues 2
      wait_disk vda
      end
      [ -b /dev/vda ]
      echo left: $(ls /dev/vduse) $(ls /run/vhost2)
      blk --num-queues 2
      verify mix /dev/vda --count=300 --size=${8 * MiB}
      end
      wait_gone vda
      echo left: $(ls /dev/vduse) $(ls /run/vhost2)
    `);
    const has = async (pattern: RegExp) => (await guest.waitFor(pattern))[0];
    await has(/^first$/);
    await has(/^vda: 10 checksums OK$/);
    if (vdpaTool !== undefined) {
      await has(/^detached$/);
      await has(/^vda: 10 checksums OK$/);
    }
    await has(/^left: control$/);
    await has(/^left: control disk0 disk0\.vduse$/);
    await has(/^verify mix ok/);
    await has(/^left: control$/);
    assert.equal(await guest.exited, 0);
    assert.doesNotMatch(guest.lines.join("\n"), /I\/O error|Cannot/);
  },
);

vduseTest(
  `back-ends killed ${KILLS} times with requests in flight lose nothing and complete nothing twice, in both formats`,
  async () => {
    await using guest = await startVduseGuest(`
      disk() {
        serve listening tests/qemu/shuffling_disk.ts $format /tmp/$format $format
      }
      load() {
        seed=1
        while [ ! -e /tmp/enough ]; do
          verify mix /dev/$disk --size=${12 * MiB} --depth=32 --count=200 \\
            --seed=$seed || return 1
          seed=$((seed + 1))
        done
      }
      # How many requests the log has: the first byte of each entry, behind
      # the file's first page and the queue's header, which is as long as one.
      in_flight() {
        hexdump -v -s $((4096 + $1)) -e "$1/1 \\"%02x\\" \\"\\n\\"" \\
          /run/vhost2/$format.vduse | grep -c ^01 || true
      }
      # Killed where it has enough in flight: what a stopped process has done
      # is what it would have been killed at.
      kill_busy() {
        for n in $(seq 400); do
          kill -STOP $pid
          found=$(in_flight $1)
          if [ $found -ge ${IN_FLIGHT} ]; then
            kill -KILL $pid; wait $pid || echo "killed with $found in flight"
            return
          fi
          kill -CONT $pid; usleep 40000
        done
        echo "never enough in flight"; return 1
      }
      for format in split packed; do
        [ $format = split ] && disk=vda || disk=vdb
        rm -f /tmp/enough
        truncate -s ${16 * MiB} /tmp/$format
        disk
        wait_disk $disk
        # Bit 34: RING_PACKED.
        echo "$format: packed $(cut -c35 /sys/block/$disk/device/features)"
        verify fill /dev/$disk --offset=${12 * MiB} --size=${4 * MiB}
        load & loading=$!
        [ $format = split ] && size=16 || size=32
        for round in $(seq ${KILLS}); do
          kill_busy $size
          disk
        done
        touch /tmp/enough
        wait $loading
        verify check /dev/$disk --offset=${12 * MiB} --size=${4 * MiB}
        echo "$format: done"
      done
    `);
    await guest.waitFor(/^split: packed 0$/);
    await guest.waitFor(/^split: done$/, { timeoutMs: 400_000 });
    await guest.waitFor(/^packed: packed 1$/);
    await guest.waitFor(/^packed: done$/, { timeoutMs: 400_000 });
    assert.equal(await guest.exited, 0);
    const said = guest.lines.join("\n");
    assert.equal(said.match(/^killed with/gm)?.length, 2 * KILLS);
    assert.doesNotMatch(said, /is not a head|out of range|I\/O error|FAILED/);
  },
);

vduseTest(
  "a network card of ours is one of the kernel itself: pinged, loaded, killed and taken up again",
  async () => {
    await using guest = await startVduseGuest(`
      card() {
        serve serving cli/main.ts net --vduse net0 --tap tap0 \\
          --mac 52:54:00:12:34:56
        # The same neighbour as before: the interface went with its process.
        ifconfig tap0 hw ether 02:00:00:00:00:01
        ifconfig tap0 10.0.0.1 netmask 255.255.255.0 up
      }
      # The input of nc must not end before what it receives does.
      mkfifo /tmp/quiet
      exec 3<>/tmp/quiet
      card
      for n in $(seq 1200); do [ -d /sys/class/net/eth0 ] && break; usleep 50000; done
      cat /sys/class/net/eth0/address
      # The card in a network of its own: both ends of the cable are here.
      unshare -n sleep 1000 & inner=$!
      network() { readlink /proc/$1/ns/net; }
      while [ "$(network $inner)" = "$(network $$)" ]; do usleep 20000; done
      inside() { nsenter -n -t $inner "$@"; }
      for n in $(seq 1200); do ip link set eth0 netns $inner && break; usleep 50000; done
      inside ifconfig eth0 10.0.0.2 netmask 255.255.255.0 up
      inside ping -c 3 -W 5 10.0.0.1 | grep transmitted
      dd if=/dev/urandom of=/tmp/data bs=1k count=2048 2>/dev/null
      transfer() {
        nc -l -p 5001 <&3 >/tmp/received & taker=$!
        while ! netstat -tln | grep -q :5001; do usleep 20000; done
        inside nc 10.0.0.1 5001 </tmp/data & sender=$!
        wait $taker
        kill $sender 2>/dev/null || true
        cmp /tmp/data /tmp/received && echo "$1: the same"
      }
      transfer first
      for round in 1 2 3; do
        # In the midst of frames of both directions.
        inside ping -i 0.01 -c 2000 -q 10.0.0.1 >/dev/null & pinging=$!
        usleep 300000
        kill -KILL $pid; wait $pid || true
        card
        kill $pinging 2>/dev/null || true; wait $pinging || true
        inside ping -c 3 -W 5 10.0.0.1 | grep transmitted
        transfer "round $round"
      done
      end
      inside sh -c "ls /sys/class/net 2>/dev/null | grep -c eth0" || true
      echo left: $(ls /dev/vduse)
      kill $inner
    `);
    const has = async (pattern: RegExp) => (await guest.waitFor(pattern))[0];
    await has(/^52:54:00:12:34:56$/);
    await has(/^3 packets transmitted, 3 packets received, 0% packet loss$/);
    await has(/^first: the same$/);
    for (const round of [1, 2, 3]) {
      await has(/^3 packets transmitted, [123] packets received/);
      await has(new RegExp(`^round ${round}: the same$`));
    }
    await has(/^left: control$/);
    assert.equal(await guest.exited, 0);
  },
);

vduseTest(
  "a disk of ours works in memory that the user of vhost_vdpa maps and unmaps, over resets and the ends of the back-end and of the user",
  async () => {
    await using guest = await startVduseGuest(
      `
      truncate -s ${4 * MiB} /tmp/disk
      disk() {
        serve serving cli/main.ts blk --vduse disk0 --blk-file /tmp/disk \\
          --num-queues 2
      }
      until_user() {
        for n in $(seq 1200); do
          grep -q "vhost_vdpa $1" /tmp/user && return
          usleep 50000
        done
        cat /tmp/user; return 1
      }
      device=/dev/vhost-vdpa-0
      disk
      for n in $(seq 1200); do [ -c $device ] && break; usleep 50000; done
      echo driver: $(basename $(readlink /sys/bus/vdpa/devices/disk0/driver))
      vhost_vdpa $device || { cat /tmp/said; exit 1; }
      # Requests are made while nobody serves the device.
      mkfifo /tmp/go
      vhost_vdpa $device /tmp/go >/tmp/user & user=$!
      until_user paused
      kill -KILL $pid; wait $pid || echo "back-end killed"
      echo >/tmp/go
      until_user submitted
      disk
      wait $user || { cat /tmp/said; exit 1; }
      cat /tmp/user
      # A back-end that is ended leaves the device to its user.
      vhost_vdpa $device /tmp/go >/tmp/user & user=$!
      until_user paused
      end
      disk
      echo >/tmp/go
      wait $user || { cat /tmp/said; exit 1; }
      cat /tmp/user
      # One that is killed leaves its rings and mappings to the kernel.
      rm /tmp/user
      vhost_vdpa $device /tmp/go >/tmp/user & user=$!
      until_user paused
      kill -KILL $user; wait $user || echo "user killed"
      vhost_vdpa $device
      end
      echo left: $(ls /dev/vduse) $(ls /run/vhost2) $(ls /dev | grep vhost-vdpa)
      `,
      "vhost_vdpa",
    );
    const has = async (pattern: RegExp) => (await guest.waitFor(pattern))[0];
    await has(/^driver: vhost_vdpa$/);
    await has(/^vhost_vdpa ok: /);
    await has(/^back-end killed$/);
    await has(/^vhost_vdpa ok: /);
    await has(/ it is attached, and waits for the next process/);
    await has(/^vhost_vdpa ok: /);
    await has(/^user killed$/);
    await has(/^vhost_vdpa ok: /);
    await has(/^left: control$/);
    assert.equal(await guest.exited, 0);
    const said = guest.lines.join("\n");
    assert.doesNotMatch(said, /FAILED|Cannot (?!destroy)/);
  },
);
