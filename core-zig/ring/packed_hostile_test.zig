//! The device side of the packed ring against drivers that break the rules,
//! and random ones against a model.

const std = @import("std");
const layout = @import("../layout.zig");
const linux = @import("../linux.zig");
const memory = @import("../memory/memory.zig");
const rings = @import("ring.zig");
const fake_guest = @import("fake_guest.zig");
const fake_packed_guest = @import("fake_packed_guest.zig");
const Guest = fake_guest.Guest;
const Part = fake_packed_guest.Part;
const PackedGuest = fake_packed_guest.PackedGuest;
const high = fake_guest.high;
const low = fake_guest.low;
const region_size = fake_guest.region_size;
const uva_offset = fake_guest.uva_offset;
const next = fake_guest.next;
const write = fake_guest.write;
const indirect = fake_guest.indirect;
const feature_indirect = fake_guest.feature_indirect;
const feature_in_order = fake_guest.feature_in_order;
const expect = std.testing.expect;
const expectEqual = std.testing.expectEqual;
const b = Guest.buffers;
const available = 0x80;
const maximum = std.math.maxInt(u64);

test "every rule that a driver of a packed ring breaks has its reason" {
    const Case = struct { features: u64 = 0, segments: u32 = 128, reason: u32, value: u64, ring: []const struct { u64, u32, u16, u16 } };
    const cases = [_]Case{
        .{ .reason = layout.broken_head, .value = 8, .ring = &.{.{ b, 1, 8, 0 }} },
        .{ .reason = layout.broken_head, .value = 0xffff, .ring = &.{.{ b, 1, 0xffff, 0 }} },
        // The id of the first is fine, that of the last is not.
        .{ .reason = layout.broken_head, .value = 0x8000, .ring = &.{ .{ b, 1, 0, next }, .{ b, 1, 0x8000, 0 } } },
        // NEXT all the way round.
        .{ .reason = layout.broken_loop, .value = 8, .ring = &(.{.{ b, 1, 0, next }} ** 8) },
        .{ .reason = layout.broken_loop, .value = 8, .ring = &(.{.{ 0, 0, 0, next }} ** 8) },
        .{ .reason = layout.broken_unmapped, .value = 0x1000, .ring = &.{.{ 0x1000, 1, 0, 0 }} },
        .{ .reason = layout.broken_unmapped, .value = high + region_size, .ring = &.{.{ high + region_size - 8, 9, 0, 0 }} },
        .{ .reason = layout.broken_unmapped, .value = maximum, .ring = &.{.{ maximum, 2, 0, 0 }} },
        .{ .reason = layout.broken_unmapped, .value = high + region_size, .ring = &.{.{ low, 0xffff_ffff, 0, write }} },
        .{ .reason = layout.broken_length, .value = 0x1_0000_0000, .ring = &.{ .{ b, 1, 0, next }, .{ b, 0xffff_ffff, 0, 0 } } },
        .{ .reason = layout.broken_order, .value = 1, .ring = &.{ .{ b, 1, 0, write | next }, .{ b, 1, 0, 0 } } },
        .{ .reason = layout.broken_order, .value = 1, .ring = &.{ .{ b, 0, 0, write | next }, .{ b, 0, 0, 0 } } },
        .{ .reason = layout.broken_empty, .value = 6, .ring = &.{.{ 0xdead_0000_0000, 0, 6, 0 }} },
        .{ .reason = layout.broken_indirect_refused, .value = 0, .ring = &.{.{ b, 16, 0, indirect }} },
        .{ .reason = layout.broken_indirect_refused, .value = 0, .features = feature_indirect, .ring = &.{ .{ b, 16, 0, indirect | next }, .{ b, 1, 0, 0 } } },
        .{ .reason = layout.broken_indirect_refused, .value = 1, .features = feature_indirect, .ring = &.{ .{ b, 1, 0, next }, .{ b, 16, 0, indirect } } },
        .{ .reason = layout.broken_indirect_size, .value = 0, .features = feature_indirect, .ring = &.{.{ b, 0, 0, indirect }} },
        .{ .reason = layout.broken_indirect_size, .value = 17, .features = feature_indirect, .ring = &.{.{ b, 17, 0, indirect }} },
        .{ .reason = layout.broken_indirect_size, .value = 1025 * 16, .features = feature_indirect, .ring = &.{.{ b, 1025 * 16, 0, indirect }} },
        .{ .reason = layout.broken_indirect_size, .value = 0xffff_fff0, .features = feature_indirect, .ring = &.{.{ b, 0xffff_fff0, 0, indirect }} },
        .{ .reason = layout.broken_unmapped, .value = maximum - 7, .features = feature_indirect, .ring = &.{.{ maximum - 7, 16, 0, indirect }} },
        .{ .reason = layout.broken_unmapped, .value = high + region_size, .features = feature_indirect, .ring = &.{.{ high + region_size - 8, 16, 0, indirect }} },
        // All of the table is used, NEXT or not: its second one is the ring's.
        .{ .reason = layout.broken_unmapped, .value = 0x1000, .features = feature_indirect, .ring = &.{ .{ Guest.descriptors + 16, 32, 0, indirect }, .{ b, 1, 0, 0 }, .{ 0x1000, 1, 0, 0 } } },
        .{ .reason = layout.broken_segments, .value = 1, .segments = 1, .ring = &.{.{ high - 1, 2, 0, 0 }} },
    };
    for (cases) |case| {
        var driver = try PackedGuest.start(.{ .features = case.features, .segments = case.segments });
        defer driver.stop();
        for (case.ring, 0..) |d, i| driver.describe(@intCast(i), d[0], d[1], d[2], d[3] | available);
        errdefer std.debug.print("reason {d} value {x}\n", .{ case.reason, case.value });
        try driver.guest.expectBroken(case.reason, case.value);
        try expectEqual(0, driver.guest.state().popped);
        try expectEqual(fake_packed_guest.first_base, driver.guest.state().last_available);
    }
}

