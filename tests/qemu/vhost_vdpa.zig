//! The guest's user of a vDPA disk of its kernel, in the place of a QEMU with
//! `vhost-vdpa-device-pci`: memory of its own that it maps by IOTLB messages,
//! two split rings in it, and virtio-blk requests, each checked.
//!
//!   vhost_vdpa /dev/vhost-vdpa-0 [FIFO]
//!
//! Runs the device twice, with a reset in between: as a QEMU does whose guest
//! has no IOMMU (ACCESS_PLATFORM not accepted, a batch of mappings before
//! DRIVER_OK), then with it, mappings one by one before all else, and rings
//! that begin elsewhere than at 0. In each, a mapping goes and other memory
//! comes at the same IOVA.
//!
//! With a FIFO it says `vhost_vdpa paused` in the midst of the first run and
//! waits for its writer, makes requests, says `vhost_vdpa submitted`, and waits
//! for them: the back-end may be another process by then.
//!
//! Ends with `vhost_vdpa ok: ...` and exit code 0, or with
//! `vhost_vdpa FAILED: ...` and exit code 1.

const std = @import("std");
const linux = std.os.linux;

const page_size = 4096;
const sector_size = 512;
const MiB = 1 << 20;
/// Requests in flight take turns on the queues.
const queue_count = 2;
const queue_size = 16;
/// Header, data, status.
const chain_length = 3;
const slots_per_queue = 4;
const slot_count = queue_count * slots_per_queue;
const request_size = 64 << 10;
/// For a request, also over the restart of a back-end.
const patience_ms = 90_000;

// <linux/vhost.h>
const VHOST_SET_OWNER = 0xaf01;
const VHOST_GET_FEATURES = 0x8008af00;
const VHOST_SET_FEATURES = 0x4008af00;
const VHOST_SET_VRING_NUM = 0x4008af10;
const VHOST_SET_VRING_ADDR = 0x4028af11;
const VHOST_SET_VRING_BASE = 0x4008af12;
const VHOST_GET_VRING_BASE = 0xc008af12;
const VHOST_SET_VRING_KICK = 0x4008af20;
const VHOST_SET_VRING_CALL = 0x4008af21;
const VHOST_SET_BACKEND_FEATURES = 0x4008af25;
const VHOST_GET_BACKEND_FEATURES = 0x8008af26;
const VHOST_VDPA_GET_DEVICE_ID = 0x8004af70;
const VHOST_VDPA_GET_STATUS = 0x8001af71;
const VHOST_VDPA_SET_STATUS = 0x4001af72;
const VHOST_VDPA_GET_CONFIG = 0x8008af73;
const VHOST_VDPA_SET_VRING_ENABLE = 0x4008af75;
const VHOST_VDPA_GET_VQS_COUNT = 0x8004af80;

const BACKEND_F_IOTLB_MSG_V2: u64 = 1 << 1;
const BACKEND_F_IOTLB_BATCH: u64 = 1 << 2;

const VringState = extern struct { index: u32, number: u32 };
const VringFile = extern struct { index: u32, fd: i32 };
const VringAddress = extern struct {
    index: u32,
    flags: u32 = 0,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64 = 0,
};
/// vhost_msg_v2.
const IotlbMessage = extern struct {
    version: u32 = 2,
    asid: u32 = 0,
    iova: u64 = 0,
    size: u64 = 0,
    address: u64 = 0,
    access: u8 = 0,
    kind: enum(u8) { update = 2, invalidate = 3, batch_begin = 5, batch_end = 6 },
    padding: [38]u8 = @splat(0),
};
const Capacity = extern struct { offset: u32 = 0, length: u32 = 8, sectors: u64 align(4) = 0 };

comptime {
    std.debug.assert(@sizeOf(VringAddress) == 40);
    std.debug.assert(@sizeOf(IotlbMessage) == 72);
    std.debug.assert(@sizeOf(Capacity) == 16);
}

// virtio 1.3, sections 2.1, 2.7 and 5.2.
const status_acknowledge = 1;
const status_driver = 2;
const status_driver_ok = 4;
const status_features_ok = 8;
const feature_version_1: u64 = 1 << 32;
const feature_access_platform: u64 = 1 << 33;
const id_block = 2;
const descriptor_next = 1;
const descriptor_write = 2;

