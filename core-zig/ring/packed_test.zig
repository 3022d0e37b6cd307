//! The device side of the packed ring, as drivers use it.

const std = @import("std");
const layout = @import("../layout.zig");
const linux = @import("../linux.zig");
const rings = @import("ring.zig");
const packed_ring = @import("packed.zig");
const fake_guest = @import("fake_guest.zig");
const fake_packed_guest = @import("fake_packed_guest.zig");
const Guest = fake_guest.Guest;
const PackedGuest = fake_packed_guest.PackedGuest;
const Part = fake_packed_guest.Part;
const Used = fake_packed_guest.Used;
const Position = packed_ring.Position;
const high = fake_guest.high;
const next = fake_guest.next;
const write = fake_guest.write;
const indirect = fake_guest.indirect;
const feature_indirect = fake_guest.feature_indirect;
const feature_event_idx = fake_guest.feature_event_idx;
const feature_in_order = fake_guest.feature_in_order;
const expect = std.testing.expect;
const expectEqual = std.testing.expectEqual;
const b = Guest.buffers;

test "a packed request has its header, segments and trailer, and a used descriptor in its place" {
    var driver = try PackedGuest.start(.{ .header_bytes = 16, .trailer_bytes = 1 });
    defer driver.stop();
    const guest = driver.guest;
    guest.fill(b, "0123456789abcdef");
    try expectEqual(0, guest.pop());
    driver.offer(5, &.{ .{ b, 16, 0 }, .{ b + 16, 4096, write }, .{ b + 4112, 1, write } });
    try expectEqual(1, guest.pop());
    try std.testing.expectEqualStrings("0123456789abcdef", guest.header(0));
    const status = guest.translate(b + 4112);
    try std.testing.expectEqualDeep(layout.Request{
        .head = 5,
        .segment_first = 0,
        .readable_count = 0,
        .writable_count = 1,
        .readable_bytes = 0,
        .writable_bytes = 4096,
        .header_length = 16,
        .trailer_length = 1,
        .trailer_view = status.view,
        .trailer_offset = status.offset,
        .serial = 0,
        .reserved = 0,
    }, guest.record(0));
    try guest.expectSegment(0, b + 16, 4096, layout.access_write);
    try expectEqual(0, guest.pop());
    try expectEqual(1, guest.push(&.{5}));
    // id 5, 105 bytes, WRITE with AVAIL and USED; the address is left alone.
    try expectEqual(b, guest.get(u64, PackedGuest.table));
    try expectEqual(105, guest.get(u32, PackedGuest.table + 8));
    try expectEqual(0x8082_0005, guest.get(u32, PackedGuest.table + 12));
    try expectEqual(Used{ .id = 5, .length = 105 }, driver.take().?);
    // Nothing written: no WRITE.
    driver.offer(0, &.{.{ b, 1, 0 }});
    try expectEqual(1, guest.pop());
    var none = [1]layout.Completion{.{ .head = 0, .written = 0 }};
    try expectEqual(1, rings.push(guest.ring, &none, 1));
    try expectEqual(0x8080_0000, guest.get(u32, PackedGuest.table + 48 + 12));
    try expectEqual(0x8004_8004, guest.state().last_available);
    try expectEqual(0x8004, guest.state().used_index);
}

test "chains go round a ring of any size, their wrap counters with them" {
    for ([_]u32{ 1, 3, 5, 7, 8, 13, 64 }) |size| {
        var driver = try PackedGuest.start(.{ .size = size });
        defer driver.stop();
        const guest = driver.guest;
        for (0..5 * size) |round| {
            const parts = [3]Part{ .{ b, 1, 0 }, .{ b + 1, 2, 0 }, .{ b + 3, 3, write } };
            const count = 1 + round % @min(3, size);
            const id: u16 = @intCast(round % size);
            driver.offer(id, parts[0..count]);
            try expectEqual(1, guest.pop());
            try expectEqual(id, guest.record(0).head);
            try expectEqual(count, guest.record(0).readable_count + guest.record(0).writable_count);
            try expectEqual(0, guest.pop());
            try expectEqual(null, driver.take());
            try expectEqual(1, guest.push(&.{id}));
            try expectEqual(id, driver.take().?.id);
            const state = guest.state();
            try expectEqual(driver.available.bits(), @as(u16, @truncate(state.last_available)));
            try expectEqual(driver.used.bits(), @as(u16, @truncate(state.last_available >> 16)));
        }
    }
}

test "a ring of 32768 is filled, and emptied, at once" {
    var driver = try PackedGuest.start(.{ .size = 32768, .features = feature_event_idx });
    defer driver.stop();
    const guest = driver.guest;
    for (0..32768) |id| driver.offer(@intCast(id), &.{.{ b, 1, 0 }});
    for (0..512) |_| try expectEqual(64, guest.pop());
    try expectEqual(0, guest.pop());
    var completions: [32768]layout.Completion = undefined;
    for (&completions, 0..) |*completion, i| completion.* = .{ .head = @intCast(32767 - i), .written = 0 };
    try expectEqual(1, rings.push(guest.ring, &completions, 32768));
    try expectEqual(0, guest.state().in_flight);
    try expectEqual(0, guest.state().last_available);
    try expectEqual(0x8080_7fff, guest.get(u32, PackedGuest.table + 12));
}