test "an id in flight and a slot in flight cannot be made available again" {
    for ([_]u16{ 4, 1 }) |id| {
        var driver = try PackedGuest.start(.{ .size = 4 + @as(u32, id) });
        defer driver.stop();
        const guest = driver.guest;
        driver.offer(1, &.{ .{ b, 1, 0 }, .{ b, 1, 0 }, .{ b, 1, 0 } });
        try expectEqual(1, guest.pop());
        driver.offer(id, &.{.{ b, 1, 0 }});
        if (id == 1) {
            try guest.expectBroken(layout.broken_head_in_flight, 1);
            continue;
        }
        try expectEqual(1, guest.pop());
        // A chain that reaches into what the device has: 4 are left of 8.
        driver.offer(2, &.{ .{ b, 1, 0 }, .{ b, 1, 0 }, .{ b, 1, 0 }, .{ b, 1, 0 }, .{ b, 1, 0 } });
        try guest.expectBroken(layout.broken_loop, 4);
    }
    var driver = try PackedGuest.start(.{ .size = 3 });
    defer driver.stop();
    driver.offer(0, &.{ .{ b, 1, 0 }, .{ b, 1, 0 }, .{ b, 1, 0 } });
    try expectEqual(1, driver.guest.pop());
    driver.offer(1, &.{.{ b, 1, 0 }});
    try driver.guest.expectBroken(layout.broken_available_index, 0);
}

test "a descriptor of another lap is not available, whatever its other flags" {
    var driver = try PackedGuest.start(.{});
    defer driver.stop();
    for ([_]u16{ 0, 0x8000, 0x8080, 0x8007, 0x7f7f, 0xffff }) |flags| {
        driver.describe(0, b, 1, 0, flags);
        try expectEqual(0, driver.guest.pop());
        try expectEqual(0, rings.arm(driver.guest.ring));
    }
}

test "good requests before a bad one are delivered, and memory that is gone stops a packed ring" {
    var driver = try PackedGuest.start(.{});
    defer driver.stop();
    const guest = driver.guest;
    driver.offer(0, &.{.{ b, 1, 0 }});
    driver.offer(9, &.{.{ b, 1, 0 }});
    try expectEqual(1, guest.pop());
    try expectEqual(1, guest.push(&.{0}));
    memory.get(guest.memory).?.markFaulted();
    try expectEqual(linux.fail(.FAULT), guest.pop());
    try expectEqual(layout.broken_memory, guest.state().broken);
    try expectEqual(linux.fail(.FAULT), rings.arm(guest.ring));
}

