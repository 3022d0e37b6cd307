//! Latencies: a cheap counter for each request, and their distribution.

const std = @import("std");
const builtin = @import("builtin");
const layout = @import("../layout.zig");

fn float(value: u64) f64 {
    return @floatFromInt(value);
}

/// A counter cheap enough for each request; its rate is found by comparing it
/// with the clock over the whole run.
pub inline fn ticks() u64 {
    switch (builtin.cpu.arch) {
        .x86_64 => {
            var low: u32 = undefined;
            var high: u32 = undefined;
            asm volatile ("rdtsc"
                : [low] "={eax}" (low),
                  [high] "={edx}" (high),
            );
            return @as(u64, high) << 32 | low;
        },
        .aarch64 => return asm volatile ("mrs %[ret], cntvct_el0"
            : [ret] "=r" (-> u64),
        ),
        else => @compileError("architecture not served"),
    }
}

/// Counts by value with 64 steps per power of two: within 1.6 %.
pub const Histogram = struct {
    const steps = 64;
    counts: [(64 - 5) * steps]u32 = @splat(0),
    total: u64 = 0,
    sum: u64 = 0,

    pub fn add(self: *Histogram, value: u64) void {
        self.counts[bucket(value)] +|= 1;
        self.total += 1;
        self.sum +|= value;
    }

    fn bucket(value: u64) usize {
        if (value < steps) return @intCast(value);
        const exponent = 63 - @clz(value);
        return (exponent - 5) * @as(usize, steps) + @as(usize, @intCast(value >> @intCast(exponent - 6))) - steps;
    }

    fn lowest(index: usize) u64 {
        if (index < steps) return index;
        return @as(u64, steps + index % steps) << @intCast(index / steps - 1);
    }

    fn quantile(self: *const Histogram, part: f64) u64 {
        const rank = part * float(self.total);
        var seen: u64 = 0;
        for (self.counts, 0..) |count, index| {
            seen += count;
            if (count != 0 and float(seen) >= rank) return lowest(index);
        }
        return 0;
    }

    pub fn report(self: *const Histogram, scale: f64, result: *layout.LoadResult) void {
        if (self.total == 0) return;
        result.p50_ns = @trunc(float(self.quantile(0.5)) * scale);
        result.p99_ns = @trunc(float(self.quantile(0.99)) * scale);
        result.mean_ns = @trunc(float(self.sum) / float(self.total) * scale);
    }
};

test "the histogram's buckets hold what falls into them" {
    for ([_]u64{ 0, 1, 63, 64, 65, 127, 128, 1000, 123_456_789, std.math.maxInt(u64) }) |value| {
        const from = Histogram.lowest(Histogram.bucket(value));
        try std.testing.expect(from <= value and value - from <= value / 64);
    }
    var histogram: Histogram = .{};
    for (1..101) |i| histogram.add(i);
    try std.testing.expectEqual(50, histogram.quantile(0.5));
    try std.testing.expectEqual(99, histogram.quantile(0.99));
}