const Descriptor = extern struct { address: u64, length: u32, flags: u16, next: u16 };
const Available = extern struct { flags: u16, index: u16, ring: [queue_size]u16 };
const UsedElement = extern struct { id: u32, length: u32 };
const Used = extern struct { flags: u16, index: u16, ring: [queue_size]UsedElement };
const Request = extern struct { kind: u32, reserved: u32 = 0, sector: u64 };
const Kind = enum(u32) { read = 0, write = 1 };

/// A part of the memory, and where the device finds it.
const Piece = struct {
    iova: u64,
    offset: u64,
    size: u64,
    access: u8 = read_write,

    const read_only = 1;
    const read_write = 3;
};

/// Where things are in a memory.
const Layout = struct {
    const size = 4 * MiB;
    const rings = 0;
    const ring_stride = 4 * page_size;
    const available = page_size;
    const used = 2 * page_size;
    /// Headers and status bytes.
    const headers = 64 << 10;
    const header_stride = 64;
    const status = 32;
    const control_size = 128 << 10;
    /// Data: what is written, and behind it what is read.
    const first = 1 * MiB;
    const second = 2 * MiB;
    const third = 3 * MiB;
};

pub fn main(init: std.process.Init.Minimal) u8 {
    const args = init.args.vector;
    if (args.len < 2) fail("no device", .{});
    var device: Device = .init(args[1]);
    device.run(.{
        .features = feature_version_1,
        .is_mapped_first = false,
        .is_batched = true,
        .base = 0,
        .iova = 0,
        .fifo = if (args.len > 2) args[2] else null,
    });
    device.run(.{
        .features = feature_version_1 | feature_access_platform,
        .is_mapped_first = true,
        .is_batched = false,
        // Runs over the end of what an index can be.
        .base = 65_530,
        .iova = 1 << 40,
        .fifo = null,
    });
    _ = linux.close(device.fd);
    print("vhost_vdpa ok: {d} requests, {d} interrupts\n", .{ device.requests, device.interrupts });
    return 0;
}

const Run = struct {
    features: u64,
    is_mapped_first: bool,
    is_batched: bool,
    base: u16,
    /// Where its IOVAs begin.
    iova: u64,
    fifo: ?[*:0]const u8,
};

