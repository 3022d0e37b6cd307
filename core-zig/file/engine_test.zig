//! What an engine promises, proved for io_uring and for threads alike.

const std = @import("std");
const sys = @import("../linux.zig");
const sync = @import("../sync.zig");
const layout = @import("../layout.zig");
const memory = @import("../memory/memory.zig");
const engine = @import("engine.zig");
const harness = @import("engine_harness.zig");
const linux = sys.linux;
const expect = std.testing.expect;
const expectEqual = std.testing.expectEqual;

const Bench = harness.Bench;
const openFiles = harness.openFiles;
const memfd = harness.memfd;
const fill = harness.fill;
const memory_bytes = harness.memory_bytes;
const ways = std.enums.values(harness.Way);

fn pattern(bytes: []u8, seed: u64) void {
    var random = std.Random.DefaultPrng.init(seed);
    random.random().bytes(bytes);
}

test "data survives a round trip over many segments and odd offsets" {
    for (ways) |way| {
        var bench = Bench.init(way, 8) catch |e| if (e == error.SkipZigTest) continue else return e;
        // 1, 3 and enough segments to leave the row and the kernel's limit.
        for ([_]u32{ 1, 3, 64, 65, 1024, 2048 }, 1..) |segment_count, seed| {
            pattern(bench.bytes[0 .. memory_bytes / 2], seed);
            @memset(bench.bytes[memory_bytes / 2 ..], 0);
            var from: [2048]layout.Segment = undefined;
            var to: [2048]layout.Segment = undefined;
            var at: u32 = 1;
            for (0..segment_count) |index| {
                // An empty segment now and then; lengths not of any block.
                const length: u32 = if (index % 7 == 6) 0 else @intCast(101 + index % 13);
                from[index] = bench.segment(at, length, layout.access_read);
                to[index] = bench.segment(at + memory_bytes / 2, length, layout.access_write);
                at += length;
            }
            try expectEqual(0, try bench.run(bench.request(layout.io_write, 777), from[0..segment_count]));
            try expectEqual(0, try bench.run(bench.request(layout.io_read, 777), to[0..segment_count]));
            try expect(std.mem.eql(u8, bench.bytes[1..at], bench.bytes[memory_bytes / 2 + 1 ..][0 .. at - 1]));
            try expectEqual(0, bench.bytes[memory_bytes / 2 + at]);
        }
        try bench.deinit();
    }
}

test "O_DIRECT takes memory of any alignment, also more than is copied at once" {
    for (ways) |way| {
        var bench = Bench.init(way, 8) catch |e| if (e == error.SkipZigTest) continue else return e;
        const direct: u32 = @bitCast(linux.O{ .DIRECT = true });
        // Not every file system has it; the copies are the same without.
        _ = linux.fcntl(bench.file, linux.F.SETFL, direct);
        const total = 5 * 4096 * 16; // of which 64 KiB are copied at once
        pattern(bench.bytes[0 .. memory_bytes / 2], 7);
        for ([_]u32{ 4096, 1000, 4095 }) |step| {
            @memset(bench.bytes[memory_bytes / 2 ..], 0);
            var from: [400]layout.Segment = undefined;
            var to: [400]layout.Segment = undefined;
            const start: u32 = if (step == 4096) 0 else 3;
            var count: usize = 0;
            var at: u32 = 0;
            while (at < total) : (count += 1) {
                const length = @min(step, total - at);
                from[count] = bench.segment(start + at, length, layout.access_read);
                to[count] = bench.segment(memory_bytes / 2 + start + at, length, layout.access_write);
                at += length;
            }
            var write = bench.request(layout.io_write, 8192);
            write.alignment = 4096;
            try expectEqual(0, try bench.run(write, from[0..count]));
            var read = bench.request(layout.io_read, 8192);
            read.alignment = 4096;
            try expectEqual(0, try bench.run(read, to[0..count]));
            const half = memory_bytes / 2;
            try expect(std.mem.eql(u8, bench.bytes[start..][0..total], bench.bytes[half + start ..][0..total]));
            try expectEqual(0, bench.bytes[half + start + total]);
        }
        try bench.deinit();
    }
}

