//! What the engine's tests stand on: an engine, a guest memory, a file.

const std = @import("std");
const sys = @import("../linux.zig");
const layout = @import("../layout.zig");
const memory = @import("../memory/memory.zig");
const engine = @import("engine.zig");
const linux = sys.linux;
const expect = std.testing.expect;
const expectEqual = std.testing.expectEqual;

pub const memory_bytes = 1 << 20;

pub fn openFiles() u32 {
    var count: u32 = 0;
    for (0..1024) |fd| {
        if (!sys.isError(linux.fcntl(@intCast(fd), linux.F.GETFD, 0))) count += 1;
    }
    return count;
}

/// An unnamed file on the disk, if that can be had: a memfd cannot zero a
/// range. Where there is none, the fallback is what gets tested.
pub fn temporaryFile(size: i64) !i32 {
    const flags: linux.O = .{ .ACCMODE = .RDWR, .CLOEXEC = true, .DIRECTORY = true, .TMPFILE = true };
    const fd = sys.result(linux.open("/var/tmp", flags, 0o600));
    if (fd < 0) return memfd(size);
    if (sys.isError(linux.ftruncate(fd, size))) return error.Resize;
    return fd;
}

pub fn memfd(size: i64) !i32 {
    const fd = sys.result(linux.memfd_create("vhost2-test", linux.MFD.CLOEXEC));
    if (fd < 0) return error.Open;
    if (sys.isError(linux.ftruncate(fd, size))) return error.Resize;
    return fd;
}

pub fn fill(fd: i32, offset: i64, bytes: []const u8) !void {
    try expectEqual(bytes.len, linux.pwrite(fd, bytes.ptr, bytes.len, offset));
}

/// The ways that a request can take.
pub const Way = enum { io_uring, threads, threads_beside, at_once, prompt };

/// One engine, one guest memory with one region, one file.
pub const Bench = struct {
    io: u32,
    guest: u32,
    guest_fd: i32,
    file: i32,
    view: u32,
    bytes: []u8,
    open_before: u32,
    /// Of every request.
    flags: u32,

    pub fn init(way: Way, entries: u32) !Bench {
        const open_before = openFiles();
        const io = engine.create(entries, @intFromBool(way == .threads));
        try expect(io > 0);
        const kind_threads = 2;
        if ((engine.kind(@intCast(io)) == kind_threads) != (way == .threads)) {
            _ = engine.destroy(@intCast(io));
            return error.SkipZigTest;
        }
        const guest_fd = try memfd(memory_bytes);
        const guest: u32 = @intCast(memory.create(0));
        const regions = [1]layout.RegionRequest{.{ .gpa = 0, .uva = 0x10000, .size = memory_bytes, .mmap_offset = 0, .address = 0, .fd = guest_fd, .flags = 0 }};
        var result: layout.PrepareResult = undefined;
        try expect(memory.prepare(guest, layout.prepare_replace, &regions, 1, &result) >= 0);
        var retired: [4]u32 = undefined;
        try expect(memory.commit(guest, &retired, retired.len) >= 0);
        var info: [1]layout.RegionInfo = undefined;
        try expectEqual(1, memory.regions(guest, &info, 1));
        const address: [*]u8 = @ptrFromInt(info[0].address);
        return .{
            .io = @intCast(io),
            .guest = guest,
            .guest_fd = guest_fd,
            .file = try temporaryFile(memory_bytes),
            .view = info[0].view_first,
            .bytes = address[0..memory_bytes],
            .open_before = open_before,
            .flags = switch (way) {
                .io_uring, .threads => 0,
                .threads_beside => layout.flag_io_threaded,
                .at_once => layout.flag_io_inline,
                .prompt => layout.flag_io_prompt,
            },
        };
    }

    /// Also proves that nothing is left open.
    pub fn deinit(self: *Bench) !void {
        try expectEqual(0, engine.destroy(self.io));
        var result: layout.PrepareResult = undefined;
        try expectEqual(0, memory.prepare(self.guest, layout.prepare_replace, null, 0, &result));
        var retired: [1]u32 = undefined;
        try expectEqual(1, memory.commit(self.guest, &retired, 1));
        // 0: no I/O holds it.
        try expectEqual(0, memory.release(self.guest, retired[0], 1));
        try expectEqual(0, memory.destroy(self.guest));
        sys.closeQuietly(self.file);
        sys.closeQuietly(self.guest_fd);
        try expectEqual(self.open_before, openFiles());
    }

    pub fn segment(self: *const Bench, offset: u32, length: u32, access: u32) layout.Segment {
        return .{ .view = self.view, .offset = offset, .length = length, .access = access };
    }

    pub fn request(self: *const Bench, operation: u32, offset: u64) layout.IoRequest {
        return .{ .operation = operation, .file = self.file, .offset = offset, .length = 0, .segment_first = 0, .segment_count = 0, .tag = 0, .flags = self.flags, .memory = self.guest, .alignment = 0 };
    }

    pub fn submit(self: *const Bench, requests: []const layout.IoRequest, segments: []const layout.Segment) i32 {
        return engine.submit(self.io, requests.ptr, @intCast(requests.len), segments.ptr, @intCast(segments.len));
    }

    pub fn isReadable(self: *const Bench, timeout_ms: i32) bool {
        var waits = [1]linux.pollfd{.{ .fd = engine.event(self.io), .events = linux.POLL.IN, .revents = 0 }};
        return linux.poll(&waits, 1, timeout_ms) == 1;
    }

    /// Reaps, and waits on the event, until `out` is full.
    pub fn wait(self: *const Bench, out: []layout.IoCompletion) !void {
        var count: usize = 0;
        while (count < out.len) {
            const got = engine.reap(self.io, out.ptr + count, @intCast(out.len - count));
            try expect(got >= 0);
            count += @intCast(got);
            if (count < out.len and !self.isReadable(10_000)) return error.Lost;
        }
    }

    /// One request to its end.
    pub fn run(self: *const Bench, one: layout.IoRequest, segments: []const layout.Segment) !i32 {
        var whole = one;
        whole.segment_count = @intCast(segments.len);
        whole.tag = 0xfeed;
        try expectEqual(1, self.submit(&.{whole}, segments));
        var done: [1]layout.IoCompletion = undefined;
        try self.wait(&done);
        try expectEqual(0xfeed, done[0].tag);
        return done[0].result;
    }

    pub fn blocks(self: *const Bench) !u64 {
        var stat: linux.Statx = undefined;
        // Delayed allocation counts no block before the data is written.
        if (sys.isError(linux.fsync(self.file))) return error.Sync;
        if (sys.isError(linux.statx(self.file, "", linux.AT.EMPTY_PATH, linux.STATX.BASIC_STATS, &stat))) return error.Stat;
        return stat.blocks;
    }
};