const Device = struct {
    fd: i32,
    memory: []align(page_size) u8 = &.{},
    control: Piece = undefined,
    queues: [queue_count]Queue = undefined,
    /// Differs between any two that are written.
    seed: u64 = 0,
    requests: u64 = 0,
    interrupts: u64 = 0,

    fn init(path: [*:0]const u8) Device {
        const opened = linux.open(path, .{ .ACCMODE = .RDWR, .CLOEXEC = true }, 0);
        need(opened, "open the device");
        const device: Device = .{ .fd = @intCast(opened) };
        need(linux.ioctl(device.fd, VHOST_SET_OWNER, 0), "SET_OWNER");
        const wanted = BACKEND_F_IOTLB_MSG_V2 | BACKEND_F_IOTLB_BATCH;
        const offered = device.get(u64, VHOST_GET_BACKEND_FEATURES);
        expect("back-end features", wanted, offered & wanted);
        device.set(u64, VHOST_SET_BACKEND_FEATURES, wanted);
        expect("the device's id", id_block, device.get(u32, VHOST_VDPA_GET_DEVICE_ID));
        expect("queues", queue_count, device.get(u32, VHOST_VDPA_GET_VQS_COUNT));
        var capacity: Capacity = .{};
        device.ask(VHOST_VDPA_GET_CONFIG, &capacity, "GET_CONFIG");
        if (capacity.sectors * sector_size < slot_count * request_size) {
            fail("a disk of {d} sectors is too small", .{capacity.sectors});
        }
        return device;
    }

    fn run(device: *Device, options: Run) void {
        const fd = linux.memfd_create("memory", linux.MFD.CLOEXEC);
        need(fd, "make a memory");
        need(linux.ftruncate(@intCast(fd), Layout.size), "size a memory");
        device.memory = mapped(@intCast(fd));
        _ = linux.close(@intCast(fd));
        // Not in the order of the memory, and with gaps.
        device.control = .{ .iova = options.iova + (5 << 30), .offset = Layout.rings, .size = Layout.control_size };
        const first: Piece = .{ .iova = options.iova + (1 << 30), .offset = Layout.first, .size = MiB };
        const second: Piece = .{ .iova = options.iova + (9 << 30), .offset = Layout.second, .size = MiB };
        // As ROM: for the device it must be as good as absent, no more.
        const readable: Piece = .{
            .iova = options.iova + (2 << 30),
            .offset = Layout.control_size,
            .size = page_size,
            .access = Piece.read_only,
        };
        const pieces = [_]Piece{ device.control, first, second, readable };

        device.reset();
        if (options.is_mapped_first) device.map(&pieces, options.is_batched);
        device.setStatus(status_acknowledge | status_driver);
        device.negotiate(options.features);
        device.setStatus(status_acknowledge | status_driver | status_features_ok);
        for (&device.queues, 0..) |*queue, index| queue.* = .init(device, index, options.base);
        if (!options.is_mapped_first) device.map(&pieces, options.is_batched);
        device.setStatus(status_acknowledge | status_driver | status_features_ok | status_driver_ok);

        device.verify(first);
        device.verify(second);

        // While idle one goes, and what is left still works.
        device.send(.{ .kind = .invalidate, .iova = second.iova, .size = second.size });
        device.verify(first);
        // Other memory where it was: the old one must not change any more.
        const before = std.hash.Crc32.hash(device.bytesOf(second));
        const third: Piece = .{ .iova = second.iova, .offset = Layout.third, .size = MiB };
        device.map(&.{third}, false);
        device.verify(third);
        if (std.hash.Crc32.hash(device.bytesOf(second)) != before) {
            fail("memory was written to that is not mapped", .{});
        }
        // And once more in one batch, so that the device sees only the change.
        device.send(.{ .kind = .batch_begin });
        device.send(.{ .kind = .invalidate, .iova = second.iova, .size = second.size });
        device.update(second);
        device.send(.{ .kind = .batch_end });
        device.verify(second);

        if (options.fifo) |fifo| {
            print("vhost_vdpa paused\n", .{});
            waitFor(fifo);
            device.submit(.write, first);
            print("vhost_vdpa submitted\n", .{});
            device.finish(.write);
            device.readBack(first);
            device.verify(second);
        }

        for (&device.queues, 0..) |*queue, index| {
            var state: VringState = .{ .index = @intCast(index), .number = 0 };
            device.ask(VHOST_GET_VRING_BASE, &state, "GET_VRING_BASE");
            expect("where a ring stopped", queue.next, state.number);
        }
        device.reset();
        for (pieces) |piece| device.send(.{ .kind = .invalidate, .iova = piece.iova, .size = piece.size });
        for (&device.queues) |*queue| queue.close();
        need(linux.munmap(device.memory.ptr, device.memory.len), "unmap a memory");
    }

    fn reset(device: *Device) void {
        device.set(u8, VHOST_VDPA_SET_STATUS, 0);
        expect("the status after a reset", 0, device.get(u8, VHOST_VDPA_GET_STATUS));
    }

    fn setStatus(device: *Device, status: u8) void {
        device.set(u8, VHOST_VDPA_SET_STATUS, status);
        expect("the status", status, device.get(u8, VHOST_VDPA_GET_STATUS));
    }

    fn negotiate(device: *Device, features: u64) void {
        expect("features", features, device.get(u64, VHOST_GET_FEATURES) & features);
        device.set(u64, VHOST_SET_FEATURES, features);
    }

    fn map(device: *Device, pieces: []const Piece, is_batched: bool) void {
        if (is_batched) device.send(.{ .kind = .batch_begin });
        for (pieces) |piece| device.update(piece);
        if (is_batched) device.send(.{ .kind = .batch_end });
    }

    fn update(device: *Device, piece: Piece) void {
        device.send(.{
            .kind = .update,
            .iova = piece.iova,
            .size = piece.size,
            .address = @intFromPtr(device.bytesOf(piece).ptr),
            .access = piece.access,
        });
    }

    fn send(device: *Device, message: IotlbMessage) void {
        const result = linux.write(device.fd, std.mem.asBytes(&message).ptr, @sizeOf(IotlbMessage));
        if (linux.errno(result) != .SUCCESS) fail("IOTLB {t}: {t}", .{ message.kind, linux.errno(result) });
    }

    fn bytesOf(device: *Device, piece: Piece) []align(page_size) u8 {
        return @alignCast(device.memory[piece.offset..][0..piece.size]);
    }

    /// Writes to the disk out of a piece's first half, and reads into its second.
    fn verify(device: *Device, piece: Piece) void {
        device.submit(.write, piece);
        device.finish(.write);
        device.readBack(piece);
    }

    fn readBack(device: *Device, piece: Piece) void {
        const half = piece.size / 2;
        const bytes = device.bytesOf(piece);
        @memset(bytes[half..], 0xaa);
        device.submit(.read, piece);
        device.finish(.read);
        if (!std.mem.eql(u8, bytes[0..half], bytes[half..])) {
            fail("what was read at {x} is not what was written", .{piece.iova});
        }
    }

    fn submit(device: *Device, kind: Kind, piece: Piece) void {
        const half = piece.size / 2;
        if (kind == .write) {
            device.seed += 1;
            for (std.mem.bytesAsSlice(u64, device.bytesOf(piece)[0..half]), 0..) |*word, index| {
                word.* = mixed(device.seed << 32 | index);
            }
        }
        const data = piece.iova + if (kind == .read) half else 0;
        for (0..slot_count) |slot| {
            const queue = &device.queues[slot % queue_count];
            queue.add(device, kind, slot, data + slot * request_size);
        }
        for (&device.queues) |*queue| queue.kick();
        device.requests += slot_count;
    }

    /// Waits for all requests, each of which must be used once.
    fn finish(device: *Device, kind: Kind) void {
        for (&device.queues) |*queue| queue.finish(device, kind);
    }

    fn header(device: *Device, slot: usize) *Request {
        return @ptrCast(@alignCast(&device.memory[Layout.headers + slot * Layout.header_stride]));
    }

    fn statusByte(device: *Device, slot: usize) *u8 {
        return &device.memory[Layout.headers + slot * Layout.header_stride + Layout.status];
    }

    fn get(device: *const Device, comptime Value: type, comptime request: u32) Value {
        var value: Value = 0;
        device.ask(request, &value, std.fmt.comptimePrint("ioctl {x}", .{request}));
        return value;
    }

    fn set(device: *const Device, comptime Value: type, comptime request: u32, value: Value) void {
        var copy = value;
        device.ask(request, &copy, std.fmt.comptimePrint("ioctl {x}", .{request}));
    }

    fn ask(device: *const Device, request: u32, argument: anytype, what: []const u8) void {
        need(linux.ioctl(device.fd, request, @intFromPtr(argument)), what);
    }
};

