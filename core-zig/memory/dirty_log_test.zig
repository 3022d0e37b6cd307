//! The dirty log by itself: which bits are set, what is refused, and that
//! nobody goes by what was before a change.

const std = @import("std");
const linux = std.os.linux;
const sync = @import("../sync.zig");
const sys = @import("../linux.zig");
const layout = @import("../layout.zig");
const memory = @import("memory.zig");
const dirty_log = @import("dirty_log.zig");
const fault = @import("fault.zig");
const untrusted_event = @import("../untrusted_event.zig");
const given = @import("memory_test.zig");

const testing = std.testing;
const expectEqual = testing.expectEqual;
const page = dirty_log.page_size;

/// A log with the front-end's view of it.
pub const SharedLog = struct {
    fd: i32,
    bytes: []align(std.heap.page_size_min) u8,

    pub fn init(size: usize) SharedLog {
        const fd = given.memfd(size);
        const raw = linux.mmap(null, size, .{ .READ = true, .WRITE = true }, .{ .TYPE = .SHARED }, fd, 0);
        return .{ .fd = fd, .bytes = @as([*]align(std.heap.page_size_min) u8, @ptrFromInt(raw))[0..size] };
    }

    pub fn deinit(self: SharedLog) void {
        _ = linux.munmap(self.bytes.ptr, self.bytes.len);
        sys.closeQuietly(self.fd);
    }

    pub fn isSet(self: SharedLog, gpa: u64) bool {
        const bit = gpa / page;
        return self.bytes[bit / 8] >> @intCast(bit % 8) & 1 != 0;
    }

    /// How many bits are set; clears them.
    pub fn take(self: SharedLog) u32 {
        var count: u32 = 0;
        for (self.bytes) |*byte| count += @popCount(@atomicRmw(u8, byte, .Xchg, 0, .seq_cst));
        return count;
    }
};

fn create() u32 {
    return @intCast(memory.create(0));
}

fn setBase(handle: u32, log: SharedLog) !void {
    var result: layout.PrepareResult = undefined;
    try expectEqual(0, dirty_log.setBase(handle, log.fd, log.bytes.len, 0, &result));
}

test "a range marks each page that it touches, in the log and not beyond" {
    const handle = create();
    defer _ = memory.destroy(handle);
    // 64 KiB of log: 2 GiB of guest.
    const log: SharedLog = .init(0x1_0000);
    defer log.deinit();
    try setBase(handle, log);
    try expectEqual(0, dirty_log.mark(handle, 0, 1));
    try expectEqual(0, log.take());
    try expectEqual(0, dirty_log.setLogging(handle, 1));
    const top = std.math.maxInt(u64);
    const end: u64 = 0x1_0000 * 8 * page;
    const cases = [_]struct { u64, u64, u32 }{
        .{ 0, 0, 0 },           .{ 0, 1, 1 },               .{ page - 1, 2, 2 },            .{ 5 * page, page, 1 },
        .{ 7 * page, page, 1 }, .{ 6 * page, 4 * page, 4 }, .{ 3 * page, 200 * page, 200 }, .{ 8 * page, 4096 * page, 4096 },
        .{ end - 1, 1, 1 },     .{ end - 1, top, 1 },       .{ end, 1, 0 },                 .{ end, top, 0 },
        .{ top, 1, 0 },         .{ top, top, 0 },           .{ 0, top, 0x8_0000 },
    };
    for (cases) |case| {
        try expectEqual(0, dirty_log.mark(handle, case[0], case[1]));
        if (case[2] > 0) try testing.expect(log.isSet(case[0]));
        try expectEqual(case[2], log.take());
    }
    // Bits that are set stay, whoever set them.
    log.bytes[3] = 0x81;
    try expectEqual(0, dirty_log.mark(handle, 25 * page, 1));
    try expectEqual(0x83, log.bytes[3]);
    try expectEqual(0, dirty_log.setLogging(handle, 0));
    try expectEqual(0, dirty_log.mark(handle, 0, 1));
    try expectEqual(0, log.bytes[0]);
}

test "a log may begin at any byte of its file, and nothing around it changes" {
    const handle = create();
    defer _ = memory.destroy(handle);
    const log: SharedLog = .init(0x3000);
    defer log.deinit();
    var result: layout.PrepareResult = undefined;
    try expectEqual(0, dirty_log.setBase(handle, log.fd, 0x101, 0x1003, &result));
    try expectEqual(0, dirty_log.setLogging(handle, 1));
    try expectEqual(0, dirty_log.mark(handle, 0, std.math.maxInt(u64)));
    for (log.bytes, 0..) |byte, at| {
        try expectEqual(@as(u8, if (at >= 0x1003 and at < 0x1104) 0xff else 0), byte);
    }
}