test "an alignment that no disk has is refused" {
    var bench = try Bench.init(.threads, 4);
    var one = bench.request(layout.io_read, 0);
    one.alignment = 8192;
    try expectEqual(sys.fail(.INVAL), try bench.run(one, &.{bench.segment(0, 512, layout.access_write)}));
    try bench.deinit();
}

test "a write-through write and a flush succeed" {
    for (ways) |way| {
        var bench = Bench.init(way, 4) catch |e| if (e == error.SkipZigTest) continue else return e;
        var one = bench.request(layout.io_write, 4096);
        one.flags |= layout.flag_io_dsync;
        pattern(bench.bytes[0..8192], 5);
        try expectEqual(0, try bench.run(one, &.{ bench.segment(0, 4096, layout.access_read), bench.segment(4096, 4096, layout.access_read) }));
        try expectEqual(0, try bench.run(bench.request(layout.io_flush, 0), &.{}));
        var back: [8192]u8 = undefined;
        try expectEqual(back.len, linux.pread(bench.file, &back, back.len, 4096));
        try expect(std.mem.eql(u8, &back, bench.bytes[0..8192]));
        try bench.deinit();
    }
}

test "each request completes once with its own tag, a batch larger than the engine in parts" {
    for (ways) |way| {
        var bench = Bench.init(way, 5) catch |e| if (e == error.SkipZigTest) continue else return e;
        for (0..64) |index| try fill(bench.file, @intCast(index * 512), &@as([512]u8, @splat(@intCast(index))));
        var requests: [64]layout.IoRequest = undefined;
        var segments: [64]layout.Segment = undefined;
        for (&requests, &segments, 0..) |*one, *segment, index| {
            const other: u32 = @intCast(63 - index);
            one.* = bench.request(if (index % 9 == 0) layout.io_flush else layout.io_read, other * 512);
            one.tag = other;
            one.segment_first = @intCast(index);
            one.segment_count = 1;
            segment.* = bench.segment(other * 512, 512, layout.access_write);
        }
        var seen: u64 = 0;
        var sent: usize = 0;
        while (~seen != 0) {
            const taken = bench.submit(requests[sent..], &segments);
            try expect(taken >= 0 and taken <= 5);
            sent += @intCast(taken);
            try expect(sent < 64 or ~seen != 0);
            var done: [2]layout.IoCompletion = undefined;
            const got: usize = @intCast(engine.reap(bench.io, &done, done.len));
            try expect(got > 0 or bench.isReadable(10_000));
            for (done[0..got]) |completion| {
                try expectEqual(0, completion.result);
                const bit = @as(u64, 1) << @intCast(completion.tag);
                try expectEqual(0, seen & bit);
                seen |= bit;
                const index = 63 - completion.tag;
                if (index % 9 != 0) try expectEqual(@as(u8, @intCast(completion.tag)), bench.bytes[completion.tag * 512 + 511]);
            }
        }
        try bench.deinit();
    }
}

test "a full engine takes nothing until something is reaped" {
    for (ways) |way| {
        var bench = Bench.init(way, 3) catch |e| if (e == error.SkipZigTest) continue else return e;
        const flushes: [7]layout.IoRequest = @splat(bench.request(layout.io_flush, 0));
        try expectEqual(3, bench.submit(&flushes, &.{}));
        try expectEqual(0, bench.submit(&flushes, &.{}));
        var done: [1]layout.IoCompletion = undefined;
        try bench.wait(&done);
        try expectEqual(1, bench.submit(&flushes, &.{}));
        var rest: [3]layout.IoCompletion = undefined;
        try bench.wait(&rest);
        try bench.deinit();
    }
}

test "a file that ends early is an I/O error" {
    for (ways) |way| {
        var bench = Bench.init(way, 4) catch |e| if (e == error.SkipZigTest) continue else return e;
        const segment = bench.segment(0, 4096, layout.access_write);
        try expectEqual(sys.fail(.IO), try bench.run(bench.request(layout.io_read, memory_bytes - 100), &.{segment}));
        try expectEqual(sys.fail(.IO), try bench.run(bench.request(layout.io_read, memory_bytes * 2), &.{segment}));
        try expectEqual(0, try bench.run(bench.request(layout.io_read, memory_bytes - 4096), &.{segment}));
        try bench.deinit();
    }
}