const Queue = struct {
    descriptors: *[queue_size]Descriptor,
    available: *Available,
    used: *Used,
    kick_fd: i32,
    call_fd: i32,
    /// Of the available ring; all before it were used but those in flight.
    next: u16,
    used_index: u16,
    /// By slot of this queue.
    is_in_flight: [slots_per_queue]bool = @splat(false),

    fn init(device: *Device, index: usize, base: u16) Queue {
        const offset = Layout.rings + index * Layout.ring_stride;
        const iova = device.control.iova + offset;
        const memory = device.memory[offset..];
        const queue: Queue = .{
            .descriptors = @ptrCast(@alignCast(memory.ptr)),
            .available = @ptrCast(@alignCast(memory[Layout.available..].ptr)),
            .used = @ptrCast(@alignCast(memory[Layout.used..].ptr)),
            .kick_fd = eventfd(),
            .call_fd = eventfd(),
            .next = base,
            .used_index = base,
        };
        queue.available.index = base;
        queue.used.index = base;
        const number: u32 = @intCast(index);
        var state: VringState = .{ .index = number, .number = queue_size };
        device.ask(VHOST_SET_VRING_NUM, &state, "SET_VRING_NUM");
        state.number = base;
        device.ask(VHOST_SET_VRING_BASE, &state, "SET_VRING_BASE");
        var address: VringAddress = .{
            .index = number,
            .descriptors = iova,
            .available = iova + Layout.available,
            .used = iova + Layout.used,
        };
        device.ask(VHOST_SET_VRING_ADDR, &address, "SET_VRING_ADDR");
        var file: VringFile = .{ .index = number, .fd = queue.kick_fd };
        device.ask(VHOST_SET_VRING_KICK, &file, "SET_VRING_KICK");
        file.fd = queue.call_fd;
        device.ask(VHOST_SET_VRING_CALL, &file, "SET_VRING_CALL");
        state.number = 1;
        device.ask(VHOST_VDPA_SET_VRING_ENABLE, &state, "SET_VRING_ENABLE");
        return queue;
    }

    fn close(queue: *Queue) void {
        _ = linux.close(queue.kick_fd);
        _ = linux.close(queue.call_fd);
    }

    fn add(queue: *Queue, device: *Device, kind: Kind, slot: usize, data: u64) void {
        const own = slot / queue_count;
        const head: u16 = @intCast(own * chain_length);
        device.header(slot).* = .{ .kind = @intFromEnum(kind), .sector = slot * request_size / sector_size };
        device.statusByte(slot).* = 0xff;
        const header = device.control.iova + Layout.headers + slot * Layout.header_stride;
        queue.descriptors[head..][0..chain_length].* = .{
            .{ .address = header, .length = @sizeOf(Request), .flags = descriptor_next, .next = head + 1 },
            .{
                .address = data,
                .length = request_size,
                .flags = descriptor_next | if (kind == .read) @as(u16, descriptor_write) else 0,
                .next = head + 2,
            },
            .{ .address = header + Layout.status, .length = 1, .flags = descriptor_write, .next = 0 },
        };
        queue.available.ring[queue.next % queue_size] = head;
        queue.is_in_flight[own] = true;
        queue.next +%= 1;
        // The descriptors before the index: the device reads it first.
        @atomicStore(u16, &queue.available.index, queue.next, .release);
    }

    fn kick(queue: *Queue) void {
        const one: u64 = 1;
        need(linux.write(queue.kick_fd, std.mem.asBytes(&one).ptr, 8), "kick");
    }

    fn finish(queue: *Queue, device: *Device, kind: Kind) void {
        const length: u32 = if (kind == .read) request_size + 1 else 1;
        const index = for (&device.queues, 0..) |*other, n| {
            if (other == queue) break n;
        } else unreachable;
        while (queue.used_index != queue.next) {
            if (@atomicLoad(u16, &queue.used.index, .acquire) == queue.used_index) {
                queue.waitForCall(device);
                continue;
            }
            const element = queue.used.ring[queue.used_index % queue_size];
            queue.used_index +%= 1;
            const own = element.id / chain_length;
            if (element.id % chain_length != 0 or own >= slots_per_queue or !queue.is_in_flight[own]) {
                fail("descriptor {d} was used, and is not in flight", .{element.id});
            }
            queue.is_in_flight[own] = false;
            expect("bytes written", length, element.length);
            expect("a request's status", 0, device.statusByte(own * queue_count + index).*);
        }
    }

    fn waitForCall(queue: *Queue, device: *Device) void {
        var polled = [1]linux.pollfd{.{ .fd = queue.call_fd, .events = linux.POLL.IN, .revents = 0 }};
        const result = linux.poll(&polled, polled.len, patience_ms);
        need(result, "wait");
        if (result == 0) fail("no interrupt in {d} ms, with {d} of {d} used", .{
            patience_ms, queue.used_index, queue.next,
        });
        var count: u64 = 0;
        need(linux.read(queue.call_fd, std.mem.asBytes(&count).ptr, 8), "read an interrupt");
        device.interrupts += 1;
    }
};

