//! The load generator against the ring's device side: a disk in a thread.

const std = @import("std");
const layout = @import("../layout.zig");
const linux = @import("../linux.zig");
const sync = @import("../sync.zig");
const memory = @import("../memory/memory.zig");
const rings = @import("ring.zig");
const load = @import("load.zig");
const load_queues = @import("load_queues.zig");
const closeMemory = @import("fake_guest.zig").closeMemory;
const sys = linux.linux;
const expect = std.testing.expect;
const expectEqual = std.testing.expectEqual;

const memory_size = 4 << 20;
const gpa = 0x4000_0000;
const sectors = 1024;

const feature_packed: u64 = 1 << 34;

const Fault = enum { none, status, lost_write, lost_read, wrong_id, silent };

const Disk = struct {
    fd: i32,
    bytes: [*]u8,
    memory: u32,
    ring: u32,
    kick: i32,
    call: i32,
    fault: Fault,
    features: u64,
    /// Where the next run goes on, in a packed ring.
    position: u32 = 0x8000,
    stopping: std.atomic.Value(bool) = .init(false),
    thread: ?sync.Thread = null,
    content: [sectors * 512]u8 = @splat(0),
    words: [4096]u32 = undefined,

    const batch_max = 16;

    fn start(features: u64, fault: Fault) !*Disk {
        const self = try std.testing.allocator.create(Disk);
        const fd = linux.result(sys.memfd_create("disk", 0));
        try expect(fd >= 0);
        try expectEqual(0, sys.ftruncate(fd, memory_size));
        const raw = sys.mmap(null, memory_size, .{ .READ = true, .WRITE = true }, .{ .TYPE = .SHARED }, fd, 0);
        try expect(!linux.isError(raw));
        const handle: u32 = @intCast(memory.create(0));
        const requests = [1]layout.RegionRequest{.{ .gpa = gpa, .uva = gpa, .size = memory_size, .mmap_offset = 0, .address = 0, .fd = fd, .flags = 0 }};
        var prepared: layout.PrepareResult = undefined;
        try expect(memory.prepare(handle, layout.prepare_replace, &requests, 1, &prepared) >= 0);
        var retired: [4]u32 = undefined;
        try expect(memory.commit(handle, &retired, retired.len) >= 0);
        const config: layout.RingConfig = .{
            .descriptor_address = gpa,
            .available_address = gpa + 0x1000,
            .used_address = gpa + 0x2000,
            .features = features,
            .space = layout.space_gpa,
            .size = 64,
            .base = if (features & feature_packed != 0) 0x8000_8000 else 0,
            .header_bytes = 16,
            .trailer_bytes = 1,
            .flags = 0,
        };
        var reason: u32 = 0;
        const ring = rings.create(handle, &config, &reason);
        try expect(ring > 0);
        self.* = .{
            .fd = fd,
            .bytes = @ptrFromInt(raw),
            .memory = handle,
            .ring = @intCast(ring),
            .kick = linux.result(sys.eventfd(0, sys.EFD.NONBLOCK)),
            .call = linux.result(sys.eventfd(0, sys.EFD.NONBLOCK)),
            .fault = fault,
            .features = features,
        };
        self.thread = sync.Thread.spawn(serve, self);
        return self;
    }

    fn stop(self: *Disk) void {
        self.stopping.store(true, .release);
        signal(self.kick);
        self.thread.?.join();
        _ = rings.destroy(self.ring);
        closeMemory(self.memory);
        _ = sys.munmap(self.bytes, memory_size);
        for ([_]i32{ self.fd, self.kick, self.call }) |fd| linux.closeQuietly(fd);
        std.testing.allocator.destroy(self);
    }

    fn signal(fd: i32) void {
        const one: u64 = 1;
        _ = sys.write(fd, std.mem.asBytes(&one), 8);
    }

    fn serve(argument: ?*anyopaque) callconv(.c) ?*anyopaque {
        const self: *Disk = @ptrCast(@alignCast(argument.?));
        while (!self.stopping.load(.acquire)) {
            _ = rings.disarm(self.ring);
            while (true) {
                const count = if (self.fault == .silent) 0 else rings.pop(self.ring, &self.words, self.words.len, batch_max);
                if (count > 0) {
                    self.answer(@intCast(count));
                    continue;
                }
                if (count < 0 or rings.arm(self.ring) != 1 or self.fault == .silent) break;
            }
            var poll = [1]sys.pollfd{.{ .fd = self.kick, .events = sys.POLL.IN, .revents = 0 }};
            _ = sys.poll(&poll, 1, 10_000);
            var value: u64 = 0;
            _ = sys.read(self.kick, std.mem.asBytes(&value), 8);
        }
        return null;
    }

    fn answer(self: *Disk, count: u32) void {
        var done: [batch_max]layout.Completion = undefined;
        for (done[0..count], 0..) |*completion, i| {
            const words = self.words[i * 16 ..];
            const record: *align(4) layout.Request = @ptrCast(words);
            const segments: [*]align(4) layout.Segment = @ptrCast(self.words[batch_max * 16 ..]);
            var at = (words[14] | @as(u64, words[15]) << 32) * 512;
            for (segments[record.segment_first..][0 .. record.readable_count + record.writable_count]) |segment| {
                const bytes = self.bytesAt(segment.view, segment.offset, segment.length);
                const place = self.content[@intCast(at)..][0..segment.length];
                if (segment.access == layout.access_write) {
                    if (self.fault != .lost_read) @memcpy(bytes, place);
                } else if (self.fault != .lost_write or at != 4096) {
                    @memcpy(place, bytes);
                }
                at += segment.length;
            }
            self.bytesAt(record.trailer_view, record.trailer_offset, 1)[0] = if (self.fault == .status) 1 else 0;
            completion.* = .{ .head = record.head, .written = record.writable_bytes + 1 };
        }
        // Out of order, as a disk may.
        std.mem.reverse(layout.Completion, done[0..count]);
        if (self.fault == .wrong_id) {
            // The ring's own side refuses this, so write as a broken one would.
            if (self.features & feature_packed != 0) {
                std.mem.writeInt(u64, self.bytes[8..16], 0x8080_003f_0000_0000, .little);
            } else {
                std.mem.writeInt(u32, self.bytes[0x2004..0x2008], 63, .little);
                self.bytes[0x2002] = 1;
            }
            return;
        }
        if (rings.push(self.ring, &done, count) == 1) signal(self.call);
    }

    fn bytesAt(self: *Disk, view: u32, offset: u32, length: u32) []u8 {
        const object = memory.get(self.memory).?;
        const table = object.enter();
        defer object.leave();
        return table.pointerOf(view, offset, length).?[0..length];
    }

    fn loadConfig(self: *Disk) layout.LoadConfig {
        return .{
            .memory_address = @intFromPtr(self.bytes),
            .memory_size = memory_size,
            .memory_gpa = gpa,
            .descriptor_offset = 0,
            .available_offset = 0x1000,
            .used_offset = 0x2000,
            .data_offset = 0x10000,
            .features = self.features,
            .disk_sectors = sectors,
            .request_count = 500,
            .seed = 7,
            .queue_size = 64,
            .depth = 4,
            .request_bytes = 4096,
            .segment_count = 1,
            .duration_ms = 0,
            .timeout_ms = 10_000,
            .operation = layout.load_read,
            .flags = 0,
            .kick_fd = self.kick,
            .call_fd = self.call,
            .position = 0,
            .reserved = 0,
        };
    }

    fn drive(self: *Disk, config: *layout.LoadConfig, result: *layout.LoadResult) i32 {
        config.position = self.position;
        const code = load.run(config, result);
        if (self.features & feature_packed != 0) self.position = @intCast(result.position);
        return code;
    }
};