test "completions in any order skip as many descriptors as their chains had" {
    var driver = try PackedGuest.start(.{});
    defer driver.stop();
    const guest = driver.guest;
    driver.offer(0, &.{.{ b, 1, 0 }});
    driver.offer(1, &.{ .{ b, 1, 0 }, .{ b, 1, 0 } });
    driver.offer(2, &.{ .{ b, 1, 0 }, .{ b, 1, 0 }, .{ b, 1, 0 } });
    driver.offer(3, &.{ .{ b, 1, 0 }, .{ b, 1, 0 } });
    try expectEqual(4, guest.pop());
    const refused = [_][]const u32{ &.{ 0, 4 }, &.{ 0, 0 }, &.{ 2, 8 }, &.{ 2, 0xffff_ffff }, &.{ 0, 2, 0 } };
    for (refused) |ids| try expectEqual(linux.fail(.INVAL), guest.push(ids));
    try expectEqual(null, driver.take());
    try expectEqual(1, guest.push(&.{ 3, 1 }));
    try expectEqual(3, driver.take().?.id);
    try expectEqual(1, driver.take().?.id);
    try expectEqual(4, driver.used.slot);
    // The driver's next chain goes where those were.
    driver.offer(3, &.{ .{ b, 1, 0 }, .{ b, 1, 0 }, .{ b, 1, 0 }, .{ b, 1, 0 } });
    try expectEqual(1, guest.pop());
    try expectEqual(1, guest.push(&.{ 0, 3, 2 }));
    for ([_]u16{ 0, 3, 2 }) |id| try expectEqual(id, driver.take().?.id);
    try expectEqual(driver.available, driver.used);
}

test "IN_ORDER holds packed completions back until the older ones are there" {
    var driver = try PackedGuest.start(.{ .size = 7, .features = feature_in_order });
    defer driver.stop();
    const guest = driver.guest;
    for (0..6) |_| {
        for ([_]u16{ 5, 0, 3, 6 }) |id| driver.offer(id, &.{.{ b, 1, 0 }});
        try expectEqual(4, guest.pop());
        try expect(guest.push(&.{ 3, 0 }) == 0);
        try expectEqual(null, driver.take());
        try expectEqual(linux.fail(.INVAL), guest.push(&.{3}));
        try expect(guest.push(&.{5}) == 1);
        for ([_]u16{ 5, 0, 3 }) |id| try expectEqual(Used{ .id = id, .length = id + 100 }, driver.take().?);
        try expect(guest.push(&.{6}) == 1);
        try expectEqual(6, driver.take().?.id);
    }
}

test "an indirect table is the whole chain, in order, and only WRITE counts in it" {
    for ([_]u64{ b + 1, high - 1, high - 16, high - 25 }) |table| {
        var driver = try PackedGuest.start(.{ .features = feature_indirect });
        defer driver.stop();
        const guest = driver.guest;
        guest.describe(table, 0, b + 0x900, 20, 0xffff, indirect | next | 0x8080);
        guest.describe(table, 1, b + 0xa00, 30, 7, next);
        guest.describe(table, 2, b + 0xb00, 40, 0, write);
        // WRITE on the descriptor of a table means nothing.
        driver.offer(3, &.{.{ table, 48, indirect | write }});
        try expectEqual(1, guest.pop());
        try expectEqual(3, guest.record(0).head);
        try expectEqual(2, guest.record(0).readable_count);
        try guest.expectSegment(0, b + 0x900, 20, layout.access_read);
        try guest.expectSegment(1, b + 0xa00, 30, layout.access_read);
        try guest.expectSegment(2, b + 0xb00, 40, layout.access_write);
        try expectEqual(1, guest.push(&.{3}));
        try expectEqual(3, driver.take().?.id);
        try expectEqual(1, driver.used.slot);
    }
}

test "an event is passed exactly when a step goes over it" {
    for ([_]u32{ 1, 2, 3, 5, 8 }) |size| {
        for (0..2 * size) |start| {
            const old = at(start, size);
            for (1..size + 1) |count| {
                const new = old.after(@intCast(count), size);
                // An event is where the driver is or up to a lap ahead of it.
                for (0..2 * size) |offset| {
                    const event = at(start + offset, size);
                    errdefer std.debug.print("size {d} start {d} count {d} offset {d}\n", .{ size, start, count, offset });
                    try expectEqual(offset < count, packed_ring.isPassed(event, new, old, size));
                }
            }
        }
    }
}

fn at(steps: usize, size: u32) Position {
    return .{ .slot = @intCast(steps % size), .wrap = steps / size % 2 == 0 };
}