/// Memory whose pages stop who touches them until they are filled.
pub const Missing = struct {
    user_fault: i32,

    const ioctl_api = 0xc018aa3f;
    const ioctl_register = 0xc020aa00;
    const ioctl_zeropage = 0xc020aa04;
    const mode_missing = 1;

    /// Of `bytes`, which nobody has touched. Faults in the kernel are for the
    /// privileged: null where that is not permitted.
    pub fn init(bytes: []u8) !?Missing {
        const flags: linux.O = .{ .CLOEXEC = true, .NONBLOCK = true };
        const user_fault = sys.result(linux.syscall1(.userfaultfd, @as(u32, @bitCast(flags))));
        if (user_fault < 0) return null;
        var api = [3]u64{ 0xaa, 0, 0 };
        try expect(!sys.isError(linux.ioctl(user_fault, ioctl_api, @intFromPtr(&api))));
        var range = [4]u64{ @intFromPtr(bytes.ptr), bytes.len, mode_missing, 0 };
        try expect(!sys.isError(linux.ioctl(user_fault, ioctl_register, @intFromPtr(&range))));
        return .{ .user_fault = user_fault };
    }

    /// Who is in a page then goes on without one.
    pub fn deinit(self: Missing) void {
        sys.closeQuietly(self.user_fault);
    }

    /// Waits until somebody has touched a page.
    pub fn isTouched(self: Missing) bool {
        var waits = [1]linux.pollfd{.{ .fd = self.user_fault, .events = linux.POLL.IN, .revents = 0 }};
        return linux.poll(&waits, 1, 10_000) == 1;
    }

    /// With zeros.
    pub fn fill(self: Missing, page: []u8) bool {
        var range = [4]u64{ @intFromPtr(page.ptr), page.len, 0, 0 };
        return !sys.isError(linux.ioctl(self.user_fault, ioctl_zeropage, @intFromPtr(&range)));
    }
};
