//! The device side of the split ring, as drivers use it.

const std = @import("std");
const layout = @import("../layout.zig");
const linux = @import("../linux.zig");
const rings = @import("ring.zig");
const split = @import("split.zig");
const fake_guest = @import("fake_guest.zig");
const Guest = fake_guest.Guest;
const link = fake_guest.link;
const high = fake_guest.high;
const next = fake_guest.next;
const write = fake_guest.write;
const indirect = fake_guest.indirect;
const feature_indirect = fake_guest.feature_indirect;
const feature_event_idx = fake_guest.feature_event_idx;
const feature_in_order = fake_guest.feature_in_order;
const expect = std.testing.expect;
const expectEqual = std.testing.expectEqual;

test "a request has its header, its segments and its trailer" {
    const guest = try Guest.start(.{ .header_bytes = 16, .trailer_bytes = 1 });
    defer guest.stop();
    guest.fill(Guest.buffers, "0123456789abcdef");
    _ = link(guest, 2, Guest.buffers, &.{ .{ 16, 0 }, .{ 4096, write }, .{ 1, write } });
    try expectEqual(0, guest.pop());
    guest.offer(2);
    try expectEqual(1, guest.pop());
    try std.testing.expectEqualStrings("0123456789abcdef", guest.header(0));
    const status = guest.translate(Guest.buffers + 16 + 4096);
    try std.testing.expectEqualDeep(layout.Request{
        .head = 2,
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
    try guest.expectSegment(0, Guest.buffers + 16, 4096, layout.access_write);
    try expectEqual(1, guest.state().in_flight);
    try expectEqual(1, guest.push(&.{2}));
    try expectEqual(split.UsedElement{ .id = 2, .length = 102 }, guest.usedAt(0));
    try expectEqual(1, guest.usedIndex());
    try expectEqual(0, guest.state().in_flight);
}

test "the header is gathered over any framing, and the rest becomes segments" {
    const guest = try Guest.start(.{ .size = 32, .header_bytes = 16, .trailer_bytes = 1 });
    defer guest.stop();
    const text = "the header's 16 and more";
    guest.fill(Guest.buffers, text);
    // One byte per descriptor, data behind it, status split off the data.
    var parts: [18][2]u32 = @splat(.{ 1, 0 });
    parts[16] = .{ 100, 0 };
    parts[17] = .{ 10, write };
    _ = link(guest, 0, Guest.buffers, &parts);
    // All readable bytes in one descriptor.
    _ = link(guest, 20, Guest.buffers, &.{ .{ 20, 0 }, .{ 1, write } });
    // A header too short, after a longer one in the same record.
    _ = link(guest, 22, Guest.buffers, &.{.{ 5, 0 }});
    guest.offer(0);
    guest.offer(20);
    try expectEqual(2, guest.pop());
    try std.testing.expectEqualStrings(text[0..16], guest.header(0));
    try expectEqual(100, guest.record(0).readable_bytes);
    try expectEqual(9, guest.record(0).writable_bytes);
    try guest.expectSegment(0, Guest.buffers + 16, 100, layout.access_read);
    try guest.expectSegment(1, Guest.buffers + 116, 9, layout.access_write);
    try expectEqual(guest.translate(Guest.buffers + 125).offset, guest.record(0).trailer_offset);
    try std.testing.expectEqualStrings(text[0..16], guest.header(1));
    try expectEqual(2, guest.record(1).segment_first);
    try expectEqual(1, guest.record(1).readable_count);
    try expectEqual(0, guest.record(1).writable_count);
    try guest.expectSegment(2, Guest.buffers + 16, 4, layout.access_read);
    guest.offer(22);
    try expectEqual(1, guest.pop());
    try expectEqual(5, guest.record(0).header_length);
    try expectEqual(0, guest.record(0).trailer_length);
    try std.testing.expectEqualStrings("the h" ++ "\x00" ** 11, guest.header(0));
    try expectEqual(2, guest.record(0).serial);
}

test "a zero-length descriptor is skipped wherever it points" {
    const guest = try Guest.start(.{ .header_bytes = 4, .trailer_bytes = 1 });
    defer guest.stop();
    guest.describe(Guest.descriptors, 0, 0xdead_0000_0000, 0, next, 1);
    guest.describe(Guest.descriptors, 1, Guest.buffers, 8, next, 2);
    guest.describe(Guest.descriptors, 2, 0, 0, next | write, 3);
    guest.describe(Guest.descriptors, 3, Guest.buffers + 8, 1, next | write, 4);
    guest.describe(Guest.descriptors, 4, std.math.maxInt(u64), 0, write, 0);
    guest.offer(0);
    try expectEqual(1, guest.pop());
    try expectEqual(1, guest.record(0).readable_count);
    try expectEqual(0, guest.record(0).writable_count);
    try expectEqual(1, guest.record(0).trailer_length);
}

test "a buffer across regions comes in pieces" {
    const guest = try Guest.start(.{ .header_bytes = 16, .trailer_bytes = 1 });
    defer guest.stop();
    const text = "sixteen bytes ok";
    guest.fill(high - 6, text);
    guest.describe(Guest.descriptors, 0, high - 6, 20, next, 1);
    guest.describe(Guest.descriptors, 1, high - 100, 300, write, 0);
    guest.offer(0);
    try expectEqual(1, guest.pop());
    try std.testing.expectEqualStrings(text, guest.header(0));
    try guest.expectSegment(0, high + 10, 4, layout.access_read);
    try guest.expectSegment(1, high - 100, 100, layout.access_write);
    try guest.expectSegment(2, high, 199, layout.access_write);
    try expectEqual(2, guest.record(0).writable_count);
}

test "an indirect table may lie at an odd address, across regions, behind direct descriptors" {
    for ([_]u64{ Guest.buffers + 1, high - 1, high - 16, high - 25 }) |table| {
        const guest = try Guest.start(.{ .features = feature_indirect });
        defer guest.stop();
        guest.describe(Guest.descriptors, 3, Guest.buffers + 0x800, 10, next, 1);
        // WRITE on the descriptor of a table means nothing.
        guest.describe(Guest.descriptors, 1, table, 48, indirect | write, 0);
        guest.describe(table, 0, Guest.buffers + 0x900, 20, next, 2);
        guest.describe(table, 2, Guest.buffers + 0xa00, 30, next | write, 1);
        guest.describe(table, 1, Guest.buffers + 0xb00, 40, write, 0);
        guest.offer(3);
        try expectEqual(1, guest.pop());
        try expectEqual(3, guest.record(0).head);
        try expectEqual(2, guest.record(0).readable_count);
        try guest.expectSegment(0, Guest.buffers + 0x800, 10, layout.access_read);
        try guest.expectSegment(1, Guest.buffers + 0x900, 20, layout.access_read);
        try guest.expectSegment(2, Guest.buffers + 0xa00, 30, layout.access_write);
        try guest.expectSegment(3, Guest.buffers + 0xb00, 40, layout.access_write);
    }
}

test "an indirect table may be longer than the queue, up to 1024" {
    const guest = try Guest.start(.{ .features = feature_indirect, .segments = 1024 });
    defer guest.stop();
    for (0..1024) |i| {
        const flags: u16 = if (i < 1023) next else 0;
        guest.describe(Guest.buffers, @intCast(i), Guest.buffers + i, 1, flags, @intCast((i + 1) % 1024));
    }
    guest.describe(Guest.descriptors, 0, Guest.buffers, 1024 * 16, indirect, 0);
    guest.offer(0);
    try expectEqual(1, guest.pop());
    try expectEqual(1024, guest.record(0).readable_count);
    guest.describe(Guest.descriptors, 1, Guest.buffers, 1025 * 16, indirect, 0);
    guest.offer(1);
    try guest.expectBroken(layout.broken_indirect_size, 1025 * 16);
}

test "completions go back in any order, each once" {
    const guest = try Guest.start(.{});
    defer guest.stop();
    for (0..4) |i| {
        _ = link(guest, @intCast(i), Guest.buffers, &.{.{ 1, 0 }});
        guest.offer(@intCast(i));
    }
    try expectEqual(4, guest.pop());
    try expectEqual(1, guest.push(&.{ 3, 1 }));
    try expectEqual(split.UsedElement{ .id = 3, .length = 103 }, guest.usedAt(0));
    try expectEqual(split.UsedElement{ .id = 1, .length = 101 }, guest.usedAt(1));
    // Nothing of a call with a mistake is published.
    const refused = [_][]const u32{ &.{ 0, 3 }, &.{ 0, 0 }, &.{ 2, 8 }, &.{ 2, 0xffff_ffff }, &.{5}, &.{ 0, 2, 0 } };
    for (refused) |heads| try expectEqual(linux.fail(.INVAL), guest.push(heads));
    try expectEqual(2, guest.usedIndex());
    try expectEqual(2, guest.state().in_flight);
    try expectEqual(1, guest.push(&.{ 0, 2 }));
    try expectEqual(4, guest.usedIndex());
    try expectEqual(0, guest.push(&.{}));
}

test "IN_ORDER holds completions back until the older ones are there" {
    const guest = try Guest.start(.{ .features = feature_in_order });
    defer guest.stop();
    for ([_]u16{ 5, 0, 3, 6 }) |head| {
        _ = link(guest, head, Guest.buffers, &.{.{ 1, 0 }});
        guest.offer(head);
    }
    try expectEqual(4, guest.pop());
    try expectEqual(0, guest.push(&.{ 3, 0 }));
    try expectEqual(0, guest.usedIndex());
    try expectEqual(linux.fail(.INVAL), guest.push(&.{3}));
    try expectEqual(2, guest.state().in_flight);
    try expectEqual(1, guest.push(&.{5}));
    try expectEqual(3, guest.usedIndex());
    for ([_]u32{ 5, 0, 3 }, 0..) |head, i| {
        try expectEqual(split.UsedElement{ .id = head, .length = head + 100 }, guest.usedAt(@intCast(i)));
    }
    // A completed but unpublished head is still the device's.
    guest.offer(6);
    try guest.expectBroken(layout.broken_head_in_flight, 6);
}

test "indices run on over 65536" {
    inline for (.{ 0, feature_event_idx, feature_in_order }) |features| {
        const guest = try Guest.start(.{ .base = 0x1_fff0, .used_index = 0xfff3, .features = features });
        defer guest.stop();
        try expectEqual(0xfff0, guest.state().last_available);
        try expectEqual(0xfff3, guest.state().used_index);
        _ = link(guest, 0, Guest.buffers, &.{.{ 1, 0 }});
        _ = link(guest, 1, Guest.buffers, &.{.{ 1, 0 }});
        for (0..40) |i| {
            guest.offer(0);
            guest.offer(1);
            try expectEqual(2, guest.pop());
            try expectEqual(@as(u32, @truncate(2 * i)), guest.record(0).serial);
            try expect(guest.push(&.{ 0, 1 }) >= 0);
        }
        try expectEqual(0xfff3 +% @as(u16, 80), guest.usedIndex());
        try expectEqual(0xfff0 +% @as(u16, 80), guest.state().last_available);
    }
}

test "the driver is called when its flag or its event says so" {
    const Case = struct { used_index: u16, event: u16, count: u32, call: i32 };
    const cases = [_]Case{
        .{ .used_index = 0, .event = 0, .count = 1, .call = 1 },
        .{ .used_index = 0, .event = 1, .count = 1, .call = 0 },
        .{ .used_index = 0, .event = 2, .count = 3, .call = 1 },
        .{ .used_index = 0, .event = 3, .count = 3, .call = 0 },
        .{ .used_index = 0, .event = 0xffff, .count = 3, .call = 0 },
        .{ .used_index = 0xffff, .event = 0xffff, .count = 1, .call = 1 },
        .{ .used_index = 0xfffe, .event = 0, .count = 3, .call = 1 },
        .{ .used_index = 0xfffe, .event = 1, .count = 3, .call = 0 },
        .{ .used_index = 0xfffe, .event = 0xfffd, .count = 3, .call = 0 },
    };
    for (cases) |case| {
        const guest = try Guest.start(.{ .features = feature_event_idx, .used_index = case.used_index -% 1 });
        defer guest.stop();
        // With EVENT_IDX the flag means nothing.
        guest.put(u16, Guest.available, split.flag_no_interrupt);
        for (0..4) |i| {
            _ = link(guest, @intCast(i), Guest.buffers, &.{.{ 1, 0 }});
            guest.offer(@intCast(i));
        }
        try expectEqual(4, guest.pop());
        // After a start the driver is called whatever it asked for.
        guest.setUsedEvent(case.used_index -% 2);
        try expectEqual(1, guest.push(&.{3}));
        guest.setUsedEvent(case.event);
        try expectEqual(case.call, guest.push(([_]u32{ 0, 1, 2 })[0..case.count]));
    }
    const guest = try Guest.start(.{});
    defer guest.stop();
    for (0..3) |i| {
        _ = link(guest, @intCast(i), Guest.buffers, &.{.{ 1, 0 }});
        guest.offer(@intCast(i));
    }
    try expectEqual(3, guest.pop());
    guest.put(u16, Guest.available, split.flag_no_interrupt);
    try expectEqual(1, guest.push(&.{0}));
    try expectEqual(0, guest.push(&.{1}));
    guest.put(u16, Guest.available, 0);
    try expectEqual(1, guest.push(&.{2}));
}

test "arming tells the driver and finds what came before it knew" {
    for ([_]u64{ 0, feature_event_idx }) |features| {
        const guest = try Guest.start(.{ .features = features, .base = 0xffff });
        defer guest.stop();
        const event = Guest.used + 4 + 8 * 8;
        _ = link(guest, 0, Guest.buffers, &.{.{ 1, 0 }});
        try expectEqual(0, rings.disarm(guest.ring));
        try expectEqual(if (features == 0) split.flag_no_notify else 0, guest.get(u16, Guest.used));
        try expectEqual(0, rings.arm(guest.ring));
        try expectEqual(0, guest.get(u16, Guest.used));
        if (features != 0) try expectEqual(0xffff, guest.get(u16, event));
        guest.offer(0);
        try expectEqual(1, rings.arm(guest.ring));
        try expectEqual(1, guest.pop());
        try expectEqual(0, rings.arm(guest.ring));
        if (features != 0) try expectEqual(0, guest.get(u16, event));
    }
}

test "what does not fit in a batch waits for the next" {
    const guest = try Guest.start(.{ .segments = 5, .batch_max = 3 });
    defer guest.stop();
    _ = link(guest, 0, Guest.buffers, &.{ .{ 1, 0 }, .{ 1, 0 }, .{ 1, write } });
    _ = link(guest, 3, Guest.buffers, &.{ .{ 1, 0 }, .{ 1, 0 }, .{ 1, write } });
    _ = link(guest, 6, Guest.buffers, &.{.{ 1, 0 }});
    _ = link(guest, 7, Guest.buffers, &.{.{ 1, 0 }});
    for ([_]u16{ 0, 3, 6, 7 }) |head| guest.offer(head);
    try expectEqual(1, guest.pop());
    try expectEqual(0, guest.record(0).head);
    try expectEqual(1, rings.arm(guest.ring));
    try expectEqual(3, guest.pop());
    try expectEqual(3, guest.record(0).head);
    try expectEqual(3, guest.record(1).segment_first);
    try expectEqual(7, guest.record(2).head);
    try expectEqual(0, guest.pop());
    try expectEqual(linux.fail(.INVAL), rings.pop(guest.ring, &guest.words, 35, 3));
    try expectEqual(linux.fail(.INVAL), rings.pop(guest.ring, &guest.words, 8192, 0xffff_ffff));
    try expectEqual(4, guest.state().in_flight);
}
