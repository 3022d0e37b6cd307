/** What `--help` prints. */
export const help = {
  all: `vhost2: virtual devices for virtual machines, in TypeScript

Usage: vhost2 COMMAND [OPTIONS]

Commands:
  blk          a disk (vhost-user-blk)
  net          a network card (vhost-user-net)
  vdpa         a virtio PCI device of this machine, for a guest of it
  bind         give a PCI device to this program, or back

Options:
  -h, --help     this text; "vhost2 blk --help" for a command's options
  -V, --version  the version
`,
  vdpa: `vhost2 vdpa: a virtio PCI device of this machine, for a virtual machine

Usage: vhost2 vdpa ADDRESS --socket-path PATH [OPTIONS]

  ADDRESS             of the device, such as 0000:00:06.0; "vhost2 bind" has
                      given it to this program

The socket, one of:
  --socket-path PATH  listen on a Unix socket at PATH
  --fd N              an inherited socket, listening or connected
  --connect           with --socket-path: connect to it instead

Options:
  --num-queues N      queues at most, 1 to 256 (all that the device has)
  --packed            offer packed rings too; they are relayed, which is slower
  -v, --verbose       show each message, one line each, on stderr
  -h, --help          this text
  -V, --version       the version

The device reads and writes the guest's memory by itself, through the IOMMU;
all of that memory is locked. SIGINT and SIGTERM stop it.
`,
  bind: `vhost2 bind: give a PCI device to vfio-pci, or back

Usage: vhost2 bind ADDRESS [--back]

  ADDRESS        of the device, such as 0000:00:05.0 ("lspci -D" lists them)
  --back         give it back to the kernel's own driver
  -h, --help     this text
  -V, --version  the version

Whatever uses the device loses it. The kernel must have vfio-pci ("modprobe
vfio-pci"), and an IOMMU that is on. Only root may.
`,
  blk: `vhost2 blk: a disk for QEMU and other virtual machine monitors

Usage: vhost2 blk --socket-path PATH --blk-file FILE [OPTIONS]

The front-end, one of:
  --socket-path PATH  listen on a Unix socket at PATH
  --fd N              an inherited socket, listening or connected
  --vduse NAME        this machine's kernel: a disk of its own, such as /dev/vda
  --connect           with --socket-path: connect to it instead
  --no-attach         with --vduse: leave "vdpa dev add" to somebody else
  --stay              with --vduse: when it stops, leave the device for the next

The disk, one of (SIZE in bytes, or with K, M, G or T):
  --blk-file FILE     a file or a block device
  --memory SIZE       memory of this process
  --null SIZE         answers at once and copies nothing, for measuring

Options:
  --read-only               refuse writes
  --num-queues N            queues at most, 1 to 256 (1)
  --serial TEXT             serial number, at most 20 bytes
  --logical-block-size N    512 or 4096 (what the disk asks for, mostly 512)
  --direct                  past the host's page cache (O_DIRECT)
  --postcopy                a guest may be migrated here by postcopy
  --workers N               threads that serve the queues; 0: the main one (0)
  --poll-us N               microseconds to look for more before sleeping (50)
  -v, --verbose             show each message, one line each, on stderr
  --print-capabilities      print what this program can do, as JSON, and end
  -h, --help                this text
  -V, --version             the version

SIGINT and SIGTERM stop it: requests in flight are finished first. A disk of
this machine's kernel is detached then, mounted or not.
`,
  net: `vhost2 net: a network card for QEMU and other virtual machine monitors

Usage: vhost2 net --socket-path PATH --tap NAME [OPTIONS]

The front-end, one of:
  --socket-path PATH  listen on a Unix socket at PATH; with --switch any number
                      of them, and any number of guests on each
  --fd N              an inherited socket, listening or connected
  --vduse NAME        this machine's kernel: a card of its own, such as eth0
  --connect           with --socket-path: connect to it instead
  --no-attach         with --vduse: leave "vdpa dev add" to somebody else
  --stay              with --vduse: when it stops, leave the device for the next

The other end of the cable, one of:
  --tap NAME          a TAP interface of this host, made if it is not there
  --switch NAME       a switch among all guests of this command
  --echo              swaps the addresses of each frame and sends it back
  --discard           takes everything, for measuring

Options:
  --pcap FILE           capture all frames in FILE, for Wireshark or tcpdump
  --num-queues N        queue pairs at most, 1 to 127 (1)
  --mac ADDRESS         the card's address, for front-ends that ask for it
  --mtu N               bytes in a frame, told to the guest, 68 to 65535
  --workers N           threads that serve the queue pairs; 0: the main one (0);
                        not with --switch, which is in one thread
  --poll-us N           microseconds to look for more before sleeping (50)
  -v, --verbose         show each message, one line each, on stderr
  --print-capabilities  print what this program can do, as JSON, and end
  -h, --help            this text
  -V, --version         the version

SIGINT and SIGTERM stop it.
`,
} as const;
