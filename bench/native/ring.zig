//! What the core itself costs: requests popped and pushed in batches of 64, by
//! one thread that is the driver too and writes nothing anew but avail.idx.
//!
//!   bench-native ring MILLISECONDS REGIONS SEGMENTS
//!
//! Prints nanoseconds per request: pop, push. Each request has a header, SEGMENTS
//! buffers of 4 KiB and a status, in an indirect table; the buffers are spread at
//! random over guest memory of REGIONS regions.

const std = @import("std");
const core = @import("core.zig");
const layout = core.layout;
const linux = core.linux;

const pop = core.function("ring_pop");
const push = core.function("ring_push");

const size = 256;
const batch = 64;
const memory_size: u64 = 64 << 20;
const regions_maximum = 509;
const segments_maximum = 8;
const header_bytes = 16;
const record_words = @sizeOf(layout.Request) / 4 + header_bytes / 4;

/// Where things are in guest memory.
const available = 0x2000;
const used = 0x3000;
const tables = 0x10000;
const headers = 0x40000;
const buffers = 0x100000;

const flag_next = 1;
const flag_write = 2;
const flag_indirect = 4;
const Descriptor = extern struct { address: u64, length: u32, flags: u16, next: u16 };

var words: [batch * record_words + 2048 * 4]u32 = undefined;

fn make(bytes: [*]align(4096) u8, segments: u32, random: *std.Random.SplitMix64) void {
    const ring: *[size]Descriptor = @ptrCast(bytes);
    const order: *[size]u16 = @ptrCast(@alignCast(bytes + available + 4));
    const count = segments + 2;
    for (ring, order, 0..) |*entry, *head, i| {
        head.* = @intCast(i);
        const table = tables + i * 16 * (segments_maximum + 2);
        entry.* = .{ .address = table, .length = count * 16, .flags = flag_indirect, .next = 0 };
        const chain: [*]Descriptor = @ptrCast(@alignCast(bytes + table));
        chain[0] = .{ .address = headers + i * 64, .length = header_bytes, .flags = flag_next, .next = 1 };
        for (1..segments + 1) |j| {
            const pages = (memory_size - buffers) / 4096;
            const page: u64 = @truncate(@as(u128, random.next()) * pages >> 64);
            chain[j] = .{ .address = buffers + page * 4096, .length = 4096, .flags = flag_next | flag_write, .next = @intCast(j + 1) };
        }
        chain[count - 1] = .{ .address = headers + i * 64 + 16, .length = 1, .flags = flag_write, .next = 0 };
    }
}

pub fn main(arguments: *std.process.Args.Iterator) !void {
    const budget_ns = try std.fmt.parseInt(u64, arguments.next() orelse "200", 10) * 1_000_000;
    const regions = try std.fmt.parseInt(u32, arguments.next() orelse "1", 10);
    const segments = try std.fmt.parseInt(u32, arguments.next() orelse "1", 10);
    if (regions == 0 or regions > regions_maximum or segments == 0 or segments > segments_maximum) return error.OutOfRange;

    const fd: i32 = @intCast(core.must(core.resultOf(linux.memfd_create("bench", 0)), "make a memory file"));
    _ = core.must(core.resultOf(linux.ftruncate(fd, memory_size)), "give the file a size");
    const bytes = core.map(fd, memory_size);
    const handle = core.openMemory(fd, memory_size, regions_maximum, regions);
    const config: layout.RingConfig = .{
        .descriptor_address = 0,
        .available_address = available,
        .used_address = used,
        .features = 1 << 28,
        .space = layout.space_gpa,
        .size = size,
        .base = 0,
        .header_bytes = header_bytes,
        .trailer_bytes = 1,
        .flags = 0,
    };
    var random: std.Random.SplitMix64 = .init(1);
    make(bytes, segments, &random);
    var reason: u32 = 0;
    const ring = core.must(core.function("ring_create")(handle, &config, &reason), "make a ring");
    const index: *u16 = @ptrCast(@alignCast(bytes + available + 2));

    var completions: [batch]layout.Completion = undefined;
    var least = [2]f64{ std.math.inf(f64), std.math.inf(f64) };
    const begin = core.now();
    var time = begin;
    while (time - begin < budget_ns) {
        // Long enough for the clock, short enough to be undisturbed.
        const batches = 64;
        var spent = [2]u64{ 0, 0 };
        for (0..batches) |_| {
            @atomicStore(u16, index, index.* +% batch, .release);
            const t0 = core.now();
            const count = core.must(pop(ring, &words, words.len, batch), "pop");
            const t1 = core.now();
            if (count != batch) return error.Short;
            for (&completions, 0..) |*completion, i| {
                completion.* = .{ .head = words[i * record_words], .written = 1 };
            }
            const t2 = core.now();
            _ = core.must(push(ring, &completions, batch), "push");
            time = core.now();
            spent[0] += t1 - t0;
            spent[1] += time - t2;
        }
        for (&least, spent) |*best, ns| best.* = @min(best.*, @as(f64, @floatFromInt(ns)) / (batches * batch));
    }
    var text: [64]u8 = undefined;
    const line = try std.fmt.bufPrint(&text, "{d:.2} {d:.2}\n", .{ least[0], least[1] });
    _ = linux.write(1, line.ptr, line.len);
}
