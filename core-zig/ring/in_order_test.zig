//! IN_ORDER: one used element, or used descriptor, for a run of requests.

const std = @import("std");
const layout = @import("../layout.zig");
const rings = @import("ring.zig");
const fake_guest = @import("fake_guest.zig");
const fake_packed_guest = @import("fake_packed_guest.zig");
const split = @import("split.zig");
const Guest = fake_guest.Guest;
const PackedGuest = fake_packed_guest.PackedGuest;
const Used = fake_packed_guest.Used;
const feature_in_order = fake_guest.feature_in_order;
const write = fake_guest.write;
const expectEqual = std.testing.expectEqual;
const b = Guest.buffers;

fn complete(guest: *Guest, completions: []const layout.Completion) i32 {
    return rings.push(guest.ring, completions.ptr, @intCast(completions.len));
}

test "one used element stands for a run of requests that were written completely" {
    const guest = try Guest.start(.{ .features = feature_in_order });
    defer guest.stop();
    for (0..3) |lap| {
        const start: u16 = @intCast(6 * lap);
        // Of 1 readable and 8 writable bytes, and of readable ones alone.
        const heads = [_]u16{ 0, 2, 4, 5, 6, 7 };
        for (heads) |head| {
            const parts: []const [2]u32 = if (head < 4) &.{ .{ 1, 0 }, .{ 8, write } } else &.{.{ 1, 0 }};
            _ = fake_guest.link(guest, head, b, parts);
            guest.offer(head);
        }
        try expectEqual(6, guest.pop());
        for (0..8) |i| guest.put(u64, Guest.used + 4 + 8 * i, 0xeeee_eeee_eeee_eeee);
        // The third waits for the first two, of which the second is short.
        try expectEqual(0, complete(guest, &.{.{ .head = 4, .written = 0 }}));
        try expectEqual(1, complete(guest, &.{ .{ .head = 2, .written = 7 }, .{ .head = 0, .written = 8 }, .{ .head = 5, .written = 0 } }));
        try expectEqual(start +% 4, guest.usedIndex());
        const untouched: split.UsedElement = .{ .id = 0xeeee_eeee, .length = 0xeeee_eeee };
        try expectEqual(split.UsedElement{ .id = 2, .length = 7 }, guest.usedAt(start));
        try expectEqual(untouched, guest.usedAt(start + 1));
        try expectEqual(split.UsedElement{ .id = 5, .length = 0 }, guest.usedAt(start + 2));
        try expectEqual(untouched, guest.usedAt(start + 3));
        // A run ends where the push does: the driver is told at once.
        try expectEqual(1, complete(guest, &.{.{ .head = 6, .written = 0 }}));
        try expectEqual(split.UsedElement{ .id = 6, .length = 0 }, guest.usedAt(start + 4));
        try expectEqual(1, complete(guest, &.{.{ .head = 7, .written = 0 }}));
        try expectEqual(split.UsedElement{ .id = 7, .length = 0 }, guest.usedAt(start + 5));
        try expectEqual(0, guest.state().in_flight);
    }
}

test "one used descriptor stands for such a run, and the next is behind all of its chains" {
    var driver = try PackedGuest.start(.{ .size = 7, .features = feature_in_order });
    defer driver.stop();
    const guest = driver.guest;
    for (0..9) |_| {
        const first = driver.available;
        driver.offer(3, &.{ .{ b, 1, 0 }, .{ b, 8, write } });
        driver.offer(0, &.{ .{ b, 1, 0 }, .{ b, 1, 0 }, .{ b, 1, 0 } });
        driver.offer(6, &.{ .{ b, 1, 0 }, .{ b, 8, write } });
        try expectEqual(3, guest.pop());
        try expectEqual(0, complete(guest, &.{ .{ .head = 6, .written = 3 }, .{ .head = 0, .written = 0 } }));
        try expectEqual(null, driver.take());
        try expectEqual(1, complete(guest, &.{.{ .head = 3, .written = 8 }}));
        // Written where the first chain was.
        try expectEqual(first, driver.used);
        const word = guest.get(u64, PackedGuest.table + 16 * @as(u64, first.slot) + 8);
        try expectEqual(6, @as(u16, @truncate(word >> 32)));
        try expectEqual(3, @as(u32, @truncate(word)));
        try expectEqual(first.after(7, 7).bits(), guest.state().used_index);
        driver.used = first.after(7, 7);
    }
}