test "the driver of a packed ring is called when its event suppression says so" {
    const Case = struct { features: u64 = feature_event_idx, wish: u32, count: u32 = 1, call: i32 };
    // From slot 6 of 8, wrap counter 1.
    const cases = [_]Case{
        .{ .wish = packed_ring.event_enable, .call = 1 },
        .{ .wish = packed_ring.event_disable, .call = 0 },
        .{ .wish = packed_ring.event_disable | 0x8006, .call = 0 },
        .{ .wish = packed_ring.event_descriptor | 0x8006, .call = 1 },
        .{ .wish = packed_ring.event_descriptor | 0x0006, .call = 0 },
        .{ .wish = packed_ring.event_descriptor | 0x8007, .call = 0 },
        .{ .wish = packed_ring.event_descriptor | 0x8007, .count = 2, .call = 1 },
        .{ .wish = packed_ring.event_descriptor | 0x0000, .count = 2, .call = 0 },
        .{ .wish = packed_ring.event_descriptor | 0x0000, .count = 3, .call = 1 },
        .{ .wish = packed_ring.event_descriptor | 0x8000, .count = 3, .call = 0 },
        .{ .wish = packed_ring.event_descriptor | 0x7fff, .count = 3, .call = 0 },
        // Without EVENT_IDX, and reserved: called rather than not.
        .{ .features = 0, .wish = packed_ring.event_descriptor | 0x0006, .call = 1 },
        .{ .wish = 3 << 16, .call = 1 },
    };
    for (cases) |case| {
        var driver = try PackedGuest.start(.{ .features = case.features, .base = 0x8005_8005 });
        defer driver.stop();
        for (0..4) |id| driver.offer(@intCast(id), &.{.{ b, 1, 0 }});
        try expectEqual(4, driver.guest.pop());
        // After a start the driver is called whatever it asked for.
        driver.wantCalls(packed_ring.event_disable);
        try expectEqual(1, driver.guest.push(&.{3}));
        driver.wantCalls(case.wish);
        errdefer std.debug.print("wish {x} count {d}\n", .{ case.wish, case.count });
        try expectEqual(case.call, driver.guest.push(([_]u32{ 0, 1, 2 })[0..case.count]));
    }
}

test "arming a packed ring tells the driver and finds what came before it knew" {
    for ([_]u64{ 0, feature_event_idx }) |features| {
        var driver = try PackedGuest.start(.{ .size = 5, .features = features, .base = 0x8004_8004 });
        defer driver.stop();
        const ring = driver.guest.ring;
        try expectEqual(0, rings.disarm(ring));
        try expectEqual(packed_ring.event_disable, driver.deviceWish());
        try expectEqual(0, rings.arm(ring));
        try expectEqual(if (features == 0) 0 else packed_ring.event_descriptor | 0x8004, driver.deviceWish());
        driver.offer(0, &.{.{ b, 1, 0 }});
        try expectEqual(1, rings.arm(ring));
        try expectEqual(0, rings.disarm(ring));
        try expectEqual(packed_ring.event_disable, driver.deviceWish());
        try expectEqual(1, driver.guest.pop());
        try expectEqual(0, rings.arm(ring));
        // Round the end: slot 0 with the other wrap counter.
        try expectEqual(if (features == 0) 0 else packed_ring.event_descriptor, driver.deviceWish());
    }
}

test "what does not fit in a batch of a packed ring waits for the next" {
    var driver = try PackedGuest.start(.{ .segments = 5, .batch_max = 3 });
    defer driver.stop();
    const guest = driver.guest;
    driver.offer(0, &.{ .{ b, 1, 0 }, .{ b, 1, 0 }, .{ b, 1, write } });
    driver.offer(1, &.{ .{ b, 1, 0 }, .{ b, 1, 0 }, .{ b, 1, write } });
    driver.offer(2, &.{.{ b, 1, 0 }});
    driver.offer(3, &.{.{ b, 1, 0 }});
    try expectEqual(1, guest.pop());
    try expectEqual(1, rings.arm(guest.ring));
    try expectEqual(3, guest.pop());
    for ([_]u32{ 1, 2, 3 }, 0..) |id, i| try expectEqual(id, guest.record(@intCast(i)).head);
    try expectEqual(0, guest.pop());
    try expectEqual(4, guest.state().in_flight);
}

test "a packed ring goes on from the base where another stopped, with requests lost or not" {
    for (0..2) |lost| {
        var driver = try PackedGuest.start(.{ .size = 6 });
        defer driver.stop();
        const guest = driver.guest;
        if (lost == 1) {
            driver.offer(5, &.{ .{ b, 1, 0 }, .{ b, 1, 0 } });
            try expectEqual(1, guest.pop());
        }
        for (0..40) |round| {
            driver.offer(0, &.{.{ b, 1, 0 }});
            driver.offer(1, &.{ .{ b, 1, 0 }, .{ b, 1, 0 }, .{ b, 1, 0 } });
            try expectEqual(2, guest.pop());
            try expect(guest.push(&.{ 1, 0 }) >= 0);
            try expectEqual(1, driver.take().?.id);
            try expectEqual(0, driver.take().?.id);
            if (round % 3 != 0) continue;
            var config = guest.ringConfig();
            config.base = guest.state().last_available;
            try expectEqual(0, rings.destroy(guest.ring));
            var reason: u32 = undefined;
            guest.ring = @intCast(rings.create(guest.memory, &config, &reason));
            try expectEqual(config.base, guest.state().last_available);
        }
    }
}