test "a packed ring that is not whole, aligned, in its base and of a legal size is refused" {
    var driver = try PackedGuest.start(.{});
    defer driver.stop();
    const guest = driver.guest;
    const end = high + uva_offset;
    const Field = enum { size, base, descriptors, driver, device };
    const cases = [_]struct { Field, u64, linux.E, u32 }{
        .{ .size, 0, .INVAL, layout.refuse_ring_size },
        .{ .size, 32769, .INVAL, layout.refuse_ring_size },
        .{ .size, 0xffff_ffff, .INVAL, layout.refuse_ring_size },
        .{ .base, 0x8000_8008, .INVAL, layout.refuse_ring_config },
        .{ .base, 0x8008_8000, .INVAL, layout.refuse_ring_config },
        .{ .base, 0xffff_8000, .INVAL, layout.refuse_ring_config },
        .{ .descriptors, low + uva_offset + 8, .INVAL, layout.refuse_ring_descriptor_area },
        .{ .descriptors, end - 8 * 16 + 16, .FAULT, layout.refuse_ring_descriptor_area },
        .{ .driver, low + uva_offset + 2, .INVAL, layout.refuse_ring_available_area },
        .{ .driver, end + region_size, .FAULT, layout.refuse_ring_available_area },
        .{ .device, low + uva_offset + 2, .INVAL, layout.refuse_ring_used_area },
        .{ .device, maximum - 3, .FAULT, layout.refuse_ring_used_area },
    };
    var reason: u32 = undefined;
    for (cases) |case| {
        var config = guest.ringConfig();
        switch (case[0]) {
            .size => config.size = @intCast(case[1]),
            .base => config.base = @intCast(case[1]),
            .descriptors => config.descriptor_address = case[1],
            .driver => config.available_address = case[1],
            .device => config.used_address = case[1],
        }
        errdefer std.debug.print("{} {x}\n", .{ case[0], case[1] });
        try expectEqual(linux.fail(case[2]), rings.create(guest.memory, &config, &reason));
        try expectEqual(case[3], reason);
    }
    // Event suppression needs no more than its four bytes.
    var config = guest.ringConfig();
    config.available_address = end - 4;
    config.used_address = end + region_size - 4;
    config.base = 0x0007_8007;
    const handle = rings.create(guest.memory, &config, &reason);
    try expect(handle > 0);
    try expectEqual(0, rings.destroy(@intCast(handle)));
}

test "random packed rings agree with a model of them, over stops and starts" {
    var prng: std.Random.DefaultPrng = .init(0x9acced);
    const random = prng.random();
    for (0..300) |_| {
        const size = random.intRangeAtMost(u32, 1, 40);
        const position = random.uintLessThan(u32, size) | if (random.boolean()) @as(u32, 0x8000) else 0;
        var driver = try PackedGuest.start(.{
            .size = size,
            .features = feature_indirect | if (random.boolean()) feature_in_order else 0,
            .header_bytes = random.uintAtMost(u32, 20),
            .base = if (position == 0) 0 else position | position << 16,
            .batch_max = random.intRangeAtMost(u32, 1, 8),
        });
        defer driver.stop();
        try randomRounds(&driver, random);
    }
}

test "a packed ring of random garbage is survived, and what it gave is given back" {
    var prng: std.Random.DefaultPrng = .init(0xbad);
    const random = prng.random();
    var broken: [16]u32 = @splat(0);
    for (0..400) |_| {
        const size = random.intRangeAtMost(u32, 1, 40);
        var driver = try PackedGuest.start(.{
            .size = size,
            .features = random.int(u64) & (feature_indirect | fake_guest.feature_event_idx | feature_in_order),
            .header_bytes = random.uintAtMost(u32, 20),
            .trailer_bytes = random.uintAtMost(u32, 1),
            .segments = random.intRangeAtMost(u32, 1, 128),
            .base = randomPosition(random, size) | randomPosition(random, size) << 16,
        });
        defer driver.stop();
        const guest = driver.guest;
        var owned: [64]u32 = undefined;
        var owned_count: usize = 0;
        while (guest.state().broken == layout.broken_none) {
            for (0..size) |slot| {
                if (random.boolean()) driver.describe(@intCast(slot), randomAddress(random), randomLength(random), randomId(random, size), randomFlags(random));
            }
            driver.wantCalls(random.int(u32));
            const popped = guest.pop();
            try expect(popped >= 0 or popped == linux.fail(.PROTO));
            for (0..@intCast(@max(0, popped))) |i| {
                owned[owned_count] = guest.record(@intCast(i)).head;
                try expect(owned[owned_count] < size);
                owned_count += 1;
            }
            try expectEqual(owned_count, guest.state().in_flight);
            try expect(owned_count <= size);
            const arms = rings.arm(guest.ring);
            try expect(arms >= 0 or popped < 0);
            const count = random.uintAtMost(usize, owned_count);
            const pushed = guest.push(owned[owned_count - count .. owned_count]);
            if (popped < 0) break;
            try expect(pushed == 0 or pushed == 1);
            owned_count -= count;
        }
        broken[guest.state().broken] += 1;
        // Whatever it was, its base can be started from.
        var config = guest.ringConfig();
        config.base = guest.state().last_available;
        var reason: u32 = undefined;
        const next_ring = rings.create(guest.memory, &config, &reason);
        try expect(next_ring > 0);
        try expectEqual(0, rings.destroy(@intCast(next_ring)));
    }
    // The garbage reached the rules.
    for ([_]u32{ layout.broken_head, layout.broken_unmapped, layout.broken_order, layout.broken_indirect_refused, layout.broken_indirect_size, layout.broken_empty }) |reason| {
        try expect(broken[reason] != 0);
    }
}