test "every way to drive a ring completes all requests and keeps the data" {
    for ([_]u64{ 0, 1 << 28, 1 << 29, 3 << 28, feature_packed, feature_packed | 1 << 28, feature_packed | 1 << 29, feature_packed | 3 << 28 }) |features| {
        const disk = try Disk.start(features, .none);
        defer disk.stop();
        var result: layout.LoadResult = undefined;
        for ([_]u32{ 0, layout.flag_load_spin }) |spin| {
            for ([_]u32{ 1, 3, 7 }) |segment_count| {
                var config = disk.loadConfig();
                config.segment_count = segment_count;
                config.flags = spin | layout.flag_load_verify;
                try expectEqual(0, disk.drive(&config, &result));
                try expectEqual(1000, result.requests);
                try expectEqual(0, result.errors);
                try expect(result.kicks > 0 and result.elapsed_ns > 0);
                config.flags = spin | layout.flag_load_verify | layout.flag_load_random;
                config.request_count = 0;
                config.request_bytes = 512;
                try expectEqual(0, disk.drive(&config, &result));
                try expectEqual(2 * sectors, result.requests);
                try expectEqual(0, result.errors);
            }
            for ([_]u32{ layout.load_read, layout.load_write, layout.load_flush }) |operation| {
                var config = disk.loadConfig();
                config.flags = spin | layout.flag_load_random;
                config.operation = operation;
                config.depth = 1;
                try expectEqual(0, disk.drive(&config, &result));
                try expectEqual(500, result.requests);
                try expect(result.p50_ns > 0 and result.p50_ns <= result.p99_ns and result.mean_ns > 0);
            }
        }
    }
}

