//! The device side of the split ring against drivers and front-ends that
//! break the rules, and random ones against a model.

const std = @import("std");
const layout = @import("../layout.zig");
const linux = @import("../linux.zig");
const memory = @import("../memory/memory.zig");
const rings = @import("ring.zig");
const fake_guest = @import("fake_guest.zig");
const Guest = fake_guest.Guest;
const link = fake_guest.link;
const low = fake_guest.low;
const region_size = fake_guest.region_size;
const uva_offset = fake_guest.uva_offset;
const emptyMemory = fake_guest.emptyMemory;
const high = fake_guest.high;
const next = fake_guest.next;
const write = fake_guest.write;
const indirect = fake_guest.indirect;
const feature_indirect = fake_guest.feature_indirect;
const feature_in_order = fake_guest.feature_in_order;
const expect = std.testing.expect;
const expectEqual = std.testing.expectEqual;

test "every rule that a driver breaks has its reason" {
    const Case = struct { features: u64 = 0, segments: u32 = 128, reason: u32, value: u64, heads: []const u16 = &.{0}, table: []const struct { u64, u32, u16, u16 } };
    const b = Guest.buffers;
    const cases = [_]Case{
        .{ .reason = layout.broken_head, .value = 8, .heads = &.{8}, .table = &.{} },
        .{ .reason = layout.broken_head, .value = 0xffff, .heads = &.{0xffff}, .table = &.{} },
        .{ .reason = layout.broken_next, .value = 8, .table = &.{.{ b, 1, next, 8 }} },
        // Self-referential, and a circle of two.
        .{ .reason = layout.broken_loop, .value = 8, .table = &.{.{ b, 1, next, 0 }} },
        .{ .reason = layout.broken_loop, .value = 8, .table = &.{ .{ b, 1, next, 1 }, .{ b, 1, next, 0 } } },
        .{ .reason = layout.broken_loop, .value = 8, .table = &.{.{ b, 0, next, 0 }} },
        .{ .reason = layout.broken_unmapped, .value = 0x1000, .table = &.{.{ 0x1000, 1, 0, 0 }} },
        .{ .reason = layout.broken_unmapped, .value = high + region_size, .table = &.{.{ high + region_size - 8, 9, 0, 0 }} },
        .{ .reason = layout.broken_unmapped, .value = std.math.maxInt(u64), .table = &.{.{ std.math.maxInt(u64), 2, 0, 0 }} },
        .{ .reason = layout.broken_unmapped, .value = std.math.maxInt(u64), .table = &.{.{ std.math.maxInt(u64), 1, 0, 0 }} },
        .{ .reason = layout.broken_unmapped, .value = high + region_size, .table = &.{.{ low, 0xffff_ffff, write, 0 }} },
        .{ .reason = layout.broken_length, .value = 0x1_0000_0000, .table = &.{ .{ b, 1, next, 1 }, .{ b, 0xffff_ffff, 0, 0 } } },
        .{ .reason = layout.broken_order, .value = 1, .table = &.{ .{ b, 1, write | next, 1 }, .{ b, 1, 0, 0 } } },
        .{ .reason = layout.broken_order, .value = 1, .table = &.{ .{ b, 0, write | next, 1 }, .{ b, 0, 0, 0 } } },
        .{ .reason = layout.broken_empty, .value = 0, .table = &.{.{ b, 0, 0, 0 }} },
        .{ .reason = layout.broken_indirect_refused, .value = 0, .table = &.{.{ b, 16, indirect, 0 }} },
        .{ .reason = layout.broken_indirect_refused, .value = 0, .features = feature_indirect, .table = &.{.{ b, 16, indirect | next, 0 }} },
        .{ .reason = layout.broken_indirect_size, .value = 0, .features = feature_indirect, .table = &.{.{ b, 0, indirect, 0 }} },
        .{ .reason = layout.broken_indirect_size, .value = 17, .features = feature_indirect, .table = &.{.{ b, 17, indirect, 0 }} },
        .{ .reason = layout.broken_indirect_size, .value = 0xffff_fff0, .features = feature_indirect, .table = &.{.{ b, 0xffff_fff0, indirect, 0 }} },
        .{ .reason = layout.broken_unmapped, .value = std.math.maxInt(u64) - 7, .features = feature_indirect, .table = &.{.{ std.math.maxInt(u64) - 7, 16, indirect, 0 }} },
        .{ .reason = layout.broken_unmapped, .value = high + region_size, .features = feature_indirect, .table = &.{.{ high + region_size - 8, 16, indirect, 0 }} },
        // The table is the ring's own: its first descriptor is indirect.
        .{ .reason = layout.broken_indirect_nested, .value = 0, .features = feature_indirect, .table = &.{.{ Guest.descriptors, 16, indirect, 0 }} },
        .{ .reason = layout.broken_next, .value = 1, .features = feature_indirect, .table = &.{ .{ Guest.descriptors + 16, 16, indirect, 0 }, .{ b, 1, next, 1 } } },
        .{ .reason = layout.broken_loop, .value = 1, .features = feature_indirect, .table = &.{ .{ Guest.descriptors + 16, 16, indirect, 0 }, .{ b, 1, next, 0 } } },
        .{ .reason = layout.broken_segments, .value = 1, .segments = 1, .table = &.{.{ high - 1, 2, 0, 0 }} },
    };
    for (cases) |case| {
        const guest = try Guest.start(.{ .features = case.features, .segments = case.segments });
        defer guest.stop();
        for (case.table, 0..) |d, i| guest.describe(Guest.descriptors, @intCast(i), d[0], d[1], d[2], d[3]);
        for (case.heads) |head| guest.offer(head);
        errdefer std.debug.print("reason {d} value {x}\n", .{ case.reason, case.value });
        try guest.expectBroken(case.reason, case.value);
        try expectEqual(0, guest.state().popped);
    }
}