test "a log that is not whole in a file of a safe kind is refused, and the one before stays" {
    const handle = create();
    defer _ = memory.destroy(handle);
    const log: SharedLog = .init(0x1000);
    defer log.deinit();
    try setBase(handle, log);
    try expectEqual(0, dirty_log.setLogging(handle, 1));
    const event: i32 = @intCast(linux.eventfd(0, 0));
    defer sys.closeQuietly(event);
    const top = std.math.maxInt(u64);
    const cases = [_]struct { i32, u64, u64, u32 }{
        .{ log.fd, 0, 0, layout.refuse_size_zero },
        .{ log.fd, 0x1001, 0, layout.refuse_file_too_small },
        .{ log.fd, 1, 0x1000, layout.refuse_file_too_small },
        .{ log.fd, 0x1000, top - 0xfff, layout.refuse_file_offset_wraps },
        .{ log.fd, top, 0x1000, layout.refuse_file_offset_wraps },
        .{ log.fd, top, 0, layout.refuse_file_too_small },
        .{ event, 1, 0, layout.refuse_file_kind },
        .{ -2, 1, 0, layout.refuse_mmap },
    };
    for (cases) |case| {
        var result: layout.PrepareResult = undefined;
        try testing.expect(dirty_log.setBase(handle, case[0], case[1], case[2], &result) < 0);
        try expectEqual(case[3], result.reason);
        try expectEqual(0, dirty_log.mark(handle, 0, 1));
        try expectEqual(1, log.take());
    }
    var result: layout.PrepareResult = undefined;
    try expectEqual(sys.fail(.BADF), dirty_log.setBase(0, log.fd, 1, 0, &result));
    try expectEqual(sys.fail(.INVAL), dirty_log.setRing(handle, dirty_log.queue_maximum, 1, 0));
    try expectEqual(sys.fail(.INVAL), dirty_log.markRing(handle, dirty_log.queue_maximum, 0, 1));
}

test "a log whose file shrinks breaks the device, and marking goes on over zeros" {
    try expectEqual(0, fault.install());
    const handle = create();
    defer _ = memory.destroy(handle);
    const log: SharedLog = .init(0x2000);
    defer log.deinit();
    try setBase(handle, log);
    try expectEqual(0, dirty_log.setLogging(handle, 1));
    given.resize(log.fd, 0);
    try expectEqual(@as(i32, layout.memory_ok), memory.state(handle));
    try expectEqual(0, dirty_log.mark(handle, 0, std.math.maxInt(u64)));
    try expectEqual(@as(i32, layout.memory_faulted), memory.state(handle));
    given.resize(log.fd, 0x2000);
    try expectEqual(0, log.take());
}

test "a ring is marked by its own switch, at the address that stands for it" {
    const handle = create();
    defer _ = memory.destroy(handle);
    const log: SharedLog = .init(0x1000);
    defer log.deinit();
    try setBase(handle, log);
    try expectEqual(0, dirty_log.setLogging(handle, 1));
    try expectEqual(0, dirty_log.markRing(handle, 1, 0, 1));
    try expectEqual(0, log.take());
    try expectEqual(0, dirty_log.setLogging(handle, 0));
    try expectEqual(0, dirty_log.setRing(handle, 1, 1, 9 * page));
    try expectEqual(0, dirty_log.markRing(handle, 0, 0, 1));
    try expectEqual(0, log.take());
    try expectEqual(0, dirty_log.markRing(handle, 1, page - 1, 2));
    try testing.expect(log.isSet(9 * page) and log.isSet(10 * page));
    try expectEqual(2, log.take());
    try expectEqual(0, dirty_log.setRing(handle, 1, 1, std.math.maxInt(u64)));
    try expectEqual(0, dirty_log.markRing(handle, 1, 4, 8));
    try expectEqual(0, log.take());
    try expectEqual(0, dirty_log.setRing(handle, 1, 0, 0));
    try expectEqual(0, dirty_log.markRing(handle, 1, 4, 8));
    try expectEqual(0, log.take());
}