/// For somebody to write to the FIFO, and to close it.
fn waitFor(fifo: [*:0]const u8) void {
    const opened = linux.open(fifo, .{ .ACCMODE = .RDONLY, .CLOEXEC = true }, 0);
    need(opened, "open the FIFO");
    var bytes: [16]u8 = undefined;
    while (true) {
        const count = linux.read(@intCast(opened), &bytes, bytes.len);
        need(count, "read the FIFO");
        if (count == 0) break;
    }
    _ = linux.close(@intCast(opened));
}

fn eventfd() i32 {
    const result = linux.eventfd(0, linux.EFD.CLOEXEC);
    need(result, "make an eventfd");
    return @intCast(result);
}

fn mapped(fd: i32) []align(page_size) u8 {
    const result = linux.mmap(null, Layout.size, .{ .READ = true, .WRITE = true }, .{ .TYPE = .SHARED }, fd, 0);
    need(result, "map a memory");
    return @as([*]align(page_size) u8, @ptrFromInt(result))[0..Layout.size];
}

fn mixed(counter: u64) u64 {
    const z = counter *% 0x9e3779b97f4a7c15;
    return (z ^ z >> 30) *% 0xbf58476d1ce4e5b9;
}

fn expect(what: []const u8, wanted: u64, found: u64) void {
    if (found != wanted) fail("{s}: {x} expected, {x} found", .{ what, wanted, found });
}

fn need(result: usize, what: []const u8) void {
    if (linux.errno(result) != .SUCCESS) fail("{s}: {t}", .{ what, linux.errno(result) });
}

fn fail(comptime format: []const u8, values: anytype) noreturn {
    print("vhost_vdpa FAILED: " ++ format ++ "\n", values);
    linux.exit_group(1);
}

fn print(comptime format: []const u8, values: anytype) void {
    var buffer: [256]u8 = undefined;
    const line = std.fmt.bufPrint(&buffer, format, values) catch "vhost_vdpa FAILED: line too long\n";
    _ = linux.write(1, line.ptr, line.len);
}
