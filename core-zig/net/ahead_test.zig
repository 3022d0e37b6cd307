//! Looking ahead, over rings whose addresses are IOVAs.

const std = @import("std");
const layout = @import("../layout.zig");
const linux = @import("../linux.zig");
const fake_guest = @import("../ring/fake_guest.zig");
const packed_guest = @import("../ring/fake_packed_guest.zig");
const ahead = @import("ahead.zig");
const burst_test = @import("burst_test.zig");
const Guest = fake_guest.Guest;
const PackedGuest = packed_guest.PackedGuest;
const Caller = burst_test.Caller;
const expectEqual = std.testing.expectEqual;
const write = fake_guest.write;

/// Where the buffers are for the device.
const buffers = 0x1000_0000;
const w = layout.access_write;

fn look(guest: *Guest, caller: *Caller) i32 {
    return ahead.lookAhead(guest.ring, &caller.scratch, caller.scratch.len);
}

fn miss(iova: u64) layout.IotlbMiss {
    return .{ .iova = iova, .access = w, .reason = layout.miss_absent };
}

test "chains that are looked at stay in the ring, whatever is tracked of them" {
    const cases = [_]fake_guest.Options{
        .{},
        .{ .features = fake_guest.feature_in_order },
        .{ .flags = layout.flag_ring_logged },
        .{ .inflight_size = 16 },
    };
    for (cases) |case| {
        var options = case;
        options.size = 16;
        options.is_translated = true;
        const guest = try Guest.start(options);
        defer guest.stop();
        const caller = try Caller.create();
        defer caller.destroy();
        try expectEqual(linux.fail(.AGAIN), look(guest, caller));
        try guest.mapRing();
        try expectEqual(0, look(guest, caller));
        // The first two are in one page, which is mapped; the third is not.
        for ([_]u64{ 0, 0x800, 0x1000 }, 0..) |at, i| {
            guest.describe(Guest.descriptors, @intCast(i), buffers + at, 200, write, 0);
            guest.offer(@intCast(i));
        }
        try expectEqual(linux.fail(.AGAIN), look(guest, caller));
        try guest.expectMisses(&.{miss(buffers)});
        try guest.map(buffers, Guest.buffers, 0x1000, w);
        for (0..3) |_| {
            try expectEqual(2, look(guest, caller));
            try guest.expectMisses(&.{miss(buffers + 0x1000)});
        }
        const before = guest.state();
        try expectEqual(0, before.in_flight);
        try expectEqual(0, before.popped);
        try expectEqual(0, before.last_available);
        try expectEqual(0, guest.usedIndex());
        // And are used in their order.
        caller.put(0, 32, 60, 1);
        caller.put(1, 128, 61, 1);
        try expectEqual(2, (try caller.send(guest, 2, 0)).frames);
        try expectEqual(2, guest.usedIndex());
        for (0..2) |i| {
            try expectEqual(@as(u32, @intCast(i)), guest.usedAt(@intCast(i)).id);
            try expectEqual(@as(u32, @intCast(72 + i)), guest.usedAt(@intCast(i)).length);
        }
        try expectEqual(2, guest.state().last_available);
    }
}

test "packed rings: chains that are looked at stay in the ring, over many laps" {
    for ([_]u32{ 0, 6 }) |inflight_size| {
        var guest = try PackedGuest.start(.{ .size = 6, .is_translated = true, .inflight_size = inflight_size });
        defer guest.stop();
        const caller = try Caller.create();
        defer caller.destroy();
        // The descriptors are written, too.
        try guest.guest.mapRing();
        try guest.guest.map(buffers, Guest.buffers, 0x1000, w);
        caller.put(0, 32, 200, 1);
        for (0..30) |lap| {
            guest.offer(@intCast(lap % 6), &.{ .{ buffers, 100, write }, .{ buffers + 100, 112, write } });
            guest.offer(@intCast((lap + 1) % 6), &.{.{ buffers + 0x200, 212, write }});
            for (0..2) |_| try expectEqual(2, look(guest.guest, caller));
            try expectEqual(0, guest.guest.state().in_flight);
            for (0..2) |i| {
                try expectEqual(1, (try caller.send(guest.guest, 1, 0)).frames);
                const used = guest.take().?;
                try expectEqual(@as(u16, @intCast((lap + i) % 6)), used.id);
                try expectEqual(212, used.length);
            }
            try expectEqual(0, look(guest.guest, caller));
        }
    }
}

test "a rule that is broken ahead breaks the ring when its chain is next" {
    const guest = try Guest.start(.{ .size = 16, .is_translated = true });
    defer guest.stop();
    const caller = try Caller.create();
    defer caller.destroy();
    try guest.mapRing();
    try guest.map(buffers, Guest.buffers, 0x1000, w);
    guest.describe(Guest.descriptors, 0, buffers, 200, write, 0);
    guest.offer(0);
    guest.offer(16);
    try expectEqual(1, look(guest, caller));
    try expectEqual(layout.broken_none, guest.state().broken);
    caller.put(0, 32, 60, 1);
    try expectEqual(1, (try caller.send(guest, 1, 0)).frames);
    try expectEqual(linux.fail(.PROTO), look(guest, caller));
    try expectEqual(layout.broken_head, guest.state().broken);
}