test "a file open for reading refuses writes, a closed one all" {
    for (ways) |way| {
        var bench = Bench.init(way, 4) catch |e| if (e == error.SkipZigTest) continue else return e;
        var path: [32]u8 = undefined;
        const name = try std.fmt.bufPrintZ(&path, "/proc/self/fd/{d}", .{bench.file});
        const read_only = sys.result(linux.open(name, .{ .ACCMODE = .RDONLY, .CLOEXEC = true }, 0));
        try expect(read_only >= 0);
        var one = bench.request(layout.io_write, 0);
        one.file = read_only;
        const segment = bench.segment(0, 512, layout.access_read);
        try expectEqual(sys.fail(.BADF), try bench.run(one, &.{segment}));
        sys.closeQuietly(read_only);
        try expectEqual(sys.fail(.BADF), try bench.run(one, &.{segment}));
        one.file = -1;
        try expectEqual(sys.fail(.BADF), try bench.run(one, &.{segment}));
        try bench.deinit();
    }
}

test "a discarded range reads as zeros and gives its blocks back" {
    for (ways) |way| {
        var bench = Bench.init(way, 4) catch |e| if (e == error.SkipZigTest) continue else return e;
        const data: [256 * 1024]u8 = @splat(0xaa);
        try fill(bench.file, 0, &data);
        const before = try bench.blocks();
        var one = bench.request(layout.io_discard, 4096);
        one.length = 128 * 1024;
        try expectEqual(0, try bench.run(one, &.{}));
        try expect(try bench.blocks() <= before - 128 * 2);
        var back: [256 * 1024]u8 = undefined;
        try expectEqual(back.len, linux.pread(bench.file, &back, back.len, 0));
        try expect(std.mem.allEqual(u8, back[0..4096], 0xaa));
        try expect(std.mem.allEqual(u8, back[4096..][0 .. 128 * 1024], 0));
        try expect(std.mem.allEqual(u8, back[4096 + 128 * 1024 ..], 0xaa));
        try bench.deinit();
    }
}

test "written zeroes keep their blocks unless they may be unmapped" {
    for (ways) |way| {
        for ([_]bool{ false, true }) |on_memfd| {
            for ([_]u32{ 0, layout.flag_io_unmap, layout.flag_io_dsync, layout.flag_io_unmap | layout.flag_io_dsync }) |flags| {
                var bench = Bench.init(way, 4) catch |e| if (e == error.SkipZigTest) continue else return e;
                // A memfd cannot zero a range, so zeros are written there:
                // more than one call's worth.
                const size: u64 = if (on_memfd) 9 << 20 else 512 * 1024;
                if (on_memfd) {
                    sys.closeQuietly(bench.file);
                    bench.file = try memfd(@intCast(size));
                }
                const data = try std.testing.allocator.alloc(u8, size);
                defer std.testing.allocator.free(data);
                @memset(data, 0xbb);
                try fill(bench.file, 0, data);
                const before = try bench.blocks();
                var one = bench.request(layout.io_write_zeroes, 4096);
                one.length = size - 8192;
                one.flags |= flags;
                try expectEqual(0, try bench.run(one, &.{}));
                const after = try bench.blocks();
                if (flags & layout.flag_io_unmap != 0) try expect(after < before) else try expect(after >= before);
                try expectEqual(size, linux.pread(bench.file, data.ptr, size, 0));
                try expect(std.mem.allEqual(u8, data[0..4096], 0xbb));
                try expect(std.mem.allEqual(u8, data[4096..][0 .. size - 8192], 0));
                try expect(std.mem.allEqual(u8, data[size - 4096 ..], 0xbb));
                try bench.deinit();
            }
        }
    }
}