test "what runs over the top of 2^64 does not go on at 0" {
    const end = std.math.maxInt(u64) - 0xfff;
    for ([_]u16{ 0, indirect }) |flags| {
        const guest = try Guest.start(.{ .gpas = .{ 0, end - region_size }, .features = feature_indirect });
        defer guest.stop();
        // The table's second descriptor would be at 0.
        guest.describe(high + region_size - 16, 0, 0, 1, next, 257);
        guest.describe(low, 0, 0, 1, 0, 0);
        guest.describe(Guest.descriptors, 2, end - 16, 258 * 16, flags, 0);
        guest.offer(2);
        try guest.expectBroken(layout.broken_unmapped, if (flags == 0) end else end - 16);
    }
}

test "an available index that jumps by more than the queue is refused" {
    for ([_]u16{ 9, 0x8000, 0xffff }) |jump| {
        const guest = try Guest.start(.{});
        defer guest.stop();
        guest.put(u16, Guest.available + 2, jump);
        try guest.expectBroken(layout.broken_available_index, jump);
    }
}

test "a head made available again before it was used is refused, also within one batch" {
    const guest = try Guest.start(.{});
    defer guest.stop();
    _ = link(guest, 4, Guest.buffers, &.{.{ 1, 0 }});
    guest.offer(4);
    guest.offer(4);
    // The good one first; the next call meets the broken one.
    try expectEqual(1, guest.pop());
    try expectEqual(1, guest.push(&.{4}));
    try expectEqual(1, guest.pop());
    guest.offer(4);
    try guest.expectBroken(layout.broken_head_in_flight, 4);
}

test "memory that is gone stops the ring" {
    const guest = try Guest.start(.{});
    defer guest.stop();
    _ = link(guest, 0, Guest.buffers, &.{.{ 1, 0 }});
    guest.offer(0);
    memory.get(guest.memory).?.markFaulted();
    try expectEqual(linux.fail(.FAULT), guest.pop());
    try expectEqual(layout.broken_memory, guest.state().broken);
    try expectEqual(linux.fail(.FAULT), guest.push(&.{0}));
    try expectEqual(linux.fail(.FAULT), rings.arm(guest.ring));
    try expectEqual(linux.fail(.FAULT), rings.disarm(guest.ring));
}

test "the areas stay mapped as long as the ring lives" {
    const guest = try Guest.start(.{});
    defer guest.stop();
    _ = link(guest, 0, Guest.buffers, &.{.{ 1, 0 }});
    _ = link(guest, 1, Guest.buffers, &.{.{ 1, 0 }});
    guest.offer(0);
    try expectEqual(1, guest.pop());
    try expect(emptyMemory(guest.memory));
    try expectEqual(0, memory.destroy(guest.memory));
    try expectEqual(0, guest.pop());
    try expectEqual(1, guest.push(&.{0}));
    try expectEqual(1, guest.usedIndex());
    guest.offer(1);
    try guest.expectBroken(layout.broken_unmapped, Guest.buffers);
}