test "a run ends after its duration with nothing outstanding" {
    for ([_]u64{ 1 << 29, feature_packed | 1 << 29 }) |features| {
        const disk = try Disk.start(features, .none);
        defer disk.stop();
        var result: layout.LoadResult = undefined;
        var config = disk.loadConfig();
        config.request_count = 0;
        config.duration_ms = 20;
        try expectEqual(0, disk.drive(&config, &result));
        try expect(result.elapsed_ns >= 20_000_000);
        try expect(result.requests > 0);
        try expectEqual(0, result.p50_ns);
        var state: layout.RingState = undefined;
        _ = rings.state(disk.ring, &state);
        try expectEqual(0, state.in_flight);
        try expectEqual(result.requests, state.pushed);
    }
}

test "a failed status and lost data are counted as errors" {
    const Case = struct { fault: Fault, errors: u64 };
    const cases = [_]Case{ .{ .fault = .status, .errors = 256 }, .{ .fault = .lost_write, .errors = 1 }, .{ .fault = .lost_read, .errors = 128 } };
    for (cases) |case| {
        const disk = try Disk.start(0, case.fault);
        defer disk.stop();
        var result: layout.LoadResult = undefined;
        var config = disk.loadConfig();
        config.flags = layout.flag_load_verify;
        config.request_count = 0;
        try expectEqual(0, disk.drive(&config, &result));
        try expectEqual(case.errors, result.errors);
    }
}

test "a peer that hangs or completes what it does not have ends the run" {
    const Case = struct { fault: Fault, errno: linux.E };
    for ([_]u32{ 0, layout.flag_load_spin }) |spin| {
        const cases = [_]Case{ .{ .fault = .silent, .errno = .TIMEDOUT }, .{ .fault = .wrong_id, .errno = .PROTO } };
        for (cases ++ cases, 0..) |case, i| {
            const disk = try Disk.start(if (i < cases.len) 0 else feature_packed, case.fault);
            defer disk.stop();
            var result: layout.LoadResult = undefined;
            var config = disk.loadConfig();
            if (case.fault == .silent) config.timeout_ms = 30;
            config.flags = spin;
            try expectEqual(linux.fail(case.errno), disk.drive(&config, &result));
            // What is left on the ring belongs to the failed run.
            config.depth = 1;
            if (case.fault == .silent) try expectEqual(linux.fail(.BUSY), disk.drive(&config, &result));
        }
    }
}