test "a request that is wrong in itself completes with its error and hurts no other" {
    for (ways) |way| {
        var bench = Bench.init(way, 32) catch |e| if (e == error.SkipZigTest) continue else return e;
        const segments = [_]layout.Segment{
            bench.segment(0, 512, layout.access_write),
            bench.segment(memory_bytes - 511, 512, layout.access_write),
            bench.segment(0xffff_ffff, 0xffff_ffff, layout.access_write),
            .{ .view = 0x7fff_0000, .offset = 0, .length = 512, .access = layout.access_write },
            bench.segment(0, 512, layout.access_read),
        };
        const Case = struct { first: u32 = 0, count: u32 = 1, offset: u64 = 0, memory: u32, operation: u32 = layout.io_read, length: u64 = 0, result: i32 };
        const cases = [_]Case{
            .{ .memory = bench.guest, .result = 0 },
            .{ .memory = 0, .result = sys.fail(.INVAL) },
            .{ .memory = 0xffff_ffff, .result = sys.fail(.INVAL) },
            .{ .memory = bench.guest, .first = 1, .result = sys.fail(.FAULT) },
            .{ .memory = bench.guest, .first = 2, .result = sys.fail(.FAULT) },
            .{ .memory = bench.guest, .first = 3, .result = sys.fail(.FAULT) },
            .{ .memory = bench.guest, .first = 0, .count = 2, .result = sys.fail(.FAULT) },
            .{ .memory = bench.guest, .first = 4, .result = sys.fail(.INVAL) },
            .{ .memory = bench.guest, .first = 5, .result = sys.fail(.INVAL) },
            .{ .memory = bench.guest, .first = 1, .count = 0xffff_ffff, .result = sys.fail(.INVAL) },
            .{ .memory = bench.guest, .offset = 0xffff_ffff_ffff_ffff, .result = sys.fail(.INVAL) },
            .{ .memory = bench.guest, .offset = 0x7fff_ffff_ffff_ffff, .result = sys.fail(.INVAL) },
            .{ .memory = bench.guest, .operation = 99, .result = sys.fail(.INVAL) },
            .{ .memory = bench.guest, .operation = layout.io_discard, .offset = 1, .length = 0x7fff_ffff_ffff_ffff, .result = sys.fail(.INVAL) },
            .{ .memory = bench.guest, .count = 0, .result = 0 },
            .{ .memory = 0, .operation = layout.io_flush, .offset = 0xffff_ffff_ffff_ffff, .result = 0 },
            .{ .memory = bench.guest, .result = 0 },
        };
        var requests: [cases.len]layout.IoRequest = undefined;
        for (&requests, cases, 0..) |*one, case, index| {
            one.* = bench.request(case.operation, case.offset);
            one.segment_first = case.first;
            one.segment_count = case.count;
            one.memory = case.memory;
            one.length = case.length;
            one.tag = @intCast(index);
        }
        try expectEqual(@as(i32, cases.len), bench.submit(&requests, &segments));
        var done: [cases.len]layout.IoCompletion = undefined;
        try bench.wait(&done);
        for (done) |completion| try expectEqual(cases[completion.tag].result, completion.result);
        try expectEqual(@as(i32, @intCast(layout.memory_ok)), memory.state(bench.guest));
        try bench.deinit();
    }
}

test "a hole behind the mapping is -EFAULT, marks the memory faulted, and the engine goes on" {
    for (ways) |way| {
        for ([_]u32{ layout.io_read, layout.io_write }) |operation| {
            var bench = Bench.init(way, 4) catch |e| if (e == error.SkipZigTest) continue else return e;
            const access = if (operation == layout.io_read) layout.access_write else layout.access_read;
            try expect(!sys.isError(linux.ftruncate(bench.guest_fd, memory_bytes / 2)));
            // The first segment is there, so that the transfer comes up short.
            const segments = [_]layout.Segment{ bench.segment(0, 8192, access), bench.segment(memory_bytes / 2, 8192, access) };
            try expectEqual(sys.fail(.FAULT), try bench.run(bench.request(operation, 0), &segments));
            try expectEqual(@as(i32, @intCast(layout.memory_faulted)), memory.state(bench.guest));
            // Nothing goes from a faulted memory, now zeros, to the disk.
            const kept: [4096]u8 = @splat(0xcc);
            try fill(bench.file, 0, &kept);
            try expectEqual(sys.fail(.FAULT), try bench.run(bench.request(operation, 0), segments[0..1]));
            var back: [4096]u8 = undefined;
            try expectEqual(back.len, linux.pread(bench.file, &back, back.len, 0));
            try expect(std.mem.eql(u8, &back, &kept));
            try expectEqual(0, try bench.run(bench.request(layout.io_flush, 0), &.{}));
            try bench.deinit();
        }
    }
}