fn randomPosition(random: std.Random, size: u32) u32 {
    return random.uintLessThan(u32, size) | if (random.boolean()) @as(u32, 0x8000) else 0;
}

fn randomAddress(random: std.Random) u64 {
    return switch (random.uintLessThan(u32, 8)) {
        0 => random.int(u64),
        1 => maximum - random.uintAtMost(u64, 64),
        2 => high + region_size - random.uintAtMost(u64, 64),
        3 => Guest.descriptors,
        4 => high - random.uintAtMost(u64, 64),
        else => b,
    };
}

fn randomLength(random: std.Random) u32 {
    return switch (random.uintLessThan(u32, 8)) {
        0 => random.int(u32),
        1 => 0,
        2 => 16 * random.uintAtMost(u32, 70),
        else => random.uintAtMost(u32, 64),
    };
}

fn randomId(random: std.Random, size: u32) u16 {
    return if (random.uintLessThan(u32, 30) == 0) random.int(u16) else @intCast(random.uintLessThan(u32, size));
}

fn randomFlags(random: std.Random) u16 {
    const laps = [_]u16{ 0, 0x80, 0x8000, 0x8080 };
    const own = if (random.uintLessThan(u32, 4) == 0) random.int(u16) & 7 else random.int(u16) & (write | next) & random.int(u16);
    return laps[random.uintLessThan(usize, 4)] | own;
}

const Model = struct { id: u16, bytes: u32 };

fn randomRounds(driver: *PackedGuest, random: std.Random) !void {
    const guest = driver.guest;
    const is_in_order = guest.options.features & feature_in_order != 0;
    var free = driver.size;
    var is_owned: [64]bool = @splat(false);
    var offered: std.ArrayList(Model) = .empty;
    var order: std.ArrayList(u32) = .empty;
    var taken: std.ArrayList(u32) = .empty;
    const allocator = std.testing.allocator;
    defer offered.deinit(allocator);
    defer order.deinit(allocator);
    defer taken.deinit(allocator);
    var seen: usize = 0;
    for (0..40) |_| {
        for (0..driver.size) |i| {
            const id: u16 = @intCast(i);
            if (is_owned[id] or random.boolean() or free == 0) continue;
            const parts = random.intRangeAtMost(u16, 1, 6);
            var bytes: u32 = 0;
            if (parts > free or random.boolean()) {
                const table = high - 0x3000 + @as(u64, id) * 0x70 + random.uintAtMost(u32, 9);
                for (0..parts) |part| {
                    const length = random.intRangeAtMost(u32, 1, 30);
                    bytes += length;
                    guest.describe(table, @intCast(part), high - 15, length, 0, 0);
                }
                driver.offer(id, &.{.{ table, 16 * @as(u32, parts), indirect }});
                free -= 1;
            } else {
                const all = [6]Part{ .{ high - 1, 1, 0 }, .{ high - 2, 3, 0 }, .{ b, 5, 0 }, .{ b, 0, 0 }, .{ b, 7, write }, .{ b, 9, write } };
                for (all[0..parts]) |part| bytes += part[1];
                driver.offer(id, all[0..parts]);
                free -= parts;
            }
            is_owned[id] = true;
            try offered.append(allocator, .{ .id = id, .bytes = bytes });
        }
        const popped: u32 = @intCast(guest.pop());
        try expectEqual(@min(offered.items.len, guest.options.batch_max), popped);
        for (offered.items[0..popped], 0..) |model, i| {
            const record = guest.record(@intCast(i));
            try expectEqual(model.id, record.head);
            try expectEqual(model.bytes, record.header_length + record.readable_bytes + record.writable_bytes);
            try order.append(allocator, record.head);
            try taken.append(allocator, record.head);
        }
        offered.replaceRangeAssumeCapacity(0, popped, &.{});
        random.shuffle(u32, taken.items);
        const pushed = random.uintAtMost(usize, taken.items.len);
        try expect(guest.push(taken.items[taken.items.len - pushed ..]) >= 0);
        taken.shrinkRetainingCapacity(taken.items.len - pushed);
        while (driver.take()) |used| : (seen += 1) {
            try expect(is_owned[used.id]);
            try expectEqual(used.id + 100, used.length);
            is_owned[used.id] = false;
            free += driver.lengths[used.id];
            if (is_in_order) try expectEqual(order.items[seen], used.id);
        }
        if (!is_in_order) try expectEqual(order.items.len - taken.items.len, seen);
        if (taken.items.len == 0 and random.uintLessThan(u32, 4) == 0) {
            try expectEqual(order.items.len, seen);
            var config = guest.ringConfig();
            config.base = guest.state().last_available;
            try expectEqual(0, rings.destroy(guest.ring));
            var reason: u32 = undefined;
            guest.ring = @intCast(rings.create(guest.memory, &config, &reason));
        }
    }
}