test "a configuration that cannot be is refused" {
    const disk = try Disk.start(0, .none);
    defer disk.stop();
    var result: layout.LoadResult = undefined;
    const fields = .{
        .{ "queue_size", 63 },
        .{ "queue_size", 0 },
        .{ "depth", 0 },
        .{ "depth", 22 },
        .{ "segment_count", 0 },
        .{ "segment_count", 0xffff_ffff },
        .{ "request_bytes", 100 },
        .{ "request_bytes", 0 },
        .{ "disk_sectors", 7 },
        .{ "timeout_ms", 0 },
        .{ "operation", 3 },
        .{ "call_fd", -1 },
        .{ "request_count", 0 },
        .{ "data_offset", memory_size - 4096 },
        .{ "data_offset", std.math.maxInt(u64) },
        .{ "used_offset", 0x2002 },
        .{ "memory_address", 0 },
    };
    inline for (fields) |field| {
        var config = disk.loadConfig();
        @field(config, field[0]) = field[1];
        try expectEqual(linux.fail(.INVAL), disk.drive(&config, &result));
    }
}

test "several queues are driven in turns, each to its own end" {
    for ([_]u64{ 1 << 29, feature_packed | 1 << 29 }) |features| {
        var disks: [3]*Disk = undefined;
        for (&disks) |*disk| disk.* = try Disk.start(features, .none);
        defer for (disks) |disk| disk.stop();
        var configs: [3]layout.LoadConfig = undefined;
        var results: [3]layout.LoadResult = undefined;
        for (disks, &configs, 1..) |disk, *config, i| {
            config.* = disk.loadConfig();
            config.flags = layout.flag_load_spin;
            config.request_count = 100 * i;
            config.position = disk.position;
        }
        // One of them ends by its duration.
        configs[2].request_count = 0;
        configs[2].duration_ms = 20;
        try expectEqual(0, load_queues.run(&configs, configs.len, &results));
        for (disks, results) |disk, result| {
            try expectEqual(0, result.errors);
            var state: layout.RingState = undefined;
            _ = rings.state(disk.ring, &state);
            try expectEqual(0, state.in_flight);
            try expectEqual(result.requests, state.pushed);
        }
        try expectEqual(100, results[0].requests);
        try expectEqual(200, results[1].requests);
        try expect(results[2].requests > 0 and results[2].elapsed_ns >= 20_000_000);
    }
}

test "of several queues one that hangs ends the run, and what cannot be is refused" {
    const good = try Disk.start(0, .none);
    defer good.stop();
    const bad = try Disk.start(0, .silent);
    defer bad.stop();
    var configs = [2]layout.LoadConfig{ good.loadConfig(), bad.loadConfig() };
    for (&configs) |*config| config.flags = layout.flag_load_spin;
    var results: [2]layout.LoadResult = undefined;
    configs[1].timeout_ms = 30;
    try expectEqual(linux.fail(.TIMEDOUT), load_queues.run(&configs, 2, &results));
    // What is left on the ring belongs to the failed run.
    try expectEqual(linux.fail(.BUSY), load_queues.run(&configs, 2, &results));
    configs[1].flags = 0;
    try expectEqual(linux.fail(.INVAL), load_queues.run(&configs, 2, &results));
    configs[1].flags = layout.flag_load_spin | layout.flag_load_verify;
    try expectEqual(linux.fail(.INVAL), load_queues.run(&configs, 2, &results));
    configs[1] = configs[0];
    configs[1].features = feature_packed;
    try expectEqual(linux.fail(.INVAL), load_queues.run(&configs, 2, &results));
    try expectEqual(linux.fail(.INVAL), load_queues.run(&configs, 0, &results));
    try expectEqual(linux.fail(.INVAL), load_queues.run(&configs, load_queues.queues_maximum + 1, &results));
}