test "what a submission finishes itself is reaped without a signal" {
    for ([_]harness.Way{ .at_once, .prompt }) |way| {
        var bench = Bench.init(way, 8) catch |e| if (e == error.SkipZigTest) continue else return e;
        var one = bench.request(layout.io_write, 0);
        one.segment_count = 1;
        var wrong = one;
        wrong.memory = 0;
        @memset(bench.bytes[0..512], 1);
        try expectEqual(2, bench.submit(&.{ one, wrong }, &.{bench.segment(0, 512, layout.access_read)}));
        try expect(!bench.isReadable(0));
        var done: [3]layout.IoCompletion = undefined;
        try expectEqual(2, engine.reap(bench.io, &done, done.len));
        try expect(!bench.isReadable(0));
        try bench.deinit();
    }
}

test "the event is readable exactly while completions wait, once somebody has reaped" {
    for (ways) |way| {
        var bench = Bench.init(way, 8) catch |e| if (e == error.SkipZigTest) continue else return e;
        try expect(!bench.isReadable(0));
        const segments = [_]layout.Segment{bench.segment(0, 512, layout.access_write)};
        var one = bench.request(layout.io_read, 0);
        one.segment_count = 1;
        var wrong = one;
        wrong.memory = 0;
        for ([_]layout.IoRequest{ one, wrong }) |kind_of_request| {
            const requests: [4]layout.IoRequest = @splat(kind_of_request);
            try expectEqual(4, bench.submit(&requests, &segments));
            var left: i32 = 4;
            while (true) {
                // One by one: those that are left keep the event readable.
                var done: [1]layout.IoCompletion = undefined;
                left -= engine.reap(bench.io, &done, 1);
                if (left == 0) break;
                try expect(bench.isReadable(10_000));
            }
            var none: [1]layout.IoCompletion = undefined;
            try expectEqual(0, engine.reap(bench.io, &none, 1));
            try expect(!bench.isReadable(0));
        }
        try bench.deinit();
    }
}

test "an engine with requests in flight ends without waiting for ever" {
    for (ways) |way| {
        var bench = Bench.init(way, 64) catch |e| if (e == error.SkipZigTest) continue else return e;
        var requests: [64]layout.IoRequest = undefined;
        for (&requests) |*one| {
            one.* = bench.request(layout.io_write, 0);
            one.segment_count = 1;
        }
        try expectEqual(64, bench.submit(&requests, &.{bench.segment(0, memory_bytes, layout.access_read)}));
        try bench.deinit();
    }
}

test "a read that never ends is cancelled with its engine" {
    var bench = try Bench.init(.io_uring, 4);
    var ends: [2]i32 = undefined;
    try expect(!sys.isError(linux.pipe2(&ends, .{ .CLOEXEC = true })));
    var one = bench.request(layout.io_read, 0);
    one.file = ends[0];
    one.segment_count = 1;
    try expectEqual(1, bench.submit(&.{one}, &.{bench.segment(0, 512, layout.access_write)}));
    try expect(!bench.isReadable(20));
    const io = bench.io;
    try expectEqual(0, engine.destroy(io));
    try expectEqual(sys.fail(.BADF), engine.destroy(io));
    bench.io = @intCast(engine.create(1, 1));
    for (ends) |fd| sys.closeQuietly(fd);
    try bench.deinit();
}

