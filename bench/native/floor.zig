//! What no back-end can be faster than on this machine: copies of 4 KiB, a
//! cache line on its way between two processors, an eventfd written and read.
//!
//!   bench-native floor MILLISECONDS
//!
//! Prints a line for each: nanoseconds, then what it is.

const std = @import("std");
const core = @import("core.zig");
const linux = core.linux;
const coreCopy = core.module.copyBytes;

const block = 4096;
/// More than the processor's caches of its own hold.
const cold_bytes = 256 << 20;

extern fn memcpy(to: [*]u8, from: [*]const u8, length: usize) [*]u8;

fn libcCopy(to: [*]u8, from: [*]const u8, length: usize) void {
    _ = memcpy(to, from, length);
}

var budget_ns: u64 = 0;

/// Nanoseconds of one `step`, the least of several stretches: others' work only
/// adds to it.
fn timed(comptime step: anytype, context: anytype) f64 {
    const stretches = 10;
    var least: f64 = std.math.inf(f64);
    for (0..stretches) |_| {
        const begin = core.now();
        var count: u64 = 0;
        var time = begin;
        while (time - begin < budget_ns / stretches) {
            for (0..64) |_| step(context);
            count += 64;
            time = core.now();
        }
        least = @min(least, @as(f64, @floatFromInt(time - begin)) / @as(f64, @floatFromInt(count)));
    }
    return least;
}

fn print(nanoseconds: f64, comptime name: []const u8) void {
    var text: [128]u8 = undefined;
    const line = std.fmt.bufPrint(&text, "{d:.1} {s}\n", .{ nanoseconds, name }) catch unreachable;
    _ = linux.write(1, line.ptr, line.len);
}

const Copy = struct {
    to: [*]u8,
    from: [*]u8,
    /// Of `from`, and a multiple of `block`.
    size: u64,
    random: std.Random.SplitMix64 = .init(1),

    fn Step(comptime copy: anytype) type {
        return struct {
            fn step(self: *Copy) void {
                const blocks = self.size / block;
                const at: usize = @intCast(@as(u128, self.random.next()) * blocks >> 64);
                copy(self.to, self.from + at * block, block);
            }
        };
    }
};

/// One word that two threads pass to each other.
const Line = struct {
    turn: std.atomic.Value(u64) align(128) = .init(0),

    fn answer(self: *Line) void {
        pinTo(1);
        var expected: u64 = 1;
        while (true) {
            const seen = self.turn.load(.acquire);
            if (seen == std.math.maxInt(u64)) return;
            if (seen != expected) continue;
            self.turn.store(expected + 1, .release);
            expected += 2;
        }
    }

    fn roundTrip(self: *Line) void {
        const own = self.turn.load(.monotonic) + 1;
        self.turn.store(own, .release);
        while (self.turn.load(.acquire) == own) {}
    }
};

fn pinTo(cpu: u5) void {
    var set: linux.cpu_set_t = @splat(0);
    set[0] = @as(usize, 1) << cpu;
    linux.sched_setaffinity(0, &set) catch {};
}

fn eventfdPair(fd: i32) void {
    var value: u64 = 1;
    _ = linux.write(fd, std.mem.asBytes(&value), 8);
    _ = linux.read(fd, std.mem.asBytes(&value), 8);
}

fn shortCall(_: void) void {
    _ = linux.getppid();
}

pub fn main(arguments: *std.process.Args.Iterator) !void {
    budget_ns = try std.fmt.parseInt(u64, arguments.next() orelse "200", 10) * 1_000_000;
    const cpus = try std.Thread.getCpuCount();
    pinTo(0);

    const to = core.map(-1, block);
    const from = core.map(-1, cold_bytes);
    @memset(from[0..cold_bytes], 1);
    var hot: Copy = .{ .to = to, .from = from, .size = block };
    print(timed(Copy.Step(libcCopy).step, &hot), "copy of 4 KiB in the cache, libc's memcpy");
    print(timed(Copy.Step(coreCopy).step, &hot), "copy of 4 KiB in the cache, the core's");
    var cold: Copy = .{ .to = to, .from = from, .size = cold_bytes };
    print(timed(Copy.Step(libcCopy).step, &cold), "copy of 4 KiB of 256 MiB, libc's memcpy");
    print(timed(Copy.Step(coreCopy).step, &cold), "copy of 4 KiB of 256 MiB, the core's");

    // With one processor there is nobody to pass it to.
    if (cpus > 1) {
        var line: Line = .{};
        const other = try std.Thread.spawn(.{}, Line.answer, .{&line});
        print(timed(Line.roundTrip, &line), "a cache line to the other processor and back");
        line.turn.store(std.math.maxInt(u64), .release);
        other.join();
    }

    const fd: i32 = @intCast(core.must(core.resultOf(linux.eventfd(0, 0)), "make an eventfd"));
    print(timed(eventfdPair, fd), "an eventfd written and read");
    print(timed(shortCall, {}), "the shortest system call");
}
