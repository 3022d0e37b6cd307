//! Writes that the engine makes at once, in a thread that must not wait.

const std = @import("std");
const sys = @import("../linux.zig");
const sync = @import("../sync.zig");
const layout = @import("../layout.zig");
const engine = @import("engine.zig");
const harness = @import("engine_harness.zig");
const linux = sys.linux;
const expect = std.testing.expect;
const expectEqual = std.testing.expectEqual;

const Bench = harness.Bench;
const memfd = harness.memfd;
const memory_bytes = harness.memory_bytes;

/// Proves that a submission returns though memory is missing that it needs.
const Witness = struct {
    missing: harness.Missing,
    /// Filled by a witness whose submission does not return.
    bytes: []u8,
    /// Filled, when somebody has touched it, after a while.
    first: []u8 = &.{},
    has_returned: std.atomic.Value(u32) = .init(0),
    is_late: bool = false,
    thread: ?sync.Thread = null,

    /// The threads have a file for 5 s that a write has waited for so long.
    const nap: linux.timespec = .{ .sec = 0, .nsec = 50 * std.time.ns_per_ms };

    fn start(self: *Witness) void {
        self.thread = sync.Thread.spawn(run, self).?;
    }

    fn run(argument: ?*anyopaque) callconv(.c) ?*anyopaque {
        const self: *Witness = @ptrCast(@alignCast(argument.?));
        if (self.first.len > 0 and self.missing.isTouched()) {
            _ = linux.nanosleep(&nap, null);
            _ = self.missing.fill(self.first);
        }
        sync.futexWait(&self.has_returned, 0, 4000);
        self.is_late = self.has_returned.load(.acquire) == 0;
        if (self.is_late) _ = self.missing.fill(self.bytes);
        return null;
    }

    fn expectReturned(self: *Witness) !void {
        self.has_returned.store(1, .release);
        sync.futexWake(&self.has_returned, 1);
        self.thread.?.join();
        try expect(!self.is_late);
    }
};

test "a prompt write that waits is the only one: the file's next ones are left to threads" {
    const page = 4096;
    var bench = try Bench.init(.prompt, 4);
    const missing = try harness.Missing.init(bench.bytes) orelse {
        try bench.deinit();
        return error.SkipZigTest;
    };
    var witness: Witness = .{ .missing = missing, .first = bench.bytes[0..page], .bytes = bench.bytes[page..][0..page] };
    witness.start();
    try expectEqual(0, try bench.run(bench.request(layout.io_write, 0), &.{bench.segment(0, page, layout.access_read)}));

    var one = bench.request(layout.io_write, 0);
    one.segment_count = 1;
    try expectEqual(1, bench.submit(&.{one}, &.{bench.segment(page, page, layout.access_read)}));
    try witness.expectReturned();
    var done: [1]layout.IoCompletion = undefined;
    try expectEqual(0, engine.reap(bench.io, &done, 1));

    // Another file is written at once as before.
    var other = one;
    other.file = try memfd(page);
    try expectEqual(1, bench.submit(&.{other}, &.{bench.segment(0, page, layout.access_read)}));
    try expectEqual(1, engine.reap(bench.io, &done, 1));
    try expectEqual(0, done[0].result);
    sys.closeQuietly(other.file);

    try expect(missing.fill(bench.bytes[page..][0..page]));
    try bench.wait(&done);
    try expectEqual(0, done[0].result);
    missing.deinit();
    try bench.deinit();
}

test "prompt writes are made for a moment at a time, and the event says that there are more" {
    const count = 512;
    const length = 64 << 10; // 32 MiB in all: more than a moment anywhere
    for ([_]bool{ false, true }) |is_destroyed| {
        var bench = try Bench.init(.prompt, count);
        @memset(bench.bytes[0..length], 7);
        var requests: [count]layout.IoRequest = undefined;
        for (&requests, 0..) |*one, tag| {
            one.* = bench.request(layout.io_write, 0);
            one.segment_count = 1;
            one.tag = @intCast(tag);
        }
        const last = memory_bytes - length;
        requests[count - 1].offset = last;
        try expectEqual(count, bench.submit(&requests, &.{bench.segment(0, length, layout.access_read)}));
        var byte: [1]u8 = undefined;
        try expectEqual(1, linux.pread(bench.file, &byte, 1, last));
        try expectEqual(0, byte[0]);
        var done: [count]layout.IoCompletion = undefined;
        const first: usize = @intCast(engine.reap(bench.io, &done, count));
        try expect(first > 0 and first < count);
        try expect(bench.isReadable(0));
        if (is_destroyed) {
            try expectEqual(0, engine.destroy(bench.io));
            try expectEqual(1, linux.pread(bench.file, &byte, 1, last));
            try expectEqual(0, byte[0]);
            bench.io = @intCast(engine.create(1, 1));
        } else {
            try bench.wait(done[first..]);
            for (done) |completion| try expectEqual(0, completion.result);
            try expectEqual(1, linux.pread(bench.file, &byte, 1, last));
            try expectEqual(7, byte[0]);
        }
        try bench.deinit();
    }
}

test "a prompt write that is large or to be durable is left to a thread" {
    const large = 68 << 10;
    for ([_]u32{ 0, layout.flag_io_dsync }, [_]u32{ large, 4096 }) |flags, length| {
        var bench = try Bench.init(.prompt, 4);
        const missing = try harness.Missing.init(bench.bytes) orelse {
            try bench.deinit();
            return error.SkipZigTest;
        };
        var witness: Witness = .{ .missing = missing, .bytes = bench.bytes[0..large] };
        witness.start();
        var one = bench.request(layout.io_write, 0);
        one.flags |= flags;
        one.segment_count = 1;
        try expectEqual(1, bench.submit(&.{one}, &.{bench.segment(0, length, layout.access_read)}));
        try witness.expectReturned();
        try expect(missing.fill(bench.bytes[0..large]));
        var done: [1]layout.IoCompletion = undefined;
        try bench.wait(&done);
        try expectEqual(0, done[0].result);
        missing.deinit();
        try bench.deinit();
    }
}