test "an engine refuses sizes that it cannot have and handles that are dead" {
    try expectEqual(sys.fail(.INVAL), engine.create(0, 0));
    try expectEqual(sys.fail(.INVAL), engine.create(4097, 0));
    const io = engine.create(4096, 0);
    try expect(io > 0);
    try expectEqual(0, engine.submit(@intCast(io), null, 0, null, 0));
    try expectEqual(sys.fail(.FAULT), engine.submit(@intCast(io), null, 1, null, 0));
    try expectEqual(0, engine.destroy(@intCast(io)));
    var done: [1]layout.IoCompletion = undefined;
    try expectEqual(sys.fail(.BADF), engine.reap(@intCast(io), &done, 1));
    try expectEqual(sys.fail(.BADF), engine.submit(@intCast(io), null, 0, null, 0));
    try expectEqual(sys.fail(.BADF), engine.event(@intCast(io)));
    try expectEqual(sys.fail(.BADF), engine.kind(@intCast(io)));
}

/// Makes `io_uring_setup` of the calling thread fail with `code`. Returns
/// false where filters are not to be had.
fn refuseIoUring(code: linux.E) bool {
    const Instruction = extern struct { code: u16, jt: u8 = 0, jf: u8 = 0, k: u32 };
    const Program = extern struct { length: u16, first: [*]const Instruction };
    const load_word_absolute = 0x20;
    const jump_if_equal = 0x15;
    const answer = 0x06;
    const filter = [_]Instruction{
        .{ .code = load_word_absolute, .k = 0 },
        .{ .code = jump_if_equal, .jf = 1, .k = @intFromEnum(linux.SYS.io_uring_setup) },
        .{ .code = answer, .k = linux.SECCOMP.RET.ERRNO | @as(u32, @intFromEnum(code)) },
        .{ .code = answer, .k = linux.SECCOMP.RET.ALLOW },
    };
    const program: Program = .{ .length = filter.len, .first = &filter };
    if (sys.isError(linux.prctl(@intFromEnum(linux.PR.SET_NO_NEW_PRIVS), 1, 0, 0, 0))) return false;
    return !sys.isError(linux.seccomp(linux.SECCOMP.SET_MODE_FILTER, 0, &program));
}

test "where io_uring is refused, threads serve, and an exhausted process is told so" {
    const Try = struct {
        code: linux.E,
        is_filtered: bool = false,
        result: i32 = 0,
        kind: i32 = 0,
        fn run(argument: ?*anyopaque) callconv(.c) ?*anyopaque {
            const self: *@This() = @ptrCast(@alignCast(argument.?));
            self.is_filtered = refuseIoUring(self.code);
            self.result = engine.create(2, 0);
            if (self.result > 0) {
                self.kind = engine.kind(@intCast(self.result));
                _ = engine.destroy(@intCast(self.result));
            }
            return null;
        }
    };
    const open_before = openFiles();
    for ([_]linux.E{ .NOSYS, .PERM, .INVAL, .ACCES, .NOMEM, .MFILE }) |code| {
        var attempt: Try = .{ .code = code };
        sync.Thread.spawn(Try.run, &attempt).?.join();
        if (!attempt.is_filtered) return error.SkipZigTest;
        if (code == .MFILE) {
            try expectEqual(sys.fail(.MFILE), attempt.result);
        } else {
            try expectEqual(2, attempt.kind);
        }
    }
    try expectEqual(open_before, openFiles());
}

test "a thread that hangs delays the end only for a while and frees all when it wakes" {
    var bench = try Bench.init(.threads, 4);
    const missing = try harness.Missing.init(bench.bytes) orelse {
        try bench.deinit();
        return error.SkipZigTest;
    };
    var requests: [4]layout.IoRequest = @splat(bench.request(layout.io_read, 0));
    for (&requests) |*one| one.segment_count = 1;
    try expectEqual(4, bench.submit(&requests, &.{bench.segment(0, 4096, layout.access_write)}));
    // The fault has been reported: a thread is in it.
    try expect(missing.isTouched());
    try expectEqual(sys.fail(.TIMEDOUT), engine.destroy(bench.io));
    try expectEqual(1, engine.hung.load(.acquire));

    missing.deinit();
    while (engine.hung.load(.acquire) != 0) sync.futexWait(&engine.hung, 1, 1000);
    bench.io = @intCast(engine.create(1, 1));
    try bench.deinit();
}