test "a ring that is not whole, aligned and of a legal size is refused" {
    const guest = try Guest.start(.{});
    defer guest.stop();
    const end = high + uva_offset;
    const Case = struct { field: enum { size, descriptors, available, used, header, trailer, space }, value: u64, errno: linux.E, reason: u32 };
    const cases = [_]Case{
        .{ .field = .size, .value = 0, .errno = .INVAL, .reason = layout.refuse_ring_size },
        .{ .field = .size, .value = 12, .errno = .INVAL, .reason = layout.refuse_ring_size },
        .{ .field = .size, .value = 65536, .errno = .INVAL, .reason = layout.refuse_ring_size },
        .{ .field = .size, .value = 0x8000_0000, .errno = .INVAL, .reason = layout.refuse_ring_size },
        .{ .field = .descriptors, .value = low + uva_offset + 8, .errno = .INVAL, .reason = layout.refuse_ring_descriptor_area },
        .{ .field = .descriptors, .value = low, .errno = .FAULT, .reason = layout.refuse_ring_descriptor_area },
        .{ .field = .descriptors, .value = end - 8 * 16 + 16, .errno = .FAULT, .reason = layout.refuse_ring_descriptor_area },
        .{ .field = .descriptors, .value = std.math.maxInt(u64) - 15, .errno = .FAULT, .reason = layout.refuse_ring_descriptor_area },
        .{ .field = .available, .value = low + uva_offset + 1, .errno = .INVAL, .reason = layout.refuse_ring_available_area },
        // Only the event field is over the border.
        .{ .field = .available, .value = end - 20, .errno = .FAULT, .reason = layout.refuse_ring_available_area },
        .{ .field = .used, .value = low + uva_offset + 2, .errno = .INVAL, .reason = layout.refuse_ring_used_area },
        .{ .field = .used, .value = end - 68, .errno = .FAULT, .reason = layout.refuse_ring_used_area },
        .{ .field = .header, .value = 257, .errno = .INVAL, .reason = layout.refuse_ring_config },
        .{ .field = .trailer, .value = 2, .errno = .INVAL, .reason = layout.refuse_ring_config },
        .{ .field = .space, .value = 3, .errno = .INVAL, .reason = layout.refuse_ring_config },
    };
    for (cases) |case| {
        var config = guest.ringConfig();
        switch (case.field) {
            .size => config.size = @intCast(case.value),
            .descriptors => config.descriptor_address = case.value,
            .available => config.available_address = case.value,
            .used => config.used_address = case.value,
            .header => config.header_bytes = @intCast(case.value),
            .trailer => config.trailer_bytes = @intCast(case.value),
            .space => config.space = @intCast(case.value),
        }
        var reason: u32 = undefined;
        try expectEqual(linux.fail(case.errno), rings.create(guest.memory, &config, &reason));
        try expectEqual(case.reason, reason);
    }
    var config = guest.ringConfig();
    var reason: u32 = undefined;
    try expectEqual(linux.fail(.BADF), rings.create(0, &config, &reason));
    config.available_address = end - 22;
    config.used_address = end - 70 - 26 - 4;
    const ring = rings.create(guest.memory, &config, &reason);
    try expect(ring > 0);
    try expectEqual(0, rings.destroy(@intCast(ring)));
    try expectEqual(linux.fail(.BADF), rings.destroy(@intCast(ring)));
    try expectEqual(linux.fail(.BADF), rings.pop(@intCast(ring), &guest.words, 100, 1));
}

test "random rings agree with a model of them" {
    var prng: std.Random.DefaultPrng = .init(0x5eed);
    const random = prng.random();
    for (0..300) |_| {
        const size: u32 = @as(u32, 1) << random.intRangeAtMost(u5, 2, 6);
        const guest = try Guest.start(.{
            .size = size,
            .features = feature_indirect | if (random.boolean()) feature_in_order else 0,
            .header_bytes = random.uintAtMost(u32, 20),
            .trailer_bytes = random.uintAtMost(u32, 1),
            .base = random.int(u16),
            .batch_max = random.intRangeAtMost(u32, 1, 8),
        });
        defer guest.stop();
        try randomRounds(guest, random);
    }
}