test "the event is signalled when bits were set, and closed when another takes its place" {
    untrusted_event.prepare();
    const handle = create();
    const log: SharedLog = .init(0x1000);
    defer log.deinit();
    try setBase(handle, log);
    try expectEqual(0, dirty_log.setLogging(handle, 1));
    const event: i32 = @intCast(linux.eventfd(0, linux.EFD.NONBLOCK));
    defer sys.closeQuietly(event);
    const given_away: i32 = @intCast(linux.dup(event));
    try expectEqual(0, dirty_log.setEvent(handle, given_away));
    var count: u64 = 0;
    try expectEqual(0, dirty_log.mark(handle, 0, 2 * page));
    try expectEqual(8, linux.read(event, std.mem.asBytes(&count), 8));
    try expectEqual(1, count);
    // Nothing new.
    try expectEqual(0, dirty_log.mark(handle, 0, 1));
    try testing.expect(sys.isError(linux.read(event, std.mem.asBytes(&count), 8)));
    try expectEqual(0, dirty_log.setEvent(handle, @intCast(linux.dup(event))));
    try testing.expect(sys.isError(linux.fcntl(given_away, linux.F.GETFD, 0)));
    try expectEqual(0, memory.destroy(handle));
    try testing.expect(sys.isError(linux.fcntl(given_away + 1, linux.F.GETFD, 0)));
}

/// Marks without an end, in its own thread.
const Marker = struct {
    handle: u32,
    is_ended: std.atomic.Value(bool) = .init(false),
    rounds: std.atomic.Value(u32) = .init(0),

    fn run(argument: ?*anyopaque) callconv(.c) ?*anyopaque {
        const self: *Marker = @ptrCast(@alignCast(argument.?));
        while (!self.is_ended.load(.acquire)) {
            _ = dirty_log.mark(self.handle, 0, 64 * page);
            _ = dirty_log.markRing(self.handle, 0, 0, 8);
            _ = self.rounds.fetchAdd(1, .release);
        }
        return null;
    }

    fn waitRound(self: *Marker) void {
        const before = self.rounds.load(.acquire);
        while (self.rounds.load(.acquire) -% before < 2) _ = linux.sched_yield();
    }
};

test "after a change nobody marks in the log before it, nor by the switch before it" {
    const handle = create();
    defer _ = memory.destroy(handle);
    const logs: [2]SharedLog = .{ .init(0x1000), .init(0x1000) };
    defer for (logs) |log| log.deinit();
    try setBase(handle, logs[0]);
    try expectEqual(0, dirty_log.setLogging(handle, 1));
    var marker: Marker = .{ .handle = handle };
    const thread = sync.Thread.spawn(Marker.run, &marker).?;
    defer {
        marker.is_ended.store(true, .release);
        thread.join();
    }
    for (0..50) |round| {
        const next = logs[(round + 1) % 2];
        const old = logs[round % 2];
        try setBase(handle, next);
        _ = old.take();
        marker.waitRound();
        try expectEqual(0, old.take());
        try testing.expect(next.isSet(0));
        try expectEqual(0, dirty_log.setLogging(handle, 0));
        _ = next.take();
        marker.waitRound();
        try expectEqual(0, next.take());
        try expectEqual(0, dirty_log.setRing(handle, 0, 1, 100 * page));
        marker.waitRound();
        try expectEqual(0, dirty_log.setRing(handle, 0, 1, 200 * page));
        try testing.expect(next.isSet(100 * page));
        _ = next.take();
        marker.waitRound();
        try testing.expect(!next.isSet(100 * page) and next.isSet(200 * page));
        try expectEqual(0, dirty_log.setRing(handle, 0, 0, 0));
        try expectEqual(0, dirty_log.setLogging(handle, 1));
    }
}

/// Marks a ring, and counts how often none of its two addresses was marked.
const RingMarker = struct {
    handle: u32,
    log: SharedLog,
    rounds: std.atomic.Value(u32) = .init(0),
    lost: u32 = 0,

    fn run(argument: ?*anyopaque) callconv(.c) ?*anyopaque {
        const self: *RingMarker = @ptrCast(@alignCast(argument.?));
        for (0..5000) |round| {
            _ = dirty_log.markRing(self.handle, 0, 0, 8);
            self.lost += @intFromBool(self.log.take() != 1);
            self.rounds.store(@intCast(round + 1), .release);
        }
        return null;
    }
};

test "a ring whose address changes is marked at one or the other, never at none" {
    const handle = create();
    defer _ = memory.destroy(handle);
    const log: SharedLog = .init(64);
    defer log.deinit();
    try setBase(handle, log);
    try expectEqual(0, dirty_log.setRing(handle, 0, 1, 0));
    var marker: RingMarker = .{ .handle = handle, .log = log };
    const thread = sync.Thread.spawn(RingMarker.run, &marker).?;
    var address: u64 = 0;
    while (marker.rounds.load(.acquire) < 5000) : (address ^= 100 * page) {
        try expectEqual(0, dirty_log.setRing(handle, 0, 1, address));
    }
    thread.join();
    try expectEqual(0, marker.lost);
}
