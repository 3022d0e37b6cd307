//! Several queues driven in turns by one thread, as a guest's processor does
//! that has more than one of them: what one thread can drive is the same
//! whatever the number of queues, so that figures of one and of two compare.

const std = @import("std");
const layout = @import("../layout.zig");
const linux = @import("../linux.zig");
const load = @import("load.zig");
const split = @import("load_split.zig");
const packed_side = @import("load_packed.zig");

const LoadConfig = layout.LoadConfig;
const LoadResult = layout.LoadResult;

pub const queues_maximum = 16;
const feature_packed: u6 = 34;
/// Rounds between two looks at the clock.
const rounds_per_look = 256;

/// One result for each of `configs`, whose rings are of one format. They spin,
/// and do not verify: -EINVAL. Otherwise as `load.run`.
pub fn run(configs: [*]const LoadConfig, count: u32, results: [*]LoadResult) callconv(.c) i32 {
    if (count == 0 or count > queues_maximum) return linux.fail(.INVAL);
    const is_packed = load.has(&configs[0], feature_packed);
    for (configs[0..count], results[0..count]) |*config, *result| {
        result.* = std.mem.zeroes(LoadResult);
        const other_flags = config.flags & (layout.flag_load_verify | layout.flag_load_spin);
        if (!load.isUsable(config) or load.has(config, feature_packed) != is_packed or
            other_flags != layout.flag_load_spin) return linux.fail(.INVAL);
    }
    return if (is_packed) runOn(packed_side.Side, configs[0..count], results) else runOn(split.Side, configs[0..count], results);
}

fn runOn(comptime Side: type, configs: []const LoadConfig, results: [*]LoadResult) i32 {
    var drivers: [queues_maximum]load.Driver(Side) = undefined;
    var opened: usize = 0;
    defer for (drivers[0..opened]) |*driver| driver.close();
    for (configs, results, drivers[0..configs.len]) |*config, *result, *driver| {
        const refused = driver.open(config, result);
        if (refused < 0) return refused;
        opened += 1;
        driver.side.want(false);
    }
    return drive(Side, drivers[0..opened]);
}

fn drive(comptime Side: type, drivers: []load.Driver(Side)) i32 {
    var left: [queues_maximum]u64 = undefined;
    for (drivers, left[0..drivers.len]) |*driver, *count| count.* = driver.limit();
    var round: u32 = 0;
    while (true) {
        var in_flight: u32 = 0;
        for (drivers, left[0..drivers.len]) |*driver, *count| {
            if (count.* != 0) {
                const code = driver.send(driver.config.operation, .ignored, count);
                if (code < 0) return code;
            }
            const done = driver.reap(.ignored);
            if (done < 0) return done;
            if (done != 0) driver.progress_ns = 0;
            in_flight += driver.in_flight;
            if (driver.in_flight == 0 and count.* != 0) in_flight += 1;
        }
        if (in_flight == 0) return 0;
        round +%= 1;
        if (round % rounds_per_look != 0) {
            std.atomic.spinLoopHint();
            continue;
        }
        const time = load.now();
        for (drivers, left[0..drivers.len]) |*driver, *count| {
            if (time >= driver.end()) count.* = 0;
            if (driver.progress_ns == 0 or driver.in_flight == 0) driver.progress_ns = time;
            const limit_ns = @as(u64, driver.config.timeout_ms) * 1_000_000;
            if (time - driver.progress_ns > limit_ns and !driver.side.hasUsed()) return linux.fail(.TIMEDOUT);
        }
    }
}