const Model = struct { head: u16, readable: u32, writable: u32 };

fn randomRounds(guest: *Guest, random: std.Random) !void {
    const size = guest.options.size;
    var offered: [64]Model = undefined;
    var offered_count: u32 = 0;
    var taken: [64]u32 = undefined;
    var taken_count: u32 = 0;
    const is_in_order = guest.options.features & feature_in_order != 0;
    // Heads that the device has not given back, and the order of the pops.
    var owned: [64]bool = @splat(false);
    var writable: [64]u32 = @splat(0);
    var order: [20 * 64]u32 = undefined;
    var order_count: u32 = 0;
    var used: u16 = 0;
    var completed: u16 = 0;
    for (0..20) |_| {
        // Offer single descriptors and tables, never one twice.
        for (0..size) |i| {
            const head: u16 = @intCast(i);
            if (owned[head] or random.boolean()) continue;
            owned[head] = true;
            var model: Model = .{ .head = head, .readable = 0, .writable = 0 };
            const table: u64 = high - 0x3000 + @as(u64, head) * 0x100 + random.uintAtMost(u32, 9);
            const parts = random.intRangeAtMost(u16, 1, 8);
            const readable_parts = random.uintAtMost(u16, parts);
            for (0..parts) |p| {
                const part: u16 = @intCast(p);
                const length = random.intRangeAtMost(u32, 1, 30);
                const flags: u16 = if (part < readable_parts) 0 else write;
                if (flags == 0) model.readable += length else model.writable += length;
                guest.describe(table, part, high - random.uintAtMost(u32, 64), length, flags | if (part + 1 < parts) next else 0, part + 1);
            }
            guest.describe(Guest.descriptors, head, table, 16 * @as(u32, parts), indirect, 0);
            guest.offer(head);
            writable[head] = model.writable;
            offered[offered_count] = model;
            offered_count += 1;
        }
        const popped: u32 = @intCast(guest.pop());
        try expectEqual(@min(offered_count, guest.options.batch_max), popped);
        for (offered[0..popped], 0..) |model, i| {
            const record = guest.record(@intCast(i));
            try expectEqual(model.head, record.head);
            try expectEqual(@min(model.readable, guest.options.header_bytes), record.header_length);
            try expectEqual(model.readable, record.readable_bytes + record.header_length);
            try expectEqual(model.writable, record.writable_bytes + record.trailer_length);
            try expectEqual(@intFromBool(guest.options.trailer_bytes == 1 and model.writable > 0), record.trailer_length);
            var sums: [2]u32 = @splat(0);
            for (0..record.readable_count + record.writable_count) |s| {
                const segment = guest.segment(record.segment_first + @as(u32, @intCast(s)));
                try expect(segment.length > 0);
                try expectEqual(if (s < record.readable_count) layout.access_read else layout.access_write, segment.access);
                sums[@intFromBool(s >= record.readable_count)] += segment.length;
            }
            try expectEqual(sums, [2]u32{ record.readable_bytes, record.writable_bytes });
            taken[taken_count] = record.head;
            taken_count += 1;
            order[order_count] = record.head;
            order_count += 1;
        }
        std.mem.copyForwards(Model, &offered, offered[popped..offered_count]);
        offered_count -= popped;
        random.shuffle(u32, taken[0..taken_count]);
        const pushed = random.uintAtMost(u32, taken_count);
        try expect(guest.push(taken[taken_count - pushed .. taken_count]) >= 0);
        taken_count -= pushed;
        completed += @intCast(pushed);
        try expectEqual(taken_count, guest.state().in_flight);
        while (used != guest.usedIndex()) : (used += 1) {
            const element = guest.usedAt(used);
            // IN_ORDER: those before it in its run were written completely.
            while (is_in_order and order[used] != element.id) : (used += 1) {
                try expect(used != guest.usedIndex());
                try expectEqual(order[used] + 100, writable[order[used]]);
                owned[order[used]] = false;
            }
            try expect(owned[element.id]);
            try expectEqual(element.id + 100, element.length);
            owned[element.id] = false;
        }
        if (!is_in_order or taken_count == 0) try expectEqual(completed, used);
    }
}
